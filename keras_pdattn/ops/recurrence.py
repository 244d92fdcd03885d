"""Causal attention of a finite feature map that goes on from a state, some tokens at a time.

The state of a head is the weight matrix W of the keys so far and the sum of their features,
so it stays as large as it is however many there are.
"""

from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.dtypes import cast, nothing, widen
from keras_pdattn.ops.examples import Examples
from keras_pdattn.ops.indexing import append_axes, zero_where_masked
from keras_pdattn.ops.kernels import share
from keras_pdattn.ops.states import causal_sums


def state_shapes(feature_map, weights, num_heads, depth, value_depth):
    """Shapes, less the batch axis, of the state of no keys.

    Args:
        feature_map: a finite `FeatureMap`.
        weights: those of the feature map.
        num_heads: the number of heads H.
        depth: that of keys.
        value_depth: that of values, Dv.

    Returns:
        Dict with `"state"`, `(H, F, Dv)`, `"normalizer"`, `(H, F)`, and, for features beyond
        the range of floats, `"log_scale"`, `(H,)`, the logarithm of the factor left off both.
    """
    features, log_scale = feature_map.key_features(ops.zeros((1, 1, num_heads, depth)), weights)
    num_features = features.shape[-1]
    shapes = {
        "state": (num_heads, num_features, value_depth),
        "normalizer": (num_heads, num_features),
    }
    if log_scale is not None:
        shapes["log_scale"] = (num_heads,)
    return shapes


def recurrent_attention(query, key, value, state, feature_map, weights, key_mask=None):
    """Attention of some tokens to these, causally, and to all tokens of a state.

    Args:
        query: `(B, T, H, D)`.
        key: `(B, T, H, D)`.
        value: `(B, T, H, Dv)`.
        state: dict of tensors as `state_shapes` says, with a batch axis in front.
        feature_map: a finite `FeatureMap`.
        weights: those of the feature map.
        key_mask: boolean `(B, T)`, False for tokens that are padding; or `None`.

    Returns:
        The output, `(B, T, H, Dv)`, and the state with these tokens.
    """
    dtype, value = value.dtype, widen(zero_where_masked(value, key_mask))
    query = feature_map.query_features(widen(query), weights)
    key, log_scale = feature_map.key_features(widen(zero_where_masked(key, key_mask)), weights)
    key = zero_where_masked(key, key_mask)
    if log_scale is not None and key_mask is not None:
        log_scale = ops.where(append_axes(key_mask, 1), log_scale, nothing())
    after = _add(state, key, value, log_scale)
    if query.shape[1] == 1:
        output, total, _ = _read(query, after)
    else:
        examples = Examples.keys(key, value, ops.shape(query)[1], is_causal=True)
        sums, log_factor = causal_sums(query, key, value, log_scale, examples)
        here = sums[..., :-1], sums[..., -1], log_factor
        output, total = _together(here, _read(query, state))
    return cast(share(output, append_axes(total, 1)), dtype), after


def _read(query, state):
    """What queries `(B, T, H, F)` find in a state: sums, totals and `log_scale`."""
    sums = ops.einsum("bthf,bhfd->bthd", query, state["state"])
    totals = ops.einsum("bthf,bhf->bth", query, state["normalizer"])
    log_scale = state.get("log_scale")
    return sums, totals, None if log_scale is None else ops.expand_dims(log_scale, axis=1)


def _together(first, second):
    """Adds sums and totals that have different factors left off."""
    (sums, totals, log_factor), (more_sums, more_totals, other) = first, second
    if log_factor is None:
        return sums + more_sums, totals + more_totals
    largest = ops.maximum(log_factor, other)
    here, there = ops.exp(log_factor - largest), ops.exp(other - largest)
    sums = sums * append_axes(here, 1) + more_sums * append_axes(there, 1)
    return sums, totals * here + more_totals * there


def _add(state, key, value, log_scale):
    """The state with more keys."""
    kept = None
    if log_scale is not None:
        largest = ops.maximum(state["log_scale"], native.largest(log_scale, axis=1))
        kept = ops.exp(state["log_scale"] - largest)
        key = key * append_axes(ops.exp(log_scale - ops.expand_dims(largest, axis=1)), 1)
    added = {
        "state": ops.einsum("bthf,bthd->bhfd", key, value),
        "normalizer": ops.sum(key, axis=1),
    }
    after = {}
    for name, more in added.items():
        before = cast(state[name], more.dtype)
        if kept is not None:
            before = before * append_axes(kept, len(more.shape) - 2)
        after[name] = cast(before + more, state[name].dtype)
    if kept is not None:
        after["log_scale"] = cast(largest, state["log_scale"].dtype)
    return after
