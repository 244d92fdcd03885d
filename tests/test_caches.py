"""Law 8: tokens that come one after the other give what they give together."""

import dataclasses
import functools
import itertools

import backends
import keras
import numpy as np
import pytest
from keras import ops as keras_ops
from members import (
    FEW,
    MEMBERS,
    PAIRS,
    RANDOM,
    SEQUENCE_MEMBERS,
    every_member_compiled,
    few_where_compiled,
)
from test_layers import values

from keras_pdattn import Primal, layers, training_sets, transforms
from keras_pdattn.layers import caches

LENGTH = 7
X = np.random.default_rng(0).normal(size=(3, LENGTH, 12)).astype("float32")
#: No padding; two tokens of it in front, and one between; two behind.
MASK = np.ones((3, LENGTH), "bool")
MASK[1, [0, 1, 4]] = False
MASK[2, 5:] = False

#: Those of every run; compilers take seconds for each.
SOME = FEW
if backends.BACKEND == "torch":
    SOME = list(dict.fromkeys(MEMBERS + [one for one in PAIRS if one.num_axes == 1]))


class LooksBackAtAll(transforms.Conv1D):
    """A user's convolution that does not say how far back it looks."""

    look_back = None


def layer_of(member, **arguments):
    layer = layers.PrimalDualAttention(4, 6, primal=member.primal, **arguments)
    layer.build(X.shape, X.shape)
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=w.shape) / 3 for w in layer.weights if "/primal/" not in w.path]
    weights += [w for one in member.weights(4, 6) for w in one.values()]
    layer.set_weights(weights)
    return layer


def members_and_caches():
    """Every member with the cache it makes, and with one by position where that is another."""
    for member in SEQUENCE_MEMBERS:
        kinds = (
            ["least"]
            if type(caches.least(layer_of(member), LENGTH)) is caches.KeyValueCache
            else ["least", "by position"]
        )
        for kind in kinds:
            marks = [] if member in SOME else pytest.mark.slow
            yield pytest.param(member, kind, marks=marks, id=f"{member}-{kind}")


def stepper(layer):
    """A call with a cache as a function of tensors, compiled once for all indices."""

    def step(x, cache, index, mask=None):
        return layer(
            x, x, value_mask=mask, use_causal_mask=True, cache=cache, cache_update_index=index
        )

    return backends.jitted(step)


def prefilled(layer, cache, count, mask=None):
    if not count:
        return np.zeros((3, 0, 12)), cache
    prefill_of = functools.partial(
        layer, use_causal_mask=True, value_mask=mask, cache_update_index=0
    )
    prefill = backends.jitted(lambda x, cache: prefill_of(x, x, cache=cache))
    output, cache = prefill(X[:, :count], cache)
    return values(output), cache


def decoded(layer, step, cache, count, mask=None):
    """Outputs of `count` tokens at once and the others one by one."""
    output, cache = prefilled(layer, cache, count, mask)
    outputs = [output]
    for index in range(count, LENGTH):
        position = keras_ops.convert_to_tensor(index, dtype="int32")
        output, cache = step(X[:, index : index + 1], cache, position, mask)
        outputs.append(values(output))
    return np.concatenate(outputs, axis=1)


def cache_by_position(layer):
    return caches.by_position(layer).zeros(layer, 3, LENGTH, "float32")


def rounding(layer):
    """What outputs move by when inputs are rounded once: prefixes may have hardly any spread."""
    moved = X * (1 + np.finfo("float32").eps * np.random.default_rng(2).choice([-1, 1], X.shape))
    moved = moved.astype("float32")
    solve = backends.jitted(lambda x: layer(x, x, value_mask=MASK, use_causal_mask=True))
    full = [values(solve(x)) for x in (X, moved)]
    return 4 * np.abs(full[1] - full[0])[MASK].max()


@pytest.mark.parametrize(("member", "kind"), members_and_caches())
def test_steps_give_what_the_whole_sequence_does(member, kind):
    layer = layer_of(member)
    step = stepper(layer)
    cache = layer.init_cache(3, LENGTH) if kind == "least" else cache_by_position(layer)
    atol = 2e-5 + rounding(layer)
    for mask in (None, MASK):
        solve = functools.partial(layer, value_mask=mask, use_causal_mask=True)
        full = values(backends.jitted(lambda x, solve=solve: solve(x, x))(X))
        valid = np.ones_like(MASK) if mask is None else mask
        for count in range(LENGTH + 1) if backends.BACKEND == "torch" else (0, 4):
            output = decoded(layer, step, cache, count, mask)
            np.testing.assert_allclose(output[valid], full[valid], rtol=0, atol=atol)


