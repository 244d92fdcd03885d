"""Running sums along an axis."""

from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.indexing import delay, fit_axis, join_axes, split_axis

#: Entries that are summed up before runs of them are: backends add up short axes several times
#: as fast as long ones. Of 8, 16, 32 and 64 this was the fastest on each, on a CPU.
RUN = 16


def cumulative_sum(x, axis):
    """`keras.ops.cumsum` in the dtype of `x`, float64 included."""
    length = x.shape[axis]
    run = native.run_length(x) if native.IS_TORCH else RUN
    if not isinstance(length, int) or length < RUN**2:
        return _cumulative_sum(x, axis)
    runs = split_axis(fit_axis(x, axis, -(-length // run) * run), axis, run)
    runs = _cumulative_sum(runs, axis + 1)
    lead = (slice(None),) * (axis + 1)
    before = delay(_cumulative_sum(runs[lead + (-1,)], axis), axis)
    return fit_axis(join_axes(runs + ops.expand_dims(before, axis + 1), axis), axis, length)


def _cumulative_sum(x, axis):
    total = ops.cumsum(x, axis=axis)
    if total.dtype == x.dtype:
        return total
    # Keras took float64 for float32 on this backend: double the reach of each
    # partial sum instead, until it is the length.
    reach = 1
    while reach < x.shape[axis]:
        x = x + delay(x, axis, reach)
        reach *= 2
    return x
