"""Law 9: a `.keras` file written under one backend gives the same numbers under the others.

The named layers in float32 to 1e-5. Every combination in float64: prefixes of two or three
keys can make a batch-normalised kernel so steep that rounding its inputs to float32 moves
the output by more, and where backends differ in what they compute, float64 shows it too.
"""

import os
import subprocess
import sys

import backends
import keras
import numpy as np
import pytest
from members import EVERY_MEMBER, PAIRS

from keras_pdattn import layers

LOAD = """
import sys

import backends
import keras
import numpy as np

import keras_pdattn

for path in sys.argv[1:]:
    model = keras.saving.load_model(path, safe_mode=True)
    x = np.load(f"{path}.inputs.npy")
    y = keras.ops.convert_to_numpy(backends.jitted(model)(x))
    np.save(f"{path}.{backends.BACKEND}.npy", y)
"""


def sequence_model(make_layer, dtype="float32"):
    """Causal attention, and then the whole kind, over padded sequences."""
    inputs = keras.Input((None, 12), dtype=dtype)
    masked = keras.layers.Masking(dtype=dtype)(inputs)
    hidden = make_layer()(masked, masked, use_causal_mask=True)
    x = np.random.default_rng(0).normal(size=(3, 9, 12)).astype(dtype)
    x[1, 5:] = 0
    return keras.Model(inputs, make_layer()(hidden, hidden)), x


def grid_model(make_layer, dtype="float32"):
    """The same over images."""
    inputs = keras.Input((None, 4, 12), dtype=dtype)
    hidden = make_layer()(inputs, inputs, use_causal_mask=True)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 12)).astype(dtype)
    return keras.Model(inputs, make_layer()(hidden, hidden)), x


def member_model(member):
    axes = None if member.num_axes == 1 else (1, 2)

    def make_layer():
        return layers.PrimalDualAttention(
            3, 4, primal=member.primal, attention_axes=axes, dtype="float64"
        )

    return (sequence_model if member.num_axes == 1 else grid_model)(make_layer, "float64")


def check_files(folder, models, tolerance, **environment):
    """Saves the models, and has the other backends load and call them, in `environment`."""
    for name, (model, x) in models:
        path = f"{folder}/{name}.keras"
        model.save(path)
        np.save(f"{path}.inputs.npy", x)
        y = keras.ops.convert_to_numpy(backends.jitted(model)(x))
        assert y.dtype == x.dtype
        np.save(f"{path}.{backends.BACKEND}.npy", y)
    others = {"tensorflow", "jax", "torch"} - {backends.BACKEND}
    here = [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, here))
    paths = sorted(str(path) for path in folder.glob("*.keras"))
    loaders = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, *paths],
            env={**os.environ, **environment, "KERAS_BACKEND": other},
        )
        for other in others
    ]
    assert [loader.wait() for loader in loaders] == [0, 0]
    differences = {}
    for path in paths:
        expected = np.load(f"{path}.{backends.BACKEND}.npy")
        assert np.isfinite(expected).all() and expected.std() > 0.01
        for other in others:
            found = np.load(f"{path}.{other}.npy")
            differences[path, other] = np.abs(found - expected).max()
    assert len(differences) == 2 * len(models)
    assert {name: d for name, d in differences.items() if not d <= tolerance} == {}


def test_files_of_named_layers(tmp_path):
    makers = {
        "softmax": lambda: layers.PrimalDualAttention(4, 6),
        "batch_norm": lambda: layers.BatchNormAttention(4, 6, learn_beta=True, beta=0.9),
        "scaled_head": lambda: layers.ScaledHeadAttention(4, 6, scales=(1, 2, 4)),
        "first": lambda: layers.ScaledHeadAttention(4, 6, scales=(1, 2, 4), reduction="first"),
        "both": lambda: layers.BatchNormScaledHeadAttention(4, 6, scales=(1, 3), use_gate=True),
        "linear": lambda: layers.LinearAttention(4, 6, feature_map="positive_random"),
        "sliding_window": lambda: layers.SlidingWindowAttention(4, 6, size=3, global_tokens=1),
        "conv1d": lambda: layers.Conv1DAttention(4, 6),
    }
    models = [(name, sequence_model(maker)) for name, maker in makers.items()]
    models.append(("conv2d", grid_model(lambda: layers.Conv2DAttention(4, 6))))
    check_files(tmp_path, models, tolerance=1e-5)


@pytest.mark.parametrize(
    "members",
    [
        # What the others write, torch reads; what torch writes, they read.
        pytest.param(
            PAIRS[::2], id="pairs", marks=[] if backends.BACKEND == "torch" else pytest.mark.slow
        ),
        pytest.param(EVERY_MEMBER, id="every member", marks=pytest.mark.slow),
    ],
)
def test_files_of_the_family(tmp_path, members):
    with backends.float64():
        models = [(str(member), member_model(member)) for member in members]
        check_files(tmp_path, models, tolerance=1e-9, JAX_ENABLE_X64="1")
