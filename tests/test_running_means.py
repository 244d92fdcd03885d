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

    monkeypatch.setattr(running_means, "are_faster", lambda query, keys: True)
    monkeypatch.setattr(training_sets, "running_examples", record)
    return calls


def one_call_and_many(monkeypatch, primal, inputs, **options):
    """Output and gradients in one call, and in one for each scale."""
    one = value_and_gradients(primal, inputs, **options)
    with monkeypatch.context() as patch:
        patch.setattr(running_means, "are_faster", lambda query, keys: False)
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
    monkeypatch.setattr(running_means, "are_faster", lambda query, keys: False)
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


class Sharper(feature_maps.Softmax):
    """A user's kernel."""

    def attend(self, query, *others):
        return super().attend(2 * query, *others)


def test_members_of_users(monkeypatch, taken):
    """Their training sets and transforms are asked as before, their kernels get what they see."""
    for primal in (
        Primal(training_set=ScaledEveryOther((1, 2))),
        Primal(transform=Shifted(), training_set=ScaledHeads((1, 2))),
    ):
        ops.attention(*arrays(LENGTH), primal, is_causal=True)
    assert not taken
    primal = Primal(feature_map=Sharper(), training_set=SCALED.training_set)
    many = one_call_and_many(monkeypatch, primal, arrays(LENGTH), is_causal=True)
    check_same(*many, tolerance=2e-5)
    assert taken


def test_the_choice():
    """On torch, run eagerly, for few pairs; means alone are taken scale by scale."""

    def are_faster(length, is_causal, key_mask=None, key_length=None):
        query = keras.ops.zeros((1, length, 8, 4))
        key = keras.ops.zeros((1, key_length or length, 8, 4))
        keys = Examples.keys(key, key, length, is_causal, mask=key_mask)
        return running_means.are_faster(query, keys)

    is_torch = backends.BACKEND == "torch"
    padding = keras.ops.ones((1, 64), dtype="bool")
    assert are_faster(64, is_causal=True) == is_torch
    assert are_faster(64, is_causal=False, key_mask=padding) == is_torch
    assert not are_faster(64, is_causal=False)
    assert not are_faster(64, is_causal=True, key_length=65)
    assert are_faster(65, is_causal=False, key_mask=padding, key_length=64) == is_torch
    assert not are_faster(4096, is_causal=True)
    assert are_faster(256, is_causal=True) == is_torch
    padding = keras.ops.ones((1, 512), dtype="bool")
    assert not are_faster(512, is_causal=False, key_mask=padding)


@pytest.mark.skipif(backends.BACKEND != "torch", reason="the others compile what they run")
def test_the_kernel_takes_all_heads(monkeypatch):
    """One call of it, which writes down no weights, with a mask for each head."""
    masks, attend = [], fused.native.softmax_attention

    def record(query, key, value, mask, *others):
        masks.append(tuple(mask.shape))
        return attend(query, key, value, mask, *others)

    monkeypatch.setattr(fused.native, "softmax_attention", record)
    inputs = arrays(LENGTH, heads=3, batch=2)
    ops.attention(*inputs, NORMALISED, is_causal=True)
    ops.attention(*inputs, NORMALISED, is_causal=True, key_mask=KEY_MASKS["holes"])
    ops.attention(*inputs, NORMALISED, key_mask=KEY_MASKS["holes"])
    assert masks == [(1, 3, LENGTH, LENGTH), (2, 3, LENGTH, LENGTH), (2, 3, 1, LENGTH)]
