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


def read_here(name):
    """The figures of a benchmark on this backend and machine; an empty dict if there are none.

    Raises:
        SystemExit: if they are of another machine.
    """
    figures = read(name).get(keras.backend.backend(), {})
    if figures and figures["machine"] != machine.describe():
        raise SystemExit(
            f"Expected figures of this machine, {machine.describe()}. "
            f"Received: {name} of {figures['machine']}"
        )
    return figures


def read(name):
    """The figures of a benchmark by backend."""
    found = {}
    for backend in ("tensorflow", "jax", "torch"):
        path = RESULTS / f"{name}_{backend}.json"
        if path.exists():
            found[backend] = json.loads(path.read_text())
    return found
