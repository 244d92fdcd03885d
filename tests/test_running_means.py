"""Scaled heads of all scales in one call give what a call for each scale does."""

import backends
import keras
import numpy as np
import pytest
import reference
from members import few_where_compiled
from test_forms import arrays, check_same, value_and_gradients

from keras_pdattn import Primal, feature_maps, ops, training_sets, transforms
from keras_pdattn.ops import fused, running_means
from keras_pdattn.ops.examples import Examples
from keras_pdattn.training_sets import ScaledHeads
from keras_pdattn.transforms import BatchNorm

LENGTH = 13
SCALED = Primal(training_set=ScaledHeads((1, 4)))
NORMALISED = Primal(transform=BatchNorm(epsilon=0.1), training_set=ScaledHeads((2, 3)))
PRIMALS = {
    "scaled": SCALED,
    "longer than the sequence": Primal(training_set=ScaledHeads((3, 64))),
    "normalised": NORMALISED,
}
KEY_MASKS = {
    "nothing": None,
    "behind": np.arange(LENGTH) < [[LENGTH], [9]],
    "in front": np.arange(LENGTH) >= [[5], [1]],
    "holes": np.random.default_rng(3).random((2, LENGTH)) < 0.5,
    "everything": np.arange(LENGTH) < [[0], [LENGTH]],
}
CAUSAL = pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])


@pytest.fixture
def taken(monkeypatch):
    """What takes running means wherever they may be; how often they were."""
    calls, running_examples = [], running_means.running_examples

    def record(*arguments):
        calls.append(arguments)
        return running_examples(*arguments)

    monkeypatch.setattr(running_means, "are_faster", lambda *arguments: True)
    monkeypatch.setattr(training_sets, "running_examples", record)
    return calls


def one_call_and_many(monkeypatch, primal, inputs, **options):
    """Output and gradients in one call, and in one for each scale."""
    one = value_and_gradients(primal, inputs, **options)
    with monkeypatch.context() as patch:
        patch.setattr(running_means, "are_faster", lambda *arguments: False)
        return one, value_and_gradients(primal, inputs, **options)


@CAUSAL
@few_where_compiled("key_mask", KEY_MASKS, few=["nothing", "holes"])
@few_where_compiled("primal", PRIMALS, few=["normalised"])
def test_one_call_gives_what_many_do(monkeypatch, taken, primal, key_mask, is_causal):
    inputs = arrays(LENGTH, heads=3, batch=2)
    options = {"is_causal": is_causal, "key_mask": key_mask}
    one, many = one_call_and_many(monkeypatch, primal, inputs, **options)
    assert taken
    check_same(one, many, tolerance=2e-5)


@pytest.mark.parametrize("query_length", [1, LENGTH + 4])
def test_other_numbers_of_queries(monkeypatch, taken, query_length):
    """As a decoder asks an encoder's padded output."""
    inputs = arrays(query_length, LENGTH, heads=3, batch=2)
    many = one_call_and_many(monkeypatch, NORMALISED, inputs, key_mask=KEY_MASKS["in front"])
    assert taken
    check_same(*many, tolerance=2e-5)


@few_where_compiled("wide", ["query", "key", "value"], few=["value"])
@few_where_compiled("primal", {"scaled": SCALED, "normalised": NORMALISED}, few=["scaled"])
def test_dtypes_may_differ(monkeypatch, taken, primal, wide):
    tensors = [keras.ops.convert_to_tensor(x) for x in arrays(LENGTH)]
    dtypes = ["float32" if name == wide else "bfloat16" for name in ("query", "key", "value")]
    tensors = [keras.ops.cast(x, dtype) for x, dtype in zip(tensors, dtypes)]
    one = ops.attention(*tensors, primal, is_causal=True)
    assert taken
    monkeypatch.setattr(running_means, "are_faster", lambda *arguments: False)
    many = ops.attention(*tensors, primal, is_causal=True)
    assert one.dtype == many.dtype == tensors[2].dtype
    np.testing.assert_allclose(backends.to_numpy(one), backends.to_numpy(many), atol=0.05)


