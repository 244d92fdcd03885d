"""Law 9: a `.keras` file written under one backend gives the same numbers under the others."""

import os
import subprocess
import sys

import backends
import keras
import numpy as np
import pytest

from keras_pdattn import layers

LAYERS = {
    "softmax": lambda: layers.PrimalDualAttention(4, 6),
    "batch_norm": lambda: layers.BatchNormAttention(4, 6, learn_beta=True, beta=0.9),
    "scaled_head": lambda: layers.ScaledHeadAttention(4, 6, scales=(1, 2, 4), reduction="first"),
    "both": lambda: layers.BatchNormScaledHeadAttention(4, 6, scales=(1, 3), use_gate=True),
}
LOAD = """
import sys

import keras
import numpy as np

import keras_pdattn

folder, *names = sys.argv[1:]
x = np.load(f"{folder}/inputs.npy")
for name in names:
    model = keras.saving.load_model(f"{folder}/{name}.keras", safe_mode=True)
    y = model.predict(x, verbose=0)
    np.save(f"{folder}/{name}.{keras.backend.backend()}.npy", y)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models saved here, and what each of the other backends made of them."""
    folder = tmp_path_factory.mktemp("models")
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(3, 9, 12)).astype("float32")
    x[1, 5:] = 0
    np.save(folder / "inputs.npy", x)
    for name, layer in LAYERS.items():
        inputs = keras.Input((None, 12))
        masked = keras.layers.Masking()(inputs)
        hidden = layer()(masked, masked, use_causal_mask=True)
        model = keras.Model(inputs, layer()(hidden, hidden))
        model.save(folder / f"{name}.keras")
        np.save(folder / f"{name}.{backends.BACKEND}.npy", model.predict(x, verbose=0))
    others = {"tensorflow", "jax", "torch"} - {backends.BACKEND}
    loaders = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(folder), *LAYERS],
            env={**os.environ, "KERAS_BACKEND": other},
        )
        for other in others
    ]
    assert [loader.wait() for loader in loaders] == [0, 0]
    return folder


@pytest.mark.parametrize("name", LAYERS)
def test_files_load_under_the_other_backends(folder, name):
    results = [np.load(file) for file in sorted(folder.glob(f"{name}.*.npy"))]
    assert len(results) == 3
    for result in results[1:]:
        assert np.isfinite(result).all()
        np.testing.assert_allclose(result, results[0], atol=1e-5)
