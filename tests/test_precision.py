"""Sixteen bits: our error against the oracle is at most twice that of Keras's layer."""

import dataclasses

import backends
import keras
import numpy as np
import pytest
import reference
from keras import ops as keras_ops
from members import (
    FEATURE_MAPS,
    FEW,
    MEMBERS,
    SEQUENCE_MEMBERS,
    every_member_compiled,
    few_where_compiled,
)

from keras_pdattn import Primal, feature_maps, layers, ops, transforms
from keras_pdattn.training_sets import ScaledHeads

LOW = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
#: For what the range of float16 is too short for.
SHORT = few_where_compiled("dtype", ["bfloat16", "float16"], few=["float16"])
#: Feature maps alone, with nothing that makes inputs smaller.
MAPS = [member for member in SEQUENCE_MEMBERS if member.name in FEATURE_MAPS]
#: Batch norm before maps that notice a shift of all keys.
MORE_NORMALISED = [member for member in SEQUENCE_MEMBERS if member.name in ("elu-bn", "taylor-bn")]
CAUSAL = pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])


def rounded(x, dtype):
    """`x` as the nearest numbers of `dtype`, in a tensor of it and in float64."""
    tensor = keras_ops.cast(keras_ops.convert_to_tensor(x.astype("float32")), dtype)
    return tensor, backends.to_numpy(tensor)


def normalises(member):
    return any(isinstance(one, transforms.BatchNorm) for one in member.primal.transform)


def has_equal_shares(member):
    """Whether equal keys share the weight evenly, over all of the sequence."""
    return member.oracle.window is None and member.primal.feature_map != feature_maps.Relu()


def oracle_of(member, omega):
    """What the oracle is told of a fresh layer: no convolution, and what was drawn."""
    told = tuple(one for one in member.oracle.transforms if not isinstance(one, reference.Conv))
    oracle = dataclasses.replace(member.oracle, transforms=told)
    if omega is None:
        return oracle
    kernel = reference.positive_random_kernel(lambda num_heads, depth: omega[:, :num_heads])
    return dataclasses.replace(oracle, log_kernel=kernel)


def rms(error):
    return np.sqrt(np.mean(np.square(error)))


@SHORT
@CAUSAL
@few_where_compiled("member", [m for m in MEMBERS if normalises(m)], FEW)
def test_an_offset_costs_batch_norm_no_precision(member, is_causal, dtype):
    """Keys and queries whose mean is 100 times their spread lose no more than centred ones."""

    @backends.jitted
    def attention(*tensors):
        return ops.attention(*tensors, member.primal, is_causal=is_causal)

    errors = []
    for mean in (0.0, 100.0):
        rng = np.random.default_rng(0)
        means = (mean, mean, 0.0)
        inputs = [rounded(rng.normal(m, 1.0, (2, 48, 4, 16)), dtype) for m in means]
        tensors, exact = zip(*inputs)
        expected, _ = reference.attention(*exact, member.oracle, is_causal=is_causal)
        output = attention(*tensors)
        assert keras.backend.standardize_dtype(output.dtype) == dtype
        # A prefix of few keys has hardly any spread, and scores no precision holds.
        settled = slice(8, None) if is_causal else slice(None)
        errors.append(rms((backends.to_numpy(output) - expected)[:, settled]))
    assert errors[1] <= 2 * errors[0]


#: And up to how many queries see one example.
NORMALISED = {
    "normalised": (Primal(transform="batch_norm"), 1),
    "scaled": (Primal(transform="batch_norm", training_set=ScaledHeads((2, 3))), 2),
}
PADDED = pytest.mark.parametrize("is_padded", [False, True], ids=["plain", "padded"])


def sequences(is_padded):
    """Queries, keys and values in float32, and a mask: padding in front, behind, between, none."""
    inputs = [np.random.default_rng(i).normal(size=(4, 33, 4, 8)) for i in range(3)]
    inputs = [x.astype("float32") for x in inputs]
    key_mask = np.ones((4, 33), bool)
    key_mask[0, :5], key_mask[1, 20:], key_mask[2, [1, 4, 9]] = False, False, False
    return inputs, key_mask if is_padded else None


