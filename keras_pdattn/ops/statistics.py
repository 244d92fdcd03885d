"""Mean and variance over a training set, whole or prefix by prefix.

All of it is carried in float32 or wider, and no formula subtracts two large
numbers: keys whose mean is many times their spread keep their variance.
"""

from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.dtypes import accumulator, widen
from keras_pdattn.ops.indexing import append_axes, lead_with_zero, take_along_time
from keras_pdattn.ops.sums import cumulative_sum


def mean(x, mask=None):
    """The mean of each feature over time.

    Args:
        x: tensor of shape `(batch, time, heads, depth)`.
        mask: boolean `(batch, time)` or `(batch, time, heads)`, or `None`; False is left out.

    Returns:
        Tensor `(batch, 1, heads, depth)`, zero where `mask` leaves nothing.
    """
    if mask is None and (native.IS_TORCH or isinstance(x.shape[1], int)):
        return native.mean(x, 1, accumulator(x.dtype), keepdims=True)
    x = widen(x)
    if mask is not None:
        weight = _weight(mask, x)
        count = native.at_least(ops.sum(weight, axis=1, keepdims=True), 1)
        return native.weighted_sum(x, weight) / count
    count = ops.cast(ops.maximum(native.shape(x)[1], 1), x.dtype)
    return ops.sum(x, axis=1, keepdims=True) / count


def variance(centred, mask=None):
    """The mean square of each feature over time of what has a mean of zero; see `mean`."""
    centred = widen(centred)
    # Not `ops.square`, which looks for symbolic tensors first.
    return mean(centred * centred, mask)


def origin(x, position=None):
    """An example to centre others on, `(batch, 1, heads, depth)`, as a constant.

    One that every prefix of several holds: so centring on it looks at nobody's future, and leaves
    no more than the spread of a prefix.

    Args:
        x: tensor of shape `(batch, time, heads, depth)`.
        position: integer `(batch or 1, heads or 1)`, where it is; `None` for 0.
    """
    if position is None:
        one = x[:, :1]
    else:
        index = append_axes(ops.expand_dims(position, axis=1), 1)
        one = native.take_along_axis(x, index, axis=1)
    return ops.stop_gradient(widen(one))


def prefix_moments(x, limit, mask=None):
    """Count, mean and variance of the prefixes `x[:, :limit]`.

    Welford's recurrence, with the running means from a cumulative sum: every
    term that enters the squared deviations is non-negative.

    Args:
        x: tensor of shape `(batch, time, heads, depth)`, centred by the caller.
        limit: integer tensor `(queries,)` or `(batch, queries)`, the lengths of
            the prefixes, 0 to time; `None` if these are 1, 2, ..., time.
        mask: boolean `(batch, time)`, or `None`; False is left out.

    Returns:
        `(count, mean, variance)`: `(batch or 1, queries, 1, 1)` and twice
        `(batch, queries, heads, depth)`, zero where there is nothing.
    """
    x = widen(x)
    if mask is None:
        weight = None
        count = native.reshape(ops.arange(1, native.shape(x)[1] + 1, dtype=x.dtype), (1, -1, 1, 1))
    else:
        weight = _weight(mask, x)
        count = cumulative_sum(weight, axis=1)
    moments = _moments(x, weight, count)
    if limit is None:
        return moments
    return tuple(take_along_time(lead_with_zero(y), limit) for y in moments)


def moments_of_running_means(x, ends, some=None):
    """`prefix_moments` of what causal queries see of running means.

    Args:
        x: tensor of shape `(batch, time, heads, depth)`, centred by the caller.
        ends: boolean `(batch or 1, time, heads)`, which of `x` queries behind see.
        some: boolean `(batch, time, heads)`, which the query at its place sees; `None` for all.

    Returns:
        `(count, mean, variance)`, as of `prefix_moments`.
    """
    x = widen(x)
    weight, own = _weight(ends, x), 1 if some is None else _weight(some, x)
    return _append(_moments(x, weight, cumulative_sum(weight, axis=1)), x, own - weight)


def _weight(mask, x):
    """1 where `mask`, `(batch, time)` or `(batch, time, heads)`, counts `x` in."""
    return append_axes(ops.cast(mask, x.dtype), 4 - len(mask.shape))


def _moments(x, weight, count):
    """Those of each prefix; `weight` is 1 where counted, `None` for all."""
    find = native.prefix_moments if native.is_eager_torch() else _prefix_moments
    return count, *find(x, weight, count)


def _prefix_moments(x, weight, count):
    """Mean and variance of `_moments`."""
    divisor = native.at_least(count, 1)
    mean = cumulative_sum(x if weight is None else x * weight, axis=1) / divisor
    # From the mean that takes an example in; the first is its own mean.
    share = count / native.at_least(count - 1, 1)
    share = share if weight is None else share * weight
    return mean, cumulative_sum(share * ops.square(x - mean), axis=1) / divisor


def append_example(moments_before, x, mask=None):
    """Adds one example to each query's `(count, mean, variance)` of `prefix_moments`.

    Args:
        moments_before: `(count, mean, variance)`.
        x: tensor `(batch, queries, heads, depth)`, the example of each query.
        mask: boolean `(batch, queries)`, or `None`; False adds nothing.
    """
    x = widen(x)
    weight = ops.ones_like(moments_before[0]) if mask is None else _weight(mask, x)
    return _append(moments_before, x, weight)


def _append(moments_before, x, weight):
    count, mean, variance = moments_before
    total = count + weight
    divisor = native.at_least(total, 1)
    deviation = x - mean
    step = weight / divisor * deviation
    return total, mean + step, count / divisor * (variance + step * deviation)
