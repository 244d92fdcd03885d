"""Runs every benchmark on the backend that `KERAS_BACKEND` names."""

from benchmarks import memory, scaling, speed, stack

speed.main([])
stack.main([])
memory.main([])
scaling.main()
