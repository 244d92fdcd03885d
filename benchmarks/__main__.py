"""Runs every benchmark on the backend that `KERAS_BACKEND` names."""

from benchmarks import scaling

scaling.main()