CHAINS = {
    "bn-conv5": ("batch_norm", transforms.Conv1D(5)),
    "mean-conv5": (transforms.BatchNorm(scale=False), transforms.Conv1D(5)),
    "conv-conv": ("conv1d", "conv1d"),
    "conv5-bn-conv": (transforms.Conv1D(5), "batch_norm", "conv1d"),
    "conv5": (transforms.Conv1D(5),),
    "all before": ("batch_norm", LooksBackAtAll()),
}


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
@few_where_compiled("transform", CHAINS, ["mean-conv5", "conv-conv"])
def test_convolutions_behind_what_moves_zero(transform, mask, count):
    """Queries in front of the first, and padded ones, are zero behind every transform."""
    layer = layers.PrimalDualAttention(4, 6, primal=Primal(transform=transform))
    layer.build(X.shape, X.shape)
    rng = np.random.default_rng(1)
    layer.set_weights([rng.normal(size=w.shape) / 2 for w in layer.weights])

    def solve(x, query_mask, cache=None, index=None):
        return layer(
            x,
            x,
            query_mask=query_mask,
            value_mask=mask,
            use_causal_mask=True,
            cache=cache,
            cache_update_index=index,
        )

    solve = backends.jitted(solve)
    full, outputs, cache = values(solve(X, mask)), [], layer.init_cache(3, LENGTH)
    for start, stop in itertools.pairwise([0, *range(max(count, 1), LENGTH + 1)]):
        query_mask = None if mask is None else mask[:, start:stop]
        index = keras_ops.convert_to_tensor(start, dtype="int32")
        output, cache = solve(X[:, start:stop], query_mask, cache, index)
        outputs.append(values(output))
    # Of one or two keys with hardly any spread, rounding moves more.
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), full, rtol=0, atol=1e-3)


@pytest.mark.parametrize("index", [3, "tensor"] if backends.BACKEND == "torch" else ["tensor"])
@every_member_compiled
def test_several_tokens_may_come_at_once(member, index):
    layer = layer_of(member)
    attend = functools.partial(layer, use_causal_mask=True)
    full = values(backends.jitted(attend)(X, X, value_mask=MASK))
    for cache in (layer.init_cache(3, LENGTH), cache_by_position(layer)):
        _, cache = prefilled(layer, cache, 3, MASK)
        position = keras_ops.convert_to_tensor(3, dtype="int32") if index == "tensor" else index
        output, _ = stepper(layer)(X[:, 3:], cache, position, MASK)
        valid = MASK[:, 3:]
        atol = 2e-5 + rounding(layer)
        np.testing.assert_allclose(values(output)[valid], full[:, 3:][valid], rtol=0, atol=atol)


@every_member_compiled
def test_scores_and_attention_masks_are_those_of_all_positions(member):
    layer = layer_of(member)
    mask = np.random.default_rng(3).random((3, LENGTH, LENGTH)) < 0.7

    def solve(x, mask, query_mask, cache=None, index=None):
        return layer(
            x,
            x,
            attention_mask=mask,
            query_mask=query_mask,
            use_causal_mask=True,
            return_attention_scores=True,
            cache=cache,
            cache_update_index=index,
        )

    full, full_scores = (values(x) for x in backends.jitted(solve)(X, mask, MASK))
    cache, atol = cache_by_position(layer), 2e-5 + rounding(layer)
    for start, stop in ((0, 3), (3, 7)):
        some = slice(start, stop)
        step = backends.jitted(functools.partial(solve, index=start))
        output, scores, cache = step(X[:, some], mask[:, some], MASK[:, some], cache)
        np.testing.assert_allclose(values(output), full[:, some], rtol=0, atol=atol)
        np.testing.assert_allclose(values(scores), full_scores[:, :, some], rtol=0, atol=atol)


