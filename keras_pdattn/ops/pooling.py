"""Windows of keys averaged into the examples of a scaled head (theory: equation 4)."""

import dataclasses
import math
from typing import Any

from keras import ops

from keras_pdattn.ops import masks, native
from keras_pdattn.ops.dtypes import accumulator, cast
from keras_pdattn.ops.examples import Examples, OwnExample
from keras_pdattn.ops.indexing import (
    append_axes,
    coordinates,
    first_valid,
    fit_axis,
    is_at_most,
    join_axes,
    raster,
    split_axis,
    take_along_time,
    to_grid,
)
from keras_pdattn.ops.records import replace
from keras_pdattn.ops.sums import cumulative_sum


def pooled_examples(keys, query_length, scale, reduction="mean"):
    """Averages keys and values in windows of `scale`, along each axis of their grid.

    A causal query, on one axis, is fitted on the windows before the one it
    stands in, and on the mean of that one's members up to itself.

    Args:
        keys: `Examples` that are the keys themselves.
        query_length: the number of queries, T.
        scale: positions in a window, along each axis.
        reduction: `"mean"`, or `"first"` to take each window's first valid key.

    Returns:
        The pooled `Examples`; keys that await a transform in the wider dtype of sums.
    """
    windows = Windows.over(keys, scale, reduction)
    visible = None if keys.visible is None else windows.align_last(keys.visible)
    key = windows.mean(keys.key, windows.dtype if keys.awaits_transform else None)
    value = key if keys.value is keys.key else windows.mean(keys.value)
    pooled = Examples(
        key=key,
        value=cast(value, keys.value.dtype),
        mask=None if keys.mask is None else windows.counts() > 0,
        is_prefix=keys.is_prefix,
        query_start=keys.query_start,
        visible=None if visible is None else windows.whole(visible),
        grid=windows.grid,
        spread=lambda weights, _: windows.spread(weights),
        projections=keys.projections,
        awaits_transform=keys.awaits_transform,
    )
    if not keys.is_causal:
        return pooled
    steps = windows.steps(query_length)
    own_key, own_value = (
        windows.reach(x, steps) for x in windows.running_means(keys.key, keys.value)
    )
    own = OwnExample(
        key=own_key,
        value=cast(own_value, keys.value.dtype),
        mask=windows.has_members(steps, keys.mask is not None),
        visible=None if visible is None else windows.whole_so_far(visible, steps),
    )
    return replace(
        pooled,
        limit=windows.before(steps),
        stride=scale,
        start=windows.start,
        own=own,
        spread=lambda weights, own_weights: (
            windows.spread(weights) + windows.spread_own(own_weights, steps)
        ),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Windows of `scale` positions along each axis, the first at the first valid key.

    So padding in front of a sequence moves no window. Window after window, the
    keys of each in raster order, are numbered by steps; the last windows are
    filled up with steps that no key has.

    Attributes:
        size: the number of steps in a window, `scale` to the number of axes.
        num_steps: the number of steps in all windows, M * size.
        is_member: boolean `(B or 1, M * size)` by step, True for keys that windows take in;
            `None` if these are all there are.
        length: the number of keys, S.
        dtype: that of sums.
        grid: the number of windows along each axis; `None` for one axis.
        start: integer `(B,)`, the first valid key on one axis; or `None` if that
            is key 0 for all, or if there are several axes.
        position: integer `(n,)` or `(B, n)`, the key at each step; `None` if the
            two are the same.
        step: integer `(S,)` or `(B, S)`, the step of each key, negative in
            front of the first window; or `None`.
        query_start: as for `Examples`.
    """

    size: int
    num_steps: Any
    is_member: Any
    length: Any
    dtype: str
    grid: tuple | None = None
    start: Any = None
    position: Any = None
    step: Any = None
    query_start: Any = None

    @classmethod
    def over(cls, keys, scale, reduction):
        """Lays windows over `keys`, less what their mask leaves out."""
        sizes = keys.grid or (native.shape(keys.key)[1],)
        counts = tuple((size + scale - 1) // scale for size in sizes)
        grid = None if keys.grid is None else counts
        length = native.shape(keys.key)[1]
        window_size = scale ** len(sizes)
        num_steps = math.prod(counts) * window_size
        known = length, accumulator(keys.key.dtype)
        if keys.grid is None and keys.mask is None:
            windows = cls(window_size, num_steps, None, *known, query_start=keys.query_start)
        else:
            starts = _first_coordinates(keys)
            position, inside = _positions(num_steps, sizes, counts, scale, starts)
            if keys.mask is not None:
                inside = ops.logical_and(inside, take_along_time(keys.mask, position))
            windows = cls(
                window_size,
                num_steps,
                inside,
                *known,
                grid,
                None if keys.grid is not None else ops.squeeze(starts[0], axis=1),
                position,
                _steps(length, sizes, counts, scale, starts),
                keys.query_start,
            )
        if reduction == "first":
            is_first = ops.cast(windows.running_counts() == 1, windows.dtype)
            is_first = join_axes(windows.split(windows.member) * is_first, 1)
            windows = replace(windows, is_member=is_first > 0)
        return windows

    @property
    def has_all_keys(self):
        """Whether keys and steps are the same, and every key is a member."""
        return self.is_member is None

    @property
    def num_windows(self):
        """The number of windows, M."""
        return self.num_steps // self.size

    @property
    def member(self):
        """`is_member` as 0 and 1."""
        is_member = self.is_member
        if self.has_all_keys:
            is_member = ops.expand_dims(ops.arange(self.num_steps, dtype="int32"), 0) < self.length
        return ops.cast(is_member, self.dtype)

    def align(self, x):
        """Reads `x`, `(B, S, ...)` by key, by step; where a step has no key, anything."""
        if self.position is None:
            return fit_axis(x, 1, self.num_steps)
        return take_along_time(x, self.position)

    def align_last(self, x):
        """`align` for `x` of shape `(b, h, t, S)`."""
        if self.position is None:
            return fit_axis(x, 3, self.num_steps)
        return _take_along_last(x, self.position)

    def split(self, x):
        """Cuts `x`, `(B, M * size, ...)`, into `(B, M, size, ...)`."""
        return split_axis(x, 1, self.size)

    def counts(self):
        """The number of members of each window, `(B or 1, M)`."""
        return ops.sum(self.split(self.member), axis=2)

    def running_counts(self):
        """The number of members up to each step of each window, `(B or 1, M or 1, size)`."""
        if not self.has_all_keys:
            return cumulative_sum(self.split(self.member), axis=2)
        counts = native.reshape(ops.arange(1, self.size + 1, dtype=self.dtype), (1, 1, self.size))
        if isinstance(self.length, int) and self.length % self.size == 0:
            return counts
        first = ops.arange(self.num_windows, dtype="int32") * self.size
        left = ops.cast(native.reshape(self.length - first, (1, -1, 1)), self.dtype)
        return ops.minimum(counts, left)

    def mean(self, x, dtype=None):
        """The mean of each window's members; `(B, S, H, D)` to `(B, M, H, D)`.

        In `dtype`, that of `x` if `None`.
        """
        if self.has_all_keys and isinstance(self.length, int):
            return self._mean_of_all(x, dtype)
        total = ops.sum(self.split(self._members(x)), axis=2)
        mean = total / append_axes(native.at_least(self.counts(), 1), 2)
        return cast(mean, dtype or x.dtype)

    def _mean_of_all(self, x, dtype):
        """`mean`, with nothing to fill up the last window and nothing to leave out."""
        rest = self.length % self.size
        if not rest:
            return native.mean(self.split(x), 2, dtype)
        means = [native.mean(x[:, -rest:], 1, dtype, keepdims=True)]
        if rest < self.length:
            means.insert(0, native.mean(self.split(x[:, :-rest]), 2, dtype))
        return native.concatenate(means, axis=1)

    def running_means(self, *tensors):
        """The means of its window's members up to each step; from `(B, S, H, D)`, by step."""
        counts = self.running_counts()
        if not self.has_all_keys:
            counts = native.at_least(counts, 1)
        counts = append_axes(counts, 2)
        totals = (cumulative_sum(self.split(self._members(x)), axis=2) for x in tensors)
        return [join_axes(total / counts, 1) for total in totals]

    def _members(self, x):
        """`x` by step, wide enough to be summed, zero where it is no member."""
        x = cast(self.align(x), self.dtype)
        # Without padding `align` put zeros where there is no key.
        return x if self.has_all_keys else x * append_axes(self.member, 2)

    def steps(self, query_length):
        """The step of each query, `(T,)` or `(B, T)`, for one axis."""
        position = ops.arange(query_length, dtype="int32")
        if self.query_start is not None:
            position = position + self.query_start
        return position if self.start is None else position - ops.expand_dims(self.start, axis=1)

    def _hold(self, steps):
        """Whether `steps` are known to count from 0, and not to go beyond the last window."""
        begins_there = self.start is None and self.query_start is None
        return begins_there and is_at_most(steps.shape[0], self.num_steps)

    def before(self, steps):
        """The number of windows before the one of each step, on one axis."""
        if self._hold(steps):
            return steps // self.size
        return native.at_most(native.at_least(steps, 0) // self.size, self.num_windows)

    def reach(self, x, steps):
        """Reads `x`, `(B, M * size, ...)`, at `steps`, beyond the ends at the nearest."""
        if self._hold(steps):
            return x[:, : steps.shape[0]]
        last = self.num_steps - 1
        return take_along_time(x, native.at_most(native.at_least(steps, 0), last))

    def has_members(self, steps, is_padded):
        """Whether its own window so far has members, `(B or 1, T)`; `None` if all have."""
        if is_padded:
            some = self.reach(join_axes(self.running_counts(), 1) > 0, steps)
            return some & (steps >= 0) & (steps < self.num_steps)
        if self._hold(steps):
            return None
        return ops.expand_dims((steps >= 0) & (steps < self.num_steps), axis=0)

    def whole(self, visible):
        """Whether a query sees all members of a window; `(b, h, t, steps)` to `(.., M)`."""
        hidden = ops.transpose(self._hidden(visible, self.member, (1, 2)), (0, 3, 1, 2))
        return ops.transpose(ops.sum(self.split(hidden), axis=2) == 0, (0, 2, 3, 1))

    def whole_so_far(self, visible, steps):
        """Whether a query sees all members of its own window up to its step; `(.., t)`."""
        return ops.sum(self._hidden(visible, self.own_members(steps), 1), axis=-1) == 0

    def _hidden(self, visible, member, head_axes):
        """1 for each of `member` that a query does not see."""
        return ops.expand_dims(member, axis=head_axes) * (1 - ops.cast(visible, member.dtype))

    def own_members(self, steps):
        """1 for the members of each query's own window up to its step; `(B or 1, T, n)`."""
        step = ops.arange(self.num_steps, dtype="int32")
        steps = ops.expand_dims(steps, axis=-1)
        current = ops.logical_and(step <= steps, step // self.size == steps // self.size)
        return ops.cast(current, self.dtype) * ops.expand_dims(self.member, axis=1)

    def spread(self, weights):
        """Shares each window's weight among its members; `(B, H, T, M)` to `(B, H, T, S)`."""
        share = weights / ops.expand_dims(native.at_least(self.counts(), 1), axis=(1, 2))
        share = ops.repeat(share, self.size, axis=-1)
        return self._by_key(share * ops.expand_dims(self.member, axis=(1, 2)))

    def spread_own(self, weights, steps):
        """Shares the weight of each query's own window so far; `(B, H, T)` to `(B, H, T, S)`."""
        share = self.own_members(steps)
        share = share / native.at_least(ops.sum(share, axis=-1, keepdims=True), 1)
        return self._by_key(ops.expand_dims(weights, axis=-1) * ops.expand_dims(share, axis=1))

    def _by_key(self, x):
        """Reads `x`, `(B, H, T, n)` by step, by key."""
        if self.step is None:
            return x[..., : self.length]
        known = ops.expand_dims(self.step >= 0, axis=(1, 2) if len(self.step.shape) == 2 else (0,))
        return ops.where(known, _take_along_last(x, native.at_least(self.step, 0)), 0.0)


def _first_coordinates(keys):
    """Where the first window begins along each axis: `(B, 1)`, or 0 without padding."""
    num_axes = 1 if keys.grid is None else len(keys.grid)
    if keys.mask is None:
        return [0] * num_axes
    mask = to_grid(keys.mask, keys.grid)
    starts = []
    for axis in range(1, 1 + num_axes):
        others = [other for other in range(1, 1 + num_axes) if other != axis]
        along = ops.any(mask, axis=others) if others else mask
        starts.append(ops.expand_dims(first_valid(along), axis=1))
    return starts


def _positions(num_steps, sizes, counts, scale, starts):
    """The key at each step, `(n,)` or `(B, n)`, and whether there is one."""
    step = ops.arange(num_steps, dtype="int32")
    window_size = scale ** len(sizes)
    window = coordinates(step // window_size, counts)
    offset = coordinates(step % window_size, (scale,) * len(sizes))
    inside, nearest = None, []
    for size, start, w, o in zip(sizes, starts, window, offset):
        coordinate = start + w * scale + o
        inside = masks.intersect(inside, coordinate < size)
        nearest.append(native.at_most(coordinate, size - 1))
    if len(inside.shape) == 1:
        inside = ops.expand_dims(inside, axis=0)
    return raster(nearest, sizes), inside


def _steps(length, sizes, counts, scale, starts):
    """The step of each key, `(S,)` or `(B, S)`; -1 in front of the first windows."""
    key = coordinates(ops.arange(length, dtype="int32"), sizes)
    steps = [coordinate - start for coordinate, start in zip(key, starts)]
    window = raster([step // scale for step in steps], counts)
    offset = raster([step % scale for step in steps], (scale,) * len(sizes))
    step, known = window * scale ** len(sizes) + offset, None
    for along in steps:
        known = masks.intersect(known, along >= 0)
    return ops.where(known, step, -1)


def _take_along_last(x, index):
    """Reads `x`, `(b, h, t, n)`, at `index`, `(m,)` or `(B, m)`, along its last axis."""
    if len(index.shape) == 1:
        return native.take(x, index, axis=3)
    shape = (native.shape(index)[0],) + tuple(native.shape(x)[1:])
    return native.take_along_axis(
        ops.broadcast_to(x, shape), ops.expand_dims(index, axis=(1, 2)), axis=3
    )
