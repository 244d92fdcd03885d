"""What is measured: layers of ours, what the oracle is told of them, what they are held against."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import keras
import numpy as np

from keras_pdattn import layers
from keras_pdattn.layers import projections

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import reference

HEADS, DEPTH = 8, 32
WIDTH = HEADS * DEPTH
#: The length at which outputs are held to the oracle, which loops over queries.
CHECKED_LENGTH = 67
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
MODES = ("whole", "causal", "padded")
RIVALS = ("Keras", "our softmax")


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer of ours, what the oracle is told of it, and the layer it is held against."""

    primal: str
    oracle: reference.Primal
    rival: str = "Keras"
    rival_arguments: dict = dataclasses.field(default_factory=dict)
    modes: tuple = MODES

    def ours(self, dtype="float32"):
        return layers.PrimalDualAttention(HEADS, DEPTH, primal=self.primal, dtype=dtype)

    def theirs(self, dtype="float32"):
        if self.rival == "our softmax":
            return layers.PrimalDualAttention(HEADS, DEPTH, dtype=dtype)
        return keras.layers.MultiHeadAttention(HEADS, DEPTH, dtype=dtype, **self.rival_arguments)


BATCH_NORM = reference.Primal(transforms=(reference.BatchNorm(),))
SCALED = reference.Primal(scales=(1, 2, 4, 8))
BOTH = reference.Primal(transforms=(reference.BatchNorm(),), scales=(1, 2, 4, 8))
CASES = {
    "softmax": Case("softmax", reference.Primal()),
    "Attention-BN": Case("batch_norm", BATCH_NORM, "our softmax"),
    "Attention-SH": Case("scaled_head", SCALED, "our softmax"),
    "Attention-BN+SH": Case("batch_norm_scaled_head", BOTH, "our softmax"),
    "linear": Case("linear", reference.Primal(reference.elu_kernel)),
    "window of 64": Case(
        "sliding_window",
        reference.Primal(window=(64, 1, 0)),
        rival_arguments={"sliding_window": 64},
        # Keras's layer makes a causal window's mask by running sums over all pairs, which take
        # XLA on TensorFlow minutes.
        modes=("whole", "padded"),
    ),
    # A fresh kernel is the identity.
    "Attention-Conv1D": Case("conv1d", reference.Primal()),
}


def call_of(mode, length):
    """The call arguments of a mode: a causal mask, or an eighth of padding behind."""
    if mode == "causal":
        return {"use_causal_mask": True}
    if mode == "padded":
        mask = keras.ops.expand_dims(keras.ops.arange(length) < length - length // 8, axis=0)
        return {"query_mask": mask, "value_mask": mask}
    return {}


def inputs(length, dtype="float32"):
    x = np.random.default_rng(0).normal(size=(1, length, WIDTH))
    return keras.ops.cast(keras.ops.convert_to_tensor(x.astype("float32")), dtype)


def check(name, mode, dtype):
    """Raises unless the layer gives what the oracle does."""
    with full_precision():
        _check(name, mode, dtype)


def full_precision():
    """JAX rounds float32 products to 19 bits on a GPU, unless told not to."""
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.default_matmul_precision("highest")


def _check(name, mode, dtype):
    case, x = CASES[name], inputs(CHECKED_LENGTH, dtype)
    layer = case.ours(dtype)
    output = layer(x, x, **call_of(mode, CHECKED_LENGTH))
    # Given the layer's own projections, by the operation that it takes for them: a prefix without
    # spread makes much of their rounding, which on a GPU differs from one operation to another.
    denses = [getattr(layer, f"{kind}_dense") for kind in ("query", "key", "value")]
    projected = [as_float64(projections.project(dense, x, layer.compute_dtype)) for dense in denses]
    kernel, bias = (as_float64(weight) for weight in layer.output_dense.weights)
    options = {"is_causal": mode == "causal"}
    if mode == "padded":
        mask = keras.ops.convert_to_numpy(call_of(mode, CHECKED_LENGTH)["value_mask"])
        options.update(key_mask=mask, query_mask=mask)
    expected, _ = reference.attention(*projected, case.oracle, **options)
    expected = np.einsum("bthd,hdc->btc", expected, kernel) + bias
    error = np.abs(as_float64(output) - expected).max()
    if not error <= TOLERANCE[dtype]:
        raise ValueError(
            f"{name}, {mode}, {dtype}: {error:.1e} from the oracle. Nothing to report."
        )


def as_float64(x):
    return keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")).astype("float64")