@every_member_compiled
def test_a_cache_that_is_not_updated_stands_for_the_values(member):
    layer = layer_of(member)
    query = X[:, :2] + 1
    call = backends.jitted(layer)
    expected = call(query, X, value_mask=MASK)
    _, cache = prefilled(layer, cache_by_position(layer), LENGTH)
    output, after = call(query, X * 0, value_mask=MASK, cache=cache)
    np.testing.assert_allclose(values(output), values(expected), rtol=0, atol=1e-5)
    assert keras.tree.map_structure(lambda x: x.shape, after) == keras.tree.map_structure(
        lambda x: x.shape, cache
    )


def test_without_causality_what_is_not_filled_is_not_seen():
    layer = layer_of(next(one for one in MEMBERS if str(one) == "softmax-bn"))
    for index in (2, keras_ops.convert_to_tensor(2)):
        _, cache = layer(X[:, :2], X[:, :2], cache=layer.init_cache(3, 9), cache_update_index=0)
        output, _ = layer(X[:, 2:4], X[:, 2:4], cache=cache, cache_update_index=index)
        expected = layer(X[:, 2:4], X[:, :4])
        np.testing.assert_allclose(values(output), values(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("primal", "structure"),
    [
        ("softmax", (2, 2, 64, 4, 6)),
        ("batch_norm", (2, 2, 64, 4, 6)),
        ("conv1d", (2, 3, 64, 4, 6)),
        (
            Primal(training_set=training_sets.SlidingWindow(5, dilation=2)),
            {"key": (2, 10, 4, 6), "value": (2, 10, 4, 6), "valid": (2, 10)},
        ),
        ("sliding_window", (2, 2, 64, 4, 6)),  # The window is as long as the cache.
        ("linear", {"state": (2, 4, 6, 6), "normalizer": (2, 4, 6)}),
        (
            Primal(RANDOM),
            {"state": (2, 4, 6, 6), "normalizer": (2, 4, 6), "log_scale": (2, 4)},
        ),
    ],
    ids=str,
)
def test_each_member_keeps_what_it_needs(primal, structure):
    layer = layers.PrimalDualAttention(4, 6, primal=primal, dtype="mixed_bfloat16")
    layer.build(X.shape, X.shape)
    cache = layer.init_cache(batch_size=2, max_length=64)
    assert caches._shapes(cache) == structure
    dtypes = {keras.backend.standardize_dtype(x.dtype) for x in keras.tree.flatten(cache)}
    assert dtypes - {"bool"} == {"float32" if "state" in structure else "bfloat16"}
    x = keras_ops.ones((2, 1, 12))
    _, after = layer(x, x, use_causal_mask=True, cache=cache, cache_update_index=0)
    like = [
        keras.tree.map_structure(lambda x: (tuple(x.shape), str(x.dtype)), one)
        for one in (cache, after)
    ]
    assert like[0] == like[1]


def test_values_may_have_another_depth():
    layer = layers.BatchNormAttention(4, 6, value_dim=3)
    layer.build(X.shape, X.shape)
    cache = layer.init_cache(3, LENGTH)
    assert caches._shapes(cache) == {"key": (3, 7, 4, 6), "value": (3, 7, 4, 3)}
    full = values(layer(X, X, use_causal_mask=True))
    output = decoded(layer, stepper(layer), cache, 2)
    np.testing.assert_allclose(output, full, rtol=0, atol=2e-5)


@every_member_compiled
def test_a_mask_may_be_of_the_new_tokens_alone(member):
    """Where those before them were not padding."""
    layer, mask = layer_of(member), MASK.copy()
    mask[:, :3] = True
    mask[1, 4] = False
    solve = backends.jitted(lambda x: layer(x, x, value_mask=mask, use_causal_mask=True))
    full, valid, atol = values(solve(X)), mask[:, 3:], 2e-5 + rounding(layer)
    for cache in (layer.init_cache(3, LENGTH), cache_by_position(layer)):
        _, cache = prefilled(layer, cache, 3)
        position = keras_ops.convert_to_tensor(3, dtype="int32")
        output, _ = stepper(layer)(X[:, 3:], cache, position, valid)
        np.testing.assert_allclose(values(output)[valid], full[:, 3:][valid], rtol=0, atol=atol)


@pytest.mark.parametrize(
    "primal",
    [
        Primal(training_set=training_sets.SlidingWindow(4)),
        "batch_norm",
        "conv1d",
        "linear",
        Primal(RANDOM),
    ],
    ids=["ring", "by position", "queries", "state", "scaled state"],
)
def test_what_another_sequence_left_in_a_cache_is_not_seen(primal):
    layer = layers.PrimalDualAttention(4, 6, primal=primal)
    layer.build(X.shape, X.shape)
    step, cache = stepper(layer), layer.init_cache(3, LENGTH)
    expected = decoded(layer, step, cache, 0)
    for index in range(LENGTH):
        position = keras_ops.convert_to_tensor(index, dtype="int32")
        _, cache = step(X[:, index : index + 1] + 1, cache, position)
    output = decoded(layer, step, cache, 0)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "dilation"), [(4, 1), (3, 2)])
