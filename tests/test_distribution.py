"""Several devices compute what one does, and hold what the layout says."""

import os
import subprocess
import sys
from pathlib import Path

import backends
import keras
import pytest

from keras_pdattn import distribution, layers

EXAMPLE = Path(__file__).parent.parent / "examples" / "distributed.py"


#: Heads of different scales are on different devices on JAX alone.
of_scales = pytest.param("scaled_head", marks=[] if backends.BACKEND == "jax" else pytest.mark.slow)


@pytest.mark.parametrize("primal", ["batch_norm", of_scales])
def test_losses_on_several_devices_are_those_on_one(primal):
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        # Two processes of torch share the cores; with threads of their own they would wait.
        env={**os.environ, "PRIMAL": primal, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest difference" in done.stdout


def mesh():
    return keras.distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])


HEADS = {"query": (None, "model", None), "attention_output": ("model", None, None)}
HEADS |= {"key": HEADS["query"], "value": HEADS["query"]}
BIASES = {name: ("model", None) for name in ("query", "key", "value")}
DENSE = {
    "feedforward_intermediate_dense/kernel": (None, "model"),
    "feedforward_intermediate_dense/bias": ("model",),
    "feedforward_output_dense/kernel": ("model", None),
}


@pytest.mark.parametrize("prefix", [".*", "decoder"])
def test_the_layout_divides_heads_and_hidden_units(prefix):
    layouts = distribution.layout_map(mesh(), prefix=prefix)
    block = layers.TransformerDecoder(16, 4, primal="conv1d", name="decoder")
    block.build((None, None, 8), (None, None, 8))
    expected = {**DENSE}
    for attention in ("self_attention", "cross_attention"):
        for name, axes in HEADS.items():
            expected[f"{attention}/{name}/kernel"] = axes
        for name, axes in BIASES.items():
            expected[f"{attention}/{name}/bias"] = axes
    found = {}
    for weight in block.weights:
        layout = layouts[weight.path]
        if layout is not None:
            assert len(layout.axes) == len(weight.shape)
            found[weight.path.removeprefix("decoder/")] = tuple(layout.axes)
    assert found == expected
    assert layouts["encoder/query/kernel"] is None or prefix == ".*"


def test_a_layout_needs_an_axis_of_the_mesh():
    with pytest.raises(ValueError, match="axis.*Received: axis='heads'"):
        distribution.layout_map(mesh(), axis="heads")
