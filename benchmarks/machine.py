"""What figures were measured on."""

import importlib.metadata
import os
import platform
from pathlib import Path

import keras


def describe():
    """Processor, memory and versions, for the head of a file of results."""
    packages = {"jax": "jax", "tensorflow": "tensorflow", "torch": "torch"}
    backend = keras.backend.backend()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "keras": keras.__version__,
        backend: importlib.metadata.version(packages[backend]),
    }


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
