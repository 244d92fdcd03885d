"""Windows of keys averaged into the examples of a scaled head (theory: equation 4)."""

import dataclasses
from typing import Any

from keras import ops

from keras_pdattn.ops.dtypes import accumulator, cumulative_sum
from keras_pdattn.ops.examples import Examples, OwnExample
from keras_pdattn.ops.indexing import append_axes, first_valid, take_along_time


def pooled_examples(keys, query_length, scale, reduction="mean"):
    """Averages keys and values in windows of `scale`.

    A causal query is fitted on the windows before the one it stands in, and on
    the mean of that one's members up to itself.

    Args:
        keys: `Examples` that are the keys themselves.
        query_length: the number of queries, T.
        scale: positions in a window.
        reduction: `"mean"`, or `"first"` to take each window's first valid key.

    Returns:
        The pooled `Examples`; their keys still in the wider dtype of sums, as
        a transform may yet take a large mean off them.
    """
    windows = Windows.over(keys.key, keys.mask, scale, reduction)
    key, value = windows.align(keys.key), windows.align(keys.value)
    visible = keys.visible if keys.visible is None else windows.align_last(keys.visible)
    padded = keys.mask is not None
    pooled = Examples(
        key=windows.mean(key),
        value=ops.cast(windows.mean(value), value.dtype),
        mask=windows.counts() > 0 if padded else None,
        visible=visible if visible is None else windows.whole(visible),
        spread=lambda weights, _: windows.spread(weights),
    )
    if not keys.is_causal:
        return pooled
    steps = windows.steps(query_length)
    reached = ops.maximum(steps, 0)
    mask = None
    if padded:
        mask = take_along_time(windows.running_counts() > 0, reached)
        mask = ops.logical_and(mask, steps >= 0)
    own = OwnExample(
        key=take_along_time(windows.running_mean(key), reached),
        value=ops.cast(take_along_time(windows.running_mean(value), reached), value.dtype),
        mask=mask,
        visible=visible if visible is None else windows.whole_so_far(visible, steps),
    )
    return dataclasses.replace(
        pooled,
        limit=reached // scale,
        own=own,
        spread=lambda weights, own_weights: (
            windows.spread(weights) + windows.spread_own(own_weights, steps)
        ),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Windows of `scale` positions along a sequence, the first at its first valid key.

    So padding in front of a sequence moves no window. Positions counted from
    that first key are called steps.

    Attributes:
        scale: the number of positions in a window.
        member: float `(B or 1, S)` by step, 1 for the keys that windows take in.
        start: integer `(B,)`, the first valid position; or `None` if all are 0.
    """

    scale: int
    member: Any
    start: Any = None

    @classmethod
    def over(cls, key, mask, scale, reduction):
        """Lays windows over `key`, `(B, S, H, D)`, less what `mask`, `(B, S)`, leaves out."""
        dtype = accumulator(key.dtype)
        length = ops.shape(key)[1]
        if mask is None:
            windows = cls(scale, ops.ones((1, length), dtype=dtype))
        else:
            start = first_valid(mask)
            inside = ops.arange(length, dtype="int32") < length - ops.expand_dims(start, axis=1)
            aligned = cls(scale, inside, start).align(mask)
            windows = cls(scale, ops.cast(ops.logical_and(aligned, inside), dtype), start)
        if reduction == "first":
            is_first = ops.cast(windows.running_counts() == 1, dtype)
            windows = dataclasses.replace(windows, member=windows.member * is_first)
        return windows

    @property
    def length(self):
        """The number of positions, S."""
        return ops.shape(self.member)[1]

    def align(self, x):
        """Reads `x`, `(B, S, ...)` by position, by step; beyond the end it repeats."""
        return x if self.start is None else take_along_time(x, self._positions())

    def align_last(self, x):
        """`align` for `x` of shape `(b, h, t, S)`."""
        return x if self.start is None else _take_along_last(x, self._positions())

    def _positions(self):
        """The position of each step, `(B, S)`; beyond the end, the last."""
        position = ops.expand_dims(self.start, axis=1) + ops.arange(self.length, dtype="int32")
        return ops.minimum(position, self.length - 1)

    def split(self, x):
        """Cuts `x`, `(B, S, ...)`, into `(B, M, scale, ...)`, zeros filling the last window."""
        batch, length = ops.shape(x)[:2]
        count = (length + self.scale - 1) // self.scale
        rest = tuple(x.shape[2:])
        x = ops.pad(x, [[0, 0], [0, self.scale - 1]] + [[0, 0]] * len(rest))
        return ops.reshape(x[:, : count * self.scale], (batch, count, self.scale) + rest)

    def join(self, windows):
        """Undoes `split`."""
        batch, count = ops.shape(windows)[:2]
        rest = tuple(windows.shape[3:])
        return ops.reshape(windows, (batch, count * self.scale) + rest)[:, : self.length]

    def counts(self):
        """The number of members of each window, `(B or 1, M)`."""
        return ops.sum(self.split(self.member), axis=2)

    def running_counts(self):
        """The number of members of its window up to each step, `(B or 1, S)`."""
        return self.join(cumulative_sum(self.split(self.member), axis=2))

    def mean(self, x):
        """The mean of each window's members; `(B, S, H, D)` by step to `(B, M, H, D)`."""
        total = ops.sum(self.split(self._members(x)), axis=2)
        return total / append_axes(ops.maximum(self.counts(), 1), 2)

    def running_mean(self, x):
        """The mean of the members of its window up to each step; `(B, S, H, D)` by step."""
        total = self.join(cumulative_sum(self.split(self._members(x)), axis=2))
        return total / append_axes(ops.maximum(self.running_counts(), 1), 2)

    def _members(self, x):
        """`x`, wide enough to be summed, zero where it is no member."""
        return ops.cast(x, self.member.dtype) * append_axes(self.member, 2)

    def steps(self, query_length):
        """The step of each query, for queries beyond the keys the last; `(T,)` or `(B, T)`."""
        position = ops.minimum(ops.arange(query_length, dtype="int32"), self.length - 1)
        return position if self.start is None else position - ops.expand_dims(self.start, axis=1)

    def whole(self, visible):
        """Whether a query sees all members of a window; `(b, h, t, S)` by step to `(.., M)`."""
        hidden = ops.transpose(self._hidden(visible, self.member, (1, 2)), (0, 3, 1, 2))
        return ops.transpose(ops.sum(self.split(hidden), axis=2) == 0, (0, 2, 3, 1))

    def whole_so_far(self, visible, steps):
        """Whether a query sees all members of its own window up to its step; `(.., t)`."""
        return ops.sum(self._hidden(visible, self.own_members(steps), 1), axis=-1) == 0

    def _hidden(self, visible, member, head_axes):
        """1 for each of `member` that a query does not see."""
        return ops.expand_dims(member, axis=head_axes) * (1 - ops.cast(visible, member.dtype))

    def own_members(self, steps):
        """1 for the members of each query's own window up to its step; `(B or 1, T, S)`."""
        step = ops.arange(self.length, dtype="int32")
        steps = ops.expand_dims(steps, axis=-1)
        current = ops.logical_and(step <= steps, step // self.scale == steps // self.scale)
        return ops.cast(current, self.member.dtype) * ops.expand_dims(self.member, axis=1)

    def spread(self, weights):
        """Shares each window's weight among its members; `(B, H, T, M)` to `(B, H, T, S)`."""
        share = weights / ops.expand_dims(ops.maximum(self.counts(), 1), axis=(1, 2))
        share = ops.repeat(share, self.scale, axis=-1)[..., : self.length]
        return self._by_position(share * ops.expand_dims(self.member, axis=(1, 2)))

    def spread_own(self, weights, steps):
        """Shares the weight of each query's own window so far; `(B, H, T)` to `(B, H, T, S)`."""
        share = self.own_members(steps)
        share = share / ops.maximum(ops.sum(share, axis=-1, keepdims=True), 1)
        return self._by_position(ops.expand_dims(weights, axis=-1) * ops.expand_dims(share, axis=1))

    def _by_position(self, x):
        """Reads `x`, `(B, H, T, S)` by step, by position."""
        if self.start is None:
            return x
        step = ops.arange(self.length, dtype="int32") - ops.expand_dims(self.start, axis=1)
        started = ops.expand_dims(step >= 0, axis=(1, 2))
        return ops.where(started, _take_along_last(x, ops.maximum(step, 0)), 0.0)


def _take_along_last(x, index):
    """Reads `x`, `(b, h, t, S)`, at `index`, `(B, n)`, along its last axis."""
    shape = (ops.shape(index)[0],) + tuple(ops.shape(x)[1:])
    return ops.take_along_axis(
        ops.broadcast_to(x, shape), ops.expand_dims(index, axis=(1, 2)), axis=-1
    )
