"""What a group of heads is fitted on, and what of it each query sees."""

import dataclasses
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_pdattn.ops import masks
from keras_pdattn.ops.indexing import append_axes, first_valid


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """The training set of a group of heads.

    Shapes: batch B, queries T, keys S, examples M, heads H. Without pooling the
    examples are the keys, M = S.

    Attributes:
        key: `(B, M, H, D)`.
        value: `(B, M, H, Dv)`.
        mask: boolean `(B, M)`, False where an example is padding; or `None`.
        limit: integer `(T,)` or `(B, T)`: query i sees only the first
            `limit[i]` examples (and its own); or `None` if not causal.
        is_triangular: whether `limit[i] = i + 1`, which kernels know as "causal".
        visible: boolean, broadcastable to `(B, H, T, M)`: what an arbitrary
            mask leaves to each query; or `None`.
        own: the further example of each query's own, or `None`.
        spread: function that turns the weights of the examples, `(B, H, T, M)`,
            and of the own ones, `(B, H, T)` or `None`, into those of the keys,
            `(B, H, T, S)`.
        is_folded: whether a transform has left part of what it does to the
            keys to the queries, so that no other can come after it.
    """

    key: Any
    value: Any
    mask: Any = None
    limit: Any = None
    is_triangular: bool = False
    visible: Any = None
    own: Any = None
    spread: Callable = lambda weights, own_weights: weights
    is_folded: bool = False

    @classmethod
    def keys(cls, key, value, query_length, mask=None, visible=None, is_causal=False):
        """The keys themselves, which every training set is made from."""
        limit = None
        if is_causal:
            position = ops.arange(query_length, dtype="int32")
            limit = ops.minimum(position + 1, ops.shape(key)[1])
        return cls(key, value, mask, limit, is_causal, visible)

    @property
    def is_causal(self):
        """Whether each query is fitted on its own prefix."""
        return self.limit is not None

    def with_keys(self, function):
        """Replaces every key by `function(key)`."""
        own = self.own and dataclasses.replace(self.own, key=function(self.own.key))
        return dataclasses.replace(self, key=function(self.key), own=own)

    def visibility(self):
        """Boolean broadcastable to `(B, H, T, M)`: which query sees which example; or `None`."""
        seen = self._restrictions()
        if self.is_causal:
            earlier = ops.arange(ops.shape(self.key)[1], dtype="int32") < append_axes(self.limit, 1)
            earlier = ops.expand_dims(earlier, axis=(0, 1) if len(earlier.shape) == 2 else 1)
            seen = masks.intersect(seen, earlier)
        return seen

    def _restrictions(self):
        """`visibility()` but for causality."""
        padding = None if self.mask is None else ops.expand_dims(self.mask, axis=(1, 2))
        return masks.intersect(padding, self.visible)

    def kernel_mask(self):
        """`visibility()` less what an `is_triangular` flag says already."""
        return self._restrictions() if self.is_triangular else self.visibility()

    def sighted(self):
        """Boolean broadcastable to `(B, H, T)`: which queries see any example; `None` if all do.

        For examples without `own`.
        """
        if self.visible is not None:
            return ops.any(self.visibility(), axis=-1)
        if self.mask is None:
            return None
        if not self.is_causal:
            return ops.expand_dims(ops.any(self.mask, axis=-1), axis=(1, 2))
        some = ops.expand_dims(ops.any(self.mask, axis=-1), axis=-1)
        first = ops.expand_dims(first_valid(self.mask), axis=-1)
        return ops.expand_dims(ops.logical_and(some, first < self.limit), axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class OwnExample:
    """An example that only one query sees: the window a causal query stands in, as far as it goes.

    Attributes:
        key: `(B, T, H, D)`.
        value: `(B, T, H, Dv)`.
        mask: boolean `(B, T)`, False where the query has none; or `None`.
        visible: boolean, broadcastable to `(B, H, T)`; or `None`.
    """

    key: Any
    value: Any
    mask: Any = None
    visible: Any = None

    def visibility(self):
        """Boolean broadcastable to `(B, H, T)`; or `None`."""
        padding = None if self.mask is None else ops.expand_dims(self.mask, axis=1)
        return masks.intersect(padding, self.visible)
