"""Measurements of the layers; figures go to `benchmarks/results/`."""