@CAUSAL
def test_a_query_that_is_padding_sees_nothing(taken, is_causal):
    query_mask = np.arange(LENGTH) < [[LENGTH], [9]]
    options = {"is_causal": is_causal, "key_mask": KEY_MASKS["in front"], "query_mask": query_mask}
    output = backends.to_numpy(ops.attention(*arrays(LENGTH, batch=2), NORMALISED, **options))
    assert taken
    assert not output[~query_mask].any()
    assert output[query_mask].any(axis=(1, 2)).sum() >= 9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offset_costs_no_precision(taken, dtype):
    """Keys whose mean is 100 times their spread, behind padding of zeros."""
    rng = np.random.default_rng(0)
    key_mask, errors = np.arange(48) >= [[5], [0]], []
    for mean in (0.0, 100.0):
        inputs = [rng.normal(m, 1.0, (2, 48, 2, 16)).astype("float32") for m in (mean, mean, 0)]
        tensors = [keras.ops.cast(keras.ops.convert_to_tensor(x), dtype) for x in inputs]
        told = reference.Primal(transforms=(reference.BatchNorm(0.1),), scales=(2, 3))
        exact = [backends.to_numpy(x) for x in tensors]
        options = {"is_causal": True, "key_mask": key_mask}
        expected, _ = reference.attention(*exact, told, **options)
        error = backends.to_numpy(ops.attention(*tensors, NORMALISED, **options)) - expected
        # A prefix of few keys has hardly any spread, and scores no precision holds.
        errors.append(np.sqrt(np.mean(np.square(error[:, 16:]))))
    assert taken
    # In float32 the offset itself takes bits of every key.
    assert errors[1] <= 2 * errors[0] + (1e-4 if dtype == "float32" else 0)


@pytest.mark.parametrize(
    "primal",
    [
        Primal(),
        Primal(feature_map="elu", training_set="scaled_heads"),
        Primal(transform="conv1d", training_set="scaled_heads"),
        Primal(transform=("batch_norm", "batch_norm"), training_set="scaled_heads"),
        Primal(training_set=ScaledHeads((1, 2), reduction="first")),
    ],
    ids=repr,
)
def test_others_are_not_asked(taken, primal):
    """Feature maps with states, other transforms, other reductions, and what has no windows."""
    ops.attention(*arrays(LENGTH, heads=4, batch=2), primal, key_mask=KEY_MASKS["behind"])
    assert not taken


