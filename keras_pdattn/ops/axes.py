"""Attention over any axes, as attention over one: the attended ones become time, the rest batch."""

import dataclasses
import math

from keras import ops

from keras_pdattn.ops import masks, native


@dataclasses.dataclass(frozen=True)
class AttendedAxes:
    """Which axes of `(batch, ..., features)` inputs are attended over.

    Attributes:
        attended: the attended axes, in order.
        free: the axes between batch and features that are not attended.
    """

    attended: tuple
    free: tuple

    @classmethod
    def of(cls, rank, attended):
        """For inputs of `rank` axes, batch and features included."""
        free = tuple(axis for axis in range(1, rank - 1) if axis not in attended)
        return cls(tuple(attended), free)

    @property
    def is_plain(self):
        """Whether inputs are `(batch, time, features)` already."""
        return self.attended == (1,) and not self.free

    def grid(self, x):
        """Sizes of the attended axes of `x`, `(batch, ..., heads, depth)`; `None` for one."""
        if len(self.attended) == 1:
            return None
        shape = native.shape(x)
        return tuple(shape[axis] for axis in self.attended)

    def to_sequence(self, x):
        """Turns `(batch, ..., *rest)` into `(batch * free, attended, *rest)`."""
        if self.is_plain:
            return x
        inner = 1 + len(self.free) + len(self.attended)
        order = (0,) + self.free + self.attended + tuple(range(inner, len(x.shape)))
        x = ops.transpose(x, order)
        shape = native.shape(x)
        batch, time = shape[: 1 + len(self.free)], shape[1 + len(self.free) : inner]
        return native.reshape(x, (math.prod(batch), math.prod(time)) + tuple(shape[inner:]))

    def from_sequence(self, x, like):
        """Undoes `to_sequence` for the sequence that `like` was turned into."""
        if self.is_plain:
            return x
        outer = (0,) + self.free + self.attended
        shape = native.shape(like)
        x = native.reshape(x, tuple(shape[axis] for axis in outer) + tuple(native.shape(x)[2:]))
        order = [outer.index(axis) for axis in range(len(outer))]
        return ops.transpose(x, order + list(range(len(outer), len(x.shape))))

    def padding(self, name, mask, x):
        """A padding mask as `(batch * free, attended)`.

        `mask` has the shape of `x` less its features, or of its batch and
        attended axes alone.
        """
        mask = masks.as_boolean(name, mask)
        full = tuple(x.shape[:-1])
        attended = (full[0],) + tuple(full[axis] for axis in self.attended)
        if self.free and masks.fits(mask.shape, attended, exactly=True):
            for axis in self.free:
                mask = ops.expand_dims(mask, axis=axis)
            mask = ops.broadcast_to(mask, native.shape(x)[:-1])
        elif not masks.fits(mask.shape, full, exactly=True):
            raise ValueError(
                f"`{name}` must have the shape of what it masks without its features. Received: "
                f"{name} of shape {tuple(mask.shape)} for a tensor of shape {tuple(x.shape)}"
            )
        return self.to_sequence(mask)

    def scores_shape(self, query, value, num_heads):
        """Static shape `(batch, free, heads, queries, keys)` of scores."""
        return (
            (query[0],)
            + tuple(query[axis] for axis in self.free)
            + (num_heads,)
            + tuple(query[axis] for axis in self.attended)
            + tuple(value[axis] for axis in self.attended)
        )

    def attention_mask(self, mask, query, value, num_heads):
        """An attention mask as `(batch * free, heads, queries, keys)`, sizes of 1 left in.

        `mask` ends in the attended axes of queries and keys; before them come
        all of the batch, free and head axes, or the first few.
        """
        mask = masks.as_boolean("attention_mask", mask)
        target = self.scores_shape(query.shape, value.shape, num_heads)
        pairs = 2 * len(self.attended)
        lead = len(target) - pairs
        received = len(mask.shape) - pairs
        for axis in range(max(received, 0), lead):
            if received >= 0:
                mask = ops.expand_dims(mask, axis=axis)
        if not masks.fits(mask.shape, target):
            raise ValueError(
                "`attention_mask` must be broadcastable to (batch, heads, queries, keys), or have "
                f"the shape (batch, queries, keys) or (queries, keys); here that is {target} in "
                "full. For padding, (batch, time), use `query_mask`, `value_mask` or `key_mask`. "
                f"Received: attention_mask of shape {tuple(mask.shape)}"
            )
        if self.is_plain:
            return mask
        queries, keys = native.shape(query), native.shape(value)
        time = [queries[axis] for axis in self.attended] + [keys[axis] for axis in self.attended]
        shape = native.shape(mask)
        batch, heads = [1] * (lead - 1), shape[lead - 1]
        if tuple(mask.shape[: lead - 1]) != tuple(batch):
            batch = [queries[0]] + [queries[axis] for axis in self.free]
        mask = ops.broadcast_to(mask, tuple(batch) + (heads,) + tuple(time))
        count = len(self.attended)
        return native.reshape(
            mask, (math.prod(batch), heads, math.prod(time[:count]), math.prod(time[count:]))
        )

    def scores_from_sequence(self, scores, query, value):
        """Turns `(batch * free, heads, queries, keys)` back into the axes of the inputs."""
        if self.is_plain:
            return scores
        queries, keys = native.shape(query), native.shape(value)
        shape = self.scores_shape(queries, keys, native.shape(scores)[1])
        return native.reshape(scores, shape)
