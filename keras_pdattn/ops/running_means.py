"""Scaled heads of all scales in one call, fitted on the running means of their windows.

At each key stands the mean of its window up to there. A causal query sees the one at its place,
and those before that end a window, which are the windows' means; any other query sees all that
end a window. So heads of all scales have as many examples as there are keys, of which a mask
hides some: more products than theirs are, in far fewer operations.
"""

import math

from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.dtypes import accumulator, cast, is_double
from keras_pdattn.ops.examples import Examples, OwnExample
from keras_pdattn.ops.indexing import (
    append,
    append_axes,
    first_valid,
    fit_axis,
    join_axes,
    overlapping,
    swap_heads_and_time,
    zero_where_masked,
)

#: Up to how many pairs of a query and a key, those of all heads and sequences, one call is faster
#: on a CPU: of causal queries; of others, for which windows take fewer operations; and where no
#: kernel takes them, but all weights are written down.
MOST_CAUSAL_PAIRS, MOST_PAIRS, MOST_WEIGHTS = 2**20, 2**19, 2**18
#: How many times as many there may be on a GPU, which waits longer for an operation: a mask with
#: a number for each pair of a head is held for the backward pass.
TIMES_ON_GPU = 8


def are_as_good(query, keys):
    """Whether running means give such queries what a call for each scale does, on torch."""
    fits = query.shape[1] == keys.key.shape[1] or not keys.is_causal
    return fits and native.has_exact_sums(query)


def are_faster(query, keys, scales, has_dropout):
    """Whether one call, of few operations on all pairs, is faster than one for each scale.

    It is where torch starts operations one by one, for few pairs, unless all that a window takes
    is a mean.
    """
    if not native.is_eager_torch() or not (keys.is_causal or keys.mask is not None):
        return False
    batch, length, num_heads, _ = query.shape
    num_keys = keys.key.shape[1]
    most = MOST_CAUSAL_PAIRS if keys.is_causal else MOST_PAIRS
    if has_dropout or is_double(query.dtype):
        most = MOST_WEIGHTS
    most *= TIMES_ON_GPU if query.is_cuda else 1
    _, reach = _span_and_reach(scales, num_keys, keys.mask is not None)
    return batch * num_heads * num_keys * max(length, reach) <= most


def running_examples(keys, scales):
    """The running means of windows of keys and values, one at each key.

    Args:
        keys: `Examples` that are the keys themselves, on one axis, as many as queries if causal.
        scales: the scale of each head.

    Returns:
        `Examples` whose `mask`, one for each head, leaves those that end a window; if causal,
        with the one at its place for each query's own. Keys that await a transform are in the
        wider dtype of sums.
    """
    length, depth = keys.key.shape[1], keys.key.shape[3]
    # A window that does not end within the sequence may as well be that long.
    scales = [min(scale, length + 1) for scale in scales]
    start = None if keys.mask is None else first_valid(keys.mask)
    step, scale = ops.arange(length, dtype="int32"), native.integers(scales, keys.key)
    place = _places(step, start, scale)
    span, reach = _span_and_reach(scales, length, start is not None)
    member = _members(place[..., :span, :], reach, accumulator(keys.key.dtype))
    vectors = native.concatenate([keys.key, keys.value], axis=3)
    if start is None:
        means, some = _sums(member / ops.sum(member, axis=2, keepdims=True), vectors), None
    else:
        # A feature more, to count keys with.
        valid = append_axes(cast(keys.mask, vectors.dtype), 2)
        vectors = append(zero_where_masked(vectors, keys.mask), valid, axis=3)
        sums = _sums(member, vectors)
        means, count = native.split(sums, [sums.shape[3] - 1, 1], axis=3)
        means, some = means / native.at_least(count, 1), count[..., 0] > 0
    key, value = native.split(means, [depth, means.shape[3] - depth], axis=3)
    key = key if keys.awaits_transform else cast(key, keys.key.dtype)
    value = cast(value, keys.value.dtype)
    ends = place == scale - 1
    if keys.is_causal:
        order = {
            "limit": keys.limit - 1,
            "start": start,
            "own": OwnExample(key, value, some),
            "has_running_means": True,
            "origin": _first_ends(start, scale, length),
        }
    else:
        order, ends = {"is_prefix": keys.is_prefix}, ends | append_axes(step == length - 1, 1)
    mask = ops.expand_dims(ends, axis=0) if some is None else ends & some
    return Examples(key, value, mask, awaits_transform=keys.awaits_transform, **order)


def _span_and_reach(scales, length, is_padded):
    """How many keys there are to whole windows of all scales, and with those that windows reach.

    Windows that do not begin with the sequence reach into the span before.
    """
    span = min(math.lcm(*scales), length)
    return span, 2 * span if is_padded else span


def _places(step, start, scale):
    """The place of each key in its window, `(S, H)`; `(B, S, H)` if these begin at `start`."""
    return append_axes(step if start is None else step - append_axes(start, 1), 1) % scale


def _first_ends(start, scale, length):
    """Where the first window of each head ends, or the keys do, `(B or 1, H)`."""
    start = 0 if start is None else append_axes(start, 1)
    return native.at_most(start + ops.expand_dims(scale, axis=0) - 1, length - 1)


def _members(place, reach, dtype):
    """1 where a key is in the window of another and not behind it, `(.., H, span, reach)`.

    For keys of a span, of `place` `(.., span, H)`, and the `reach` that end with its last.
    """
    span = place.shape[-2]
    back = ops.arange(span, dtype="int32")
    back = append_axes(back, 1) - ops.arange(span - reach, span, dtype="int32")
    place = append_axes(ops.swapaxes(place, -1, -2), 1)
    return ops.cast((back >= 0) & (back <= place), dtype)


def _sums(member, x):
    """Sums of `x`, `(B, S, H, D)`, over the members of the window of each key up to it."""
    length, (*_, span, reach) = x.shape[1], member.shape
    count = -(-length // span)
    x = fit_axis(x, 1, count * span, front=reach - span)
    x = cast(overlapping(x, 1, count, reach, span), member.dtype)
    of_each = "b" if len(member.shape) == 4 else ""
    sums = ops.einsum(f"{of_each}hjk,bwkhd->bhwjd", member, x)
    # Each head's together in memory, as kernels read them.
    return swap_heads_and_time(join_axes(sums, 2))[:, :length]