@PADDED
@pytest.mark.parametrize(("primal", "count"), NORMALISED.values(), ids=NORMALISED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_example_has_no_gradient_but_its_value(primal, count, dtype, is_padded):
    """The score of the only example counts for nothing; and it has no spread to divide by."""
    inputs, key_mask = sequences(is_padded)

    def first_outputs(*tensors):
        low = [keras_ops.cast(x, dtype) for x in tensors]
        output = ops.attention(*low, primal, is_causal=True, key_mask=key_mask)
        return keras_ops.cast(output[:, :count], "float32")

    cotangent = np.random.default_rng(3).normal(size=(4, count, 4, 8))
    output, (query, key, value) = backends.output_and_gradients(first_outputs, inputs, cotangent)
    assert np.abs(output).max() > 1 and np.abs(value).max() > 1
    assert not query.any() and not key.any()


@PADDED
@pytest.mark.parametrize("primal", [one for one, _ in NORMALISED.values()], ids=NORMALISED)
def test_gradients_of_statistics_of_prefixes(primal, is_padded):
    """Those of float32 are those of float64, but for keys of prefixes with hardly any spread."""
    inputs, key_mask = sequences(is_padded)
    cotangent = np.random.default_rng(3).normal(size=inputs[2].shape)

    def attention(*tensors):
        return ops.attention(*tensors, primal, is_causal=True, key_mask=key_mask)

    with backends.float64():
        (output, gradients), (expected, exact) = (
            backends.output_and_gradients(attention, [x.astype(dtype) for x in inputs], cotangent)
            for dtype in ("float32", "float64")
        )
    errors = [rms(one - other) / rms(other) for one, other in zip(gradients, exact)]
    assert rms(output - expected) < 1e-6 * rms(expected)
    assert max(errors[0], errors[2]) < 2e-5 and errors[1] < 1e-3


@SHORT
@CAUSAL
@few_where_compiled("member", [m for m in [*MEMBERS, *MORE_NORMALISED] if normalises(m)], FEW)
def test_queries_far_from_keys_that_are_alike(member, is_causal, dtype):
    """A distance over the root of epsilon is beyond float16; shares of equal values are not."""
    rng = np.random.default_rng(0)
    key = np.broadcast_to(rng.uniform(-100, 100, (1, 1, 4, 8)), (2, 9, 4, 8))
    value = np.broadcast_to(rng.normal(size=(1, 1, 4, 8)), key.shape)
    arrays = [x.astype("float32") for x in (rng.uniform(-1e3, 1e3, key.shape), key, value)]

    def attention(*tensors):
        low = (keras_ops.cast(x, dtype) for x in tensors)
        output = ops.attention(*low, member.primal, is_causal=is_causal)
        return keras_ops.cast(output, "float32")

    output, gradients = backends.output_and_gradients(attention, arrays, np.ones(key.shape))
    expected = 0.0 if member.primal.feature_map == feature_maps.Relu() else value
    np.testing.assert_allclose(output, expected * np.ones(key.shape), atol=2e-2)
    for gradient in gradients:
        assert np.isfinite(gradient).all()


@SHORT
@few_where_compiled("member", [*MEMBERS, *MORE_NORMALISED], FEW)
def test_padding_hides_keys_that_are_far(member, dtype):
    """Over the root of epsilon, scores of padded keys are as large as float16 can hold."""
    rng = np.random.default_rng(0)
    x, _ = rounded(rng.normal(size=(3, 7, 4, 8)), dtype)
    counts = (1, 2, 0)
    key_mask = keras_ops.convert_to_tensor(np.arange(7) < np.array(counts)[:, np.newaxis])

    @backends.jitted
    def attention(query, key, value, key_mask=None):
        return ops.attention(query, key, value, member.primal, key_mask=key_mask)

    padded = backends.to_numpy(attention(x, x, x, key_mask))
    for index, count in enumerate(counts):
        seen = x[index : index + 1, :count]
        expected = backends.to_numpy(attention(x[index : index + 1], seen, seen))
        np.testing.assert_allclose(padded[index : index + 1], expected, atol=2e-2)


@LOW
@every_member_compiled
@pytest.mark.parametrize("mean", [0.0, 100.0], ids=["centred", "mean_of_100_spreads"])
def test_error_of_layers(member, mean, dtype):
    """Against Keras's layer, projections included, from the same rounded weights."""
    rng = np.random.default_rng(0)
    ours = layers.PrimalDualAttention(4, 8, primal=member.primal, dtype=dtype)
    keras_layer = keras.layers.MultiHeadAttention(4, 8, dtype=dtype)
    x, exact_x = rounded(rng.normal(size=(2, 48, 32)), dtype)
    for layer in (ours, keras_layer):
        layer.build(x.shape, x.shape)
    weights = [rng.normal(size=w.shape) / np.sqrt(32) for w in keras_layer.weights]
    weights[1], weights[3] = (np.full(weights[1].shape, mean) for _ in range(2))
    weights = [rounded(w, dtype)[1] for w in weights]
    errors = []
    drawn = [backends.to_numpy(w.value) for w in ours.weights if w.path.endswith("omega")]
    told = oracle_of(member, drawn[0] if drawn else None)
    for layer, oracle in ((ours, told), (keras_layer, reference.Primal())):
        for variable, weight in zip(layer.weights, weights):
            variable.assign(weight)
        projections = zip(weights[0:6:2], weights[1:6:2])
        query, key, value = (np.einsum("btc,chd->bthd", exact_x, w) + b for w, b in projections)
        expected, _ = reference.attention(query, key, value, oracle)
        expected = np.einsum("bthd,hdc->btc", expected, weights[6]) + weights[7]
        # Of the size of the output: means over a window are larger than those over all.
        errors.append(rms(backends.to_numpy(layer(x, x)) - expected) / rms(expected))
    # Keras's own layer overflows float16 on TensorFlow, which bounds nothing.
    assert errors[0] <= 2 * errors[1] or (np.isnan(errors[1]) and np.isfinite(errors[0]))


@LOW
@few_where_compiled("member", [m for m in MEMBERS if has_equal_shares(m)], FEW)
def test_long_sequences_keep_their_sums(member, dtype):
    """B5: over 4,096 equal keys the normaliser is 4,096, where 16 bits would stall."""
    length = 4096
    ones = keras_ops.ones((1, length, 4, 4), dtype=dtype)
    value = np.zeros((1, length, 4, 4), "float32")
    value[:, : length // 2] = 2.0
    value = keras_ops.cast(keras_ops.convert_to_tensor(value), dtype)
    output = backends.to_numpy(ops.attention(ones[:, -3:], ones, value, member.primal))
    np.testing.assert_allclose(output, 1.0, atol=5e-3)


@few_where_compiled("member", list(dict.fromkeys([*MEMBERS, *MAPS])), [FEW[0], *MAPS])
@few_where_compiled("dtype", ["float32", "bfloat16", "float16"], few=["float32", "float16"])
@CAUSAL
def test_large_inputs_stay_finite(member, is_causal, dtype):
    """P20: forward and backward, for inputs from one to as large as the dtype can bear."""

    def loss(*tensors):
        low = (keras_ops.cast(x, dtype) for x in tensors)
        output = ops.attention(*low, member.primal, is_causal=is_causal)
        return keras_ops.sum(keras_ops.cast(output, "float32"))

    @backends.jitted
    def outputs_and_scores(*low):
        output = ops.attention(*low, member.primal, is_causal=is_causal)
        return output, *ops.attention(*low, member.primal, is_causal=is_causal, return_scores=True)

    rng = np.random.default_rng(0)
    for size in np.geomspace(1.0, 1e2 if dtype == "float16" else 1e4, num=7):
        arrays = [rng.uniform(-size, size, (1, 9, 4, 8)).astype("float32") for _ in range(3)]
        # Under elu such a key, which the first causal query sees alone, has next to no features.
        arrays[1][:, 0] = np.minimum(arrays[1][:, 0], -min(size, 95.0))
        low = [keras_ops.cast(keras_ops.convert_to_tensor(x), dtype) for x in arrays]
        for x in outputs_and_scores(*low):
            assert np.isfinite(backends.to_numpy(x)).all(), size
        for gradient in backends.gradients(loss, arrays):
            assert np.isfinite(gradient).all(), size
