"""Where figures go: `benchmarks/results/`, with the description of the machine."""

import json
from pathlib import Path

import keras

from benchmarks import machine

RESULTS = Path(__file__).parent / "results"


def write(name, figures):
    """Writes the figures of a benchmark on this backend."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{keras.backend.backend()}.json"
    path.write_text(json.dumps({"machine": machine.describe(), **figures}, indent=1) + "\n")
    return path


def read(name):
    """The figures of a benchmark by backend."""
    found = {}
    for backend in ("tensorflow", "jax", "torch"):
        path = RESULTS / f"{name}_{backend}.json"
        if path.exists():
            found[backend] = json.loads(path.read_text())
    return found
