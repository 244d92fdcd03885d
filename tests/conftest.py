"""One backend a run, named by `KERAS_BACKEND`; deterministic examples, a larger set for `slow`."""

import gc
import os
from pathlib import Path

# JAX compiles every op for every shape; the tests wait for that, not for the ops. Processes and
# later runs share what it compiled. (The Makefile has flags that other versions may not know.)
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
PROGRAMS = Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Programs need not say which lines they come from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import backends
import keras
import pytest
from hypothesis import HealthCheck, settings

# JAX compiles every op for every shape, which leaves less time for examples.
settings.register_profile(
    "default",
    max_examples=2 if keras.backend.backend() == "jax" else 12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_report_header():
    return f"keras {keras.__version__} on {keras.backend.backend()}"


@pytest.fixture(autouse=True)
def seeded():
    """Starts every test from one seed."""
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="module")
def cleared():
    """Leaves no model behind a file of tests; for each test that would take half a second."""
    yield
    keras.utils.clear_session()


@pytest.fixture(autouse=True)
def collected():
    """Spares the collector what earlier tests left, as Keras calls it for each layer it quantises.

    Forgets what JAX has compiled before the process runs out of memory mappings.
    """
    gc.freeze()
    yield
    gc.unfreeze()
    backends.forget_programs(most_mappings=30_000)