@pytest.mark.parametrize(
    "options",
    [
        {"mask": np.ones((1, 1, LENGTH, LENGTH), "bool")},
        {"sliding_window": 3},
        {"return_scores": True},
        {"form": "whole"},
        {"query_start": 1},
        {"key_grid": (1, LENGTH), "query_grid": (1, LENGTH), "is_causal": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_limits_queries_otherwise_takes_a_call_for_each_scale(taken, options):
    options = {"is_causal": True, "key_mask": KEY_MASKS["behind"], **options}
    ops.attention(*arrays(LENGTH, batch=2), SCALED, **options)
    assert not taken


class EveryOther(training_sets.AllKeys):
    """A user's training set, of which `select` alone is another."""

    def select(self, keys, queries):
        return keys

    def has_causal_form(self, num_axes):
        return True


class ScaledEveryOther(ScaledHeads):
    """Scaled heads, but for those of the first scale."""

    def groups(self, num_heads):
        (first, _), *others = super().groups(num_heads)
        return [(first, EveryOther()), *others]


class Shifted(transforms.Transform):
    """A user's transform."""

    def apply(self, x, statistics, weights):
        return x + 1.0


class OwnBatchNorm(BatchNorm):
    """A user's statistics."""


class Sharper(feature_maps.Softmax):
    """A user's kernel."""

    def attend(self, query, *others):
        return super().attend(2 * query, *others)


@pytest.mark.parametrize(
    "primal",
    [
        Primal(training_set=ScaledEveryOther((1, 2))),
        Primal(transform=Shifted(), training_set=ScaledHeads((1, 2))),
        Primal(transform=OwnBatchNorm(), training_set=ScaledHeads((1, 2))),
        Primal(feature_map=Sharper(), training_set=ScaledHeads((1, 2))),
    ],
    ids=["training set", "transform", "statistics", "kernel"],
)
def test_members_of_users_get_what_they_know(taken, primal):
    ops.attention(*arrays(LENGTH), primal, is_causal=True)
    assert not taken


def test_the_choice():
    """On torch, run eagerly, for few pairs; means alone are taken scale by scale."""
    is_torch = backends.BACKEND == "torch"

    def are_faster(
        length,
        is_causal,
        key_length=None,
        scales=(1, 2, 4, 8),
        dtype="float32",
        has_dropout=False,
    ):
        key_length = key_length or length
        query, key = (keras.ops.zeros((1, n, 8, 4), dtype) for n in (length, key_length))
        key_mask = None if is_causal else keras.ops.ones((1, key_length), dtype="bool")
        keys = Examples.keys(key, key, length, is_causal, mask=key_mask)
        return running_means.are_faster(query, keys, scales, has_dropout)

    for is_causal in (False, True):
        assert are_faster(64, is_causal) == is_torch
        assert are_faster(64, is_causal, has_dropout=True) == is_torch
        assert are_faster(250, is_causal) == is_torch
        assert not are_faster(250, is_causal, has_dropout=True)
        assert not are_faster(250, is_causal, dtype="float64")
        assert not are_faster(512, is_causal)
    assert are_faster(65, False, key_length=64) == is_torch
    assert not are_faster(1, False, key_length=65536)
    # Spans of whole windows of all scales, which sums are products with.
    assert not are_faster(8, False, key_length=1024, scales=(5, 7, 9, 16))
    assert are_faster(8, False, key_length=1024, scales=(5, 15)) == is_torch
    key = keras.ops.zeros((1, 64, 8, 4))
    keys = Examples.keys(key, key, 64)
    assert not running_means.are_faster(key, keys, (1, 2), False)


def test_what_can_not_be_as_good():
    """Other numbers of causal queries; not float16, in which what is hidden stays so."""

    def are_as_good(length, is_causal, dtype="float32"):
        query, key = (keras.ops.zeros((1, n, 2, 4), dtype) for n in (length, 8))
        return running_means.are_as_good(query, Examples.keys(key, key, length, is_causal))

    assert are_as_good(8, True) and are_as_good(8, True, "float16") and are_as_good(9, False)
    assert are_as_good(8, False, "float16")
    assert not are_as_good(9, True)


@pytest.mark.skipif(backends.BACKEND != "torch", reason="torch rounds products if told to")
def test_products_that_are_rounded_are_not_taken(taken):
    import torch

    inputs = [keras.ops.convert_to_tensor(x) for x in arrays(LENGTH)]
    with torch.autocast("cpu", torch.bfloat16):
        ops.attention(*inputs, NORMALISED, is_causal=True)
    try:
        torch.set_float32_matmul_precision("high")
        ops.attention(*inputs, NORMALISED, is_causal=True)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not taken
    ops.attention(*inputs, NORMALISED, is_causal=True)
    assert taken


@pytest.mark.parametrize("key_mask", [KEY_MASKS["nothing"], KEY_MASKS["in front"]], ids=str)
@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e30), ("float16", 5e4)])
def test_nothing_leaks_however_large(taken, dtype, size, key_mask):
    """Scores beyond any number that might hide them, of keys to come."""
    query, key, value = arrays(LENGTH, batch=2)
    outputs = []
    for change in (0.0, 50.0):
        key[:, 8:], value[:, 8:] = size, change
        tensors = (
            keras.ops.cast(keras.ops.convert_to_tensor(x), dtype) for x in (query, key, value)
        )
        output = ops.attention(*tensors, SCALED, is_causal=True, key_mask=key_mask)
        outputs.append(backends.to_numpy(output))
    assert taken
    np.testing.assert_array_equal(outputs[0][:, :8], outputs[1][:, :8])
    assert np.isfinite(outputs[0]).all()


def test_a_window_of_any_size(taken):
    """One longer than the sequence is none that ends, be it of more keys than an integer holds."""
    outputs = []
    for size in (LENGTH + 1, 2**40):
        primal = Primal(training_set=ScaledHeads((1, size)))
        outputs.append(backends.to_numpy(ops.attention(*arrays(LENGTH), primal, is_causal=True)))
    np.testing.assert_array_equal(*outputs)
    assert taken


@pytest.mark.skipif(backends.BACKEND != "torch", reason="the others compile what they run")
def test_the_kernel_takes_all_heads(monkeypatch):
    """One call of it, which writes down no weights, with a mask for each head.

    Some kernels make NaN of a query that sees nothing at all.
    """
    masks, attend = [], fused.native.softmax_attention

    def record(query, key, value, mask, *others):
        masks.append(tuple(mask.shape))
        if mask.dtype.is_floating_point:
            assert (mask == 0).any(dim=-1).all()
        return attend(query, key, value, mask, *others)

    monkeypatch.setattr(fused.native, "softmax_attention", record)
    inputs = arrays(LENGTH, heads=3, batch=2)
    ops.attention(*inputs, NORMALISED, is_causal=True)
    ops.attention(*inputs, NORMALISED, is_causal=True, key_mask=KEY_MASKS["everything"])
    ops.attention(*inputs, NORMALISED, key_mask=KEY_MASKS["holes"])
    assert masks == [(1, 3, LENGTH, LENGTH), (2, 3, LENGTH, LENGTH), (2, 3, 1, LENGTH)]