def test_a_ring_goes_round_many_times(size, dilation):
    layer = layers.SlidingWindowAttention(4, 6, size=size, dilation=dilation)
    layer.build(X.shape, X.shape)
    x = np.concatenate([X, X + 1, X - 1], axis=1)
    full, cache = values(layer(x, x, use_causal_mask=True)), layer.init_cache(3, 21)
    assert cache["key"].shape[1] == size * dilation
    start = 0
    for count in (5, 1, 1, 3, 1, 8, 2):
        new = x[:, start : start + count]
        output, cache = layer(new, new, use_causal_mask=True, cache=cache, cache_update_index=start)
        expected = full[:, start : start + count]
        np.testing.assert_allclose(values(output), expected, rtol=0, atol=1e-5)
        start += count


@every_member_compiled
def test_symbolic_calls_have_the_same_structure(member):
    layer = layer_of(member)
    cache = layer.init_cache(3, LENGTH)
    symbolic = keras.tree.map_structure(
        lambda x: keras.KerasTensor(x.shape, keras.backend.standardize_dtype(x.dtype)), cache
    )
    x = keras.KerasTensor((3, 1, 12))
    index = keras.KerasTensor((), dtype="int32")
    options = {"use_causal_mask": True}
    spec = layer(x, x, cache=symbolic, cache_update_index=index, **options)
    result = layer(X[:, :1], X[:, :1], cache=cache, cache_update_index=0, **options)
    describe = functools.partial(keras.tree.map_structure, lambda x: tuple(x.shape))
    assert describe(spec) == describe(result)


def error_of(layer, **arguments):
    with pytest.raises(ValueError) as error:
        layer(X[:, :2], X[:, :2], **arguments)
    assert "Received: " in str(error.value)
    return str(error.value)


def test_wrong_calls_are_refused():
    layer = layer_of(MEMBERS[0])
    cache = layer.init_cache(3, LENGTH)
    causal = {"use_causal_mask": True}
    assert "place in a `cache`" in error_of(layer, cache_update_index=1)
    assert "room for 7 tokens" in error_of(layer, cache=cache, cache_update_index=6, **causal)
    assert "integer" in error_of(layer, cache=cache, cache_update_index=1.5, **causal)
    assert "non-negative" in error_of(layer, cache=cache, cache_update_index=-1, **causal)
    assert "must have the shapes" in error_of(layer, cache=cache[:, :, :, :2], cache_update_index=0)
    wrong = np.ones((3, 5), "bool")
    assert "value_mask" in error_of(layer, cache=cache, cache_update_index=0, value_mask=wrong)
    linear = layers.LinearAttention(4, 6)
    linear.build(X.shape, X.shape)
    state = linear.init_cache(3, LENGTH)
    assert "use_causal_mask" in error_of(linear, cache=state, cache_update_index=0)
    assert "attention scores" in error_of(
        linear, cache=state, cache_update_index=0, return_attention_scores=True, **causal
    )
    with pytest.raises(ValueError, match="must have the shapes"):
        layer(X, X, cache=state, cache_update_index=0, **causal)
    with pytest.raises(ValueError, match="built"):
        layers.LinearAttention(4, 6).init_cache(3, LENGTH)
    assert "room for 3 tokens" in error_of(
        linear, cache=state, cache_update_index=2, value_mask=MASK[:, :3], **causal
    )
    other = layer.init_cache(1, LENGTH)
    assert "must have the shapes" in error_of(layer, cache=other, cache_update_index=0, **causal)
    with pytest.raises(ValueError, match="query for each new key"):
        layer(X[:, :1], X, cache=cache, cache_update_index=0, **causal)


