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
        "gpu": gpu(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "keras": keras.__version__,
        backend: importlib.metadata.version(packages[backend]),
    }


def gpu():
    """The name of the GPU that the backend runs on, or `None`."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if keras.backend.backend() == "jax":
        import jax

        device = jax.devices()[0]
        return device.device_kind if device.platform == "gpu" else None
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(found[0])["device_name"] if found else None


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