@keras.saving.register_keras_serializable(package="test_caches")
class Even(training_sets.AllKeys):
    """Keys at even positions: all that the class it comes from knows of is not all there is."""

    def select(self, keys, queries):
        even = keras_ops.arange(keras_ops.shape(keys.key)[1]) % 2 == 0
        mask = keras_ops.broadcast_to(even, keras_ops.shape(keys.key)[:2])
        if keys.mask is not None:
            mask = keras_ops.logical_and(mask, keys.mask)
        return dataclasses.replace(keys, mask=mask)


def test_a_training_set_of_ones_own_is_kept_by_position():
    layer = layers.PrimalDualAttention(4, 6, primal=Primal("elu", training_set=Even()))
    layer.build(X.shape, X.shape)
    full = values(layer(X, X, use_causal_mask=True))
    output = decoded(layer, stepper(layer), layer.init_cache(3, LENGTH), 3)
    np.testing.assert_allclose(output, full, rtol=0, atol=1e-5)


def test_a_state_drops_outputs_and_hides_padded_queries():
    layer = layers.LinearAttention(4, 6, dropout=0.5)
    layer.build(X.shape, X.shape)
    options = {"cache": layer.init_cache(3, LENGTH), "cache_update_index": 0}
    options["use_causal_mask"] = True
    one, other = (values(layer(X, X, training=True, **options)[0]) for _ in range(2))
    assert np.abs(one - other).max() > 1e-2
    output, _ = layer(X, X, query_mask=MASK, **options)
    expected = layer(X, X, query_mask=MASK, use_causal_mask=True)
    np.testing.assert_allclose(values(output), values(expected), rtol=0, atol=1e-5)


def test_float64_and_indices_of_all_kinds():
    with backends.float64():
        x = keras_ops.convert_to_tensor(X.astype("float64"))
        for primal in ("linear", Primal(RANDOM), "conv1d"):
            layer = layers.PrimalDualAttention(4, 6, primal=primal, dtype="float64")
            layer.build(X.shape, X.shape)
            full = values(layer(x, x, use_causal_mask=True))
            cache, outputs = layer.init_cache(3, LENGTH), []
            for index in range(LENGTH):
                kind = (int, np.int64, np.uint8)[index % 3]
                token = x[:, index : index + 1]
                output, cache = layer(
                    token, token, use_causal_mask=True, cache=cache, cache_update_index=kind(index)
                )
                outputs.append(values(output))
            np.testing.assert_allclose(np.concatenate(outputs, 1), full, rtol=0, atol=1e-12)


def test_a_cache_by_position_among_arguments_keeps_its_dtype():
    block = layers.TransformerDecoder(16, 4, primal="linear", dtype="mixed_bfloat16")
    block.build(X.shape)
    cache = block.init_cache(3, LENGTH)
    nothing = 5 * [None]
    _, after = block(X, *nothing, cache, self_attention_cache_update_index=0)
    assert {keras.backend.standardize_dtype(x.dtype) for x in after.values()} == {"float32"}


def test_a_grid_is_filled_position_by_position():
    layer = layers.Conv2DAttention(4, 6, kernel_size=3, grid=(2, 3), class_tokens=1)
    layer.build(X.shape, X.shape)
    rng = np.random.default_rng(1)
    layer.set_weights([rng.normal(size=w.shape) / 3 for w in layer.get_weights()])
    full = values(layer(X, X, use_causal_mask=True))
    for count in (0, 3):
        output = decoded(layer, stepper(layer), layer.init_cache(3, LENGTH), count)
        np.testing.assert_allclose(output, full, rtol=0, atol=2e-5)


@pytest.mark.parametrize("primal", ["linear", Primal(RANDOM)], ids=["state", "scaled state"])
def test_several_tokens_go_on_from_a_state(primal):
    """Of keys whose features differ by orders of magnitude."""
    layer = layers.PrimalDualAttention(4, 6, primal=primal)
    layer.build(X.shape, X.shape)
    x = X * np.array([1, 4, 1, 0.2, 3, 1, 5], "float32")[:, np.newaxis]
    full, cache = values(layer(x, x, use_causal_mask=True)), layer.init_cache(3, LENGTH)
    for start, stop in ((0, 2), (2, 5), (5, 7)):
        new = x[:, start:stop]
        options = {"cache": cache, "cache_update_index": start, "use_causal_mask": True}
        output, cache = layer(new, new, **options)
        np.testing.assert_allclose(values(output), full[:, start:stop], rtol=0, atol=2e-5)
