"""What heads are evaluated at, what they are fitted on, and what of it each query sees."""

import dataclasses
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_pdattn.ops import masks, native
from keras_pdattn.ops.indexing import (
    append_axes,
    first_valid,
    is_at_most,
    join_axes,
    take_along_time,
    take_head,
    take_one,
    zero_where_masked,
)
from keras_pdattn.ops.records import replace
from keras_pdattn.ops.windows import Window


@dataclasses.dataclass(frozen=True, eq=False)
class Queries:
    """The points a group of heads is evaluated at.

    Attributes:
        x: `(B, T, H, D)`.
        mask: boolean `(B, T)`, False where a query is padding; or `None`.
        grid: sizes of the axes that time runs over in raster order; `None` for
            one axis.
        end: integer `(B,)`: each sequence is a prefix, and only the query at
            its end is asked for; or `None`.
        start: integer, where among the keys the first query stands; `None` for 0.
    """

    x: Any
    mask: Any = None
    grid: tuple | None = None
    end: Any = None
    start: Any = None

    @property
    def position(self):
        """Where the queries stand that are asked for, `(T,)` or `(B, 1)`."""
        index = self._index()
        return index if self.start is None else index + self.start

    def _index(self):
        """Which of `x` are asked for, `(T,)` or `(B, 1)`."""
        if self.end is None:
            return ops.arange(native.shape(self.x)[1], dtype="int32")
        return ops.expand_dims(self.end, axis=-1)

    def split(self, sizes):
        """The queries of groups of so many heads each."""
        return [self.with_x(x) for x in native.split(self.x, sizes, axis=2)]

    def with_x(self, x):
        """The queries with another `x`."""
        return self if x is self.x else replace(self, x=x)

    def zero_padding(self):
        """Puts zero where `mask` marks padding."""
        return self if self.mask is None else self.with_x(zero_where_masked(self.x, self.mask))

    def asked_for(self):
        """`x` of the queries that are asked for."""
        if self.end is None or self.x.shape[1] == 1:
            return self.x
        return take_along_time(self.x, self._index())


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """The training set of a group of heads.

    Shapes: batch B, queries T, keys S, examples M, heads H. Without pooling the
    examples are the keys, M = S.

    Attributes:
        key: `(B, M, H, D)`.
        value: `(B, M, H, Dv)`.
        mask: boolean `(B, M)`, or `(B or 1, M, H)` if heads differ, False where an example is
            padding; or `None`.
        limit: integer `(T,)` or `(B, T)`: query i sees only the first
            `limit[i]` examples (and its own); or `None` if not causal. Always what the next two
            say, which forms that cut examples go by.
        is_triangular: whether `limit[i] = i + 1`, which kernels know as "causal".
        stride: where it is not, `limit[i]` is `(i - start) // stride`, from 0 to M.
        has_running_means: whether each query's own example is the one at its place, see
            `ops.running_means`, and `limit[i]` is `i` wherever `start` is.
        start: integer `(B,)`, or `None` for 0.
        origin: with these means, integer `(B or 1, H)`: where an example of each head is that is
            seen by all queries which see two.
        query_start: integer, where among the keys the first query stands, and
            `limit` is then one more for each; `None` for 0.
        is_prefix: whether these are the keys up to one query, so that a
            transform may not look ahead though `limit` is `None`.
        visible: boolean `(B, H, T, M)`, sizes of 1 for what is the same for all: what an
            arbitrary mask leaves to each query; or `None`.
        all_are_sighted: whether every query is known to see an example, whatever `visible` says.
        window: the `Window` that restricts what each query sees, or `None`.
        grid: as for `Queries`, of the examples.
        own: the further example of each query's own, or `None`.
        spread: function that turns the weights of the examples, `(B, H, T, M)`,
            and of the own ones, `(B, H, T)` or `None`, into those of the keys,
            `(B, H, T, S)`.
        log_scale: `(B, M, H)`, logarithms of factors that keys are to be
            multiplied by, too large or small to be; or `None`.
        projections: a pair of `Projection`, for keys and for values, where `key` and
            `value` are inputs `(B, M, 1, width)` that are yet to be projected, that for
            keys `None` where these are; or `None`.
        awaits_transform: whether keys are yet to be transformed, which may take a large
            mean off them: sums of them stay in float32 until then.
    """

    key: Any
    value: Any
    mask: Any = None
    limit: Any = None
    is_triangular: bool = False
    stride: int = 1
    has_running_means: bool = False
    start: Any = None
    origin: Any = None
    query_start: Any = None
    is_prefix: bool = False
    visible: Any = None
    all_are_sighted: bool = False
    window: Window | None = None
    grid: tuple | None = None
    own: Any = None
    spread: Callable = lambda weights, own_weights: weights
    log_scale: Any = None
    projections: Any = None
    awaits_transform: bool = True

    @classmethod
    def keys(cls, key, value, query_length, is_causal=False, query_start=None, **attributes):
        """The keys themselves, which every training set is made from."""
        limit = None
        if is_causal:
            limit = ops.arange(1, query_length + 1, dtype="int32")
            if query_start is not None:
                limit = native.at_least(limit + query_start, 0)
            if query_start is not None or not is_at_most(query_length, key.shape[1]):
                limit = native.at_most(limit, native.shape(key)[1])
        is_triangular = is_causal and query_start is None
        attributes.update(limit=limit, is_triangular=is_triangular, query_start=query_start)
        return cls(key, value, **attributes)

    @property
    def is_causal(self):
        """Whether each query is fitted on its own prefix."""
        return self.limit is not None

    def has_limit_at_each(self):
        """Whether there is a query for each example, which sees it and all before."""
        lengths = self.limit.shape[-1], self.key.shape[1]
        return self.is_triangular and isinstance(lengths[0], int) and lengths[0] == lengths[1]

    @property
    def looks_back_only(self):
        """Whether a transform may mix no later key into an earlier one."""
        return self.is_causal or self.is_prefix

    @property
    def value_depth(self):
        """The depth of values, once they are projected."""
        if self.projections is None:
            return self.value.shape[-1]
        return self.projections[1].kernel.shape[-1]

    @property
    def value_dtype(self):
        """The dtype of values, once they are projected."""
        return (self.value if self.projections is None else self.projections[1].kernel).dtype

    def split(self, sizes):
        """The keys of groups of so many heads each."""
        if len(sizes) == 1:
            return [self]
        parts = {}
        if self.projections is None:
            parts["key"] = native.split(self.key, sizes, axis=2)
            parts["value"] = native.split(self.value, sizes, axis=2)
        else:
            parts["projections"] = zip(*(one.split(sizes) for one in self.projections))
        if self.visible is not None and self.visible.shape[1] != 1:
            parts["visible"] = native.split(self.visible, sizes, axis=1)
        return [replace(self, **dict(zip(parts, values))) for values in zip(*parts.values())]

    def projected(self):
        """The examples once `projections` are done."""
        if self.projections is None:
            return self
        _, project = self.projections
        value = project(join_axes(self.value, 2))
        return replace(self.with_projected_keys(), value=value, projections=None)

    def with_projected_keys(self):
        """The examples once those of `projections` are done that are of keys."""
        project, of_values = self.projections or (None, None)
        if project is None:
            return self
        changes = {"key": project(join_axes(self.key, 2)), "projections": (None, of_values)}
        return replace(self, **changes).zero_padding()

    def with_keys(self, function):
        """Replaces every key by `function(key)`."""
        key, own = function(self.key), self.own
        if own is not None:
            own = own.with_key(key if self.has_running_means else function(own.key))
        if key is self.key and own is self.own:
            return self
        return replace(self, key=key, own=own)

    def common_position(self):
        """Where an example is that all causal queries see which see two.

        Integer `(B or 1, H or 1)`; or `None` for 0.
        """
        if self.has_running_means:
            return self.origin
        return None if self.mask is None else append_axes(first_valid(self.mask), 1)

    def with_scaled_keys(self, function):
        """Replaces every key, and `log_scale`, by the pair `function(key)`."""
        own = self.own
        if own is not None:
            key, log_scale = function(own.key)
            own = replace(own, key=key, log_scale=log_scale)
        key, log_scale = function(self.key)
        return replace(self, key=key, log_scale=log_scale, own=own)

    def zero_padding(self):
        """Puts zero where `mask` marks padding."""
        if self.mask is None:
            return self
        return replace(self, key=zero_where_masked(self.key, self.mask))

    def visibility(self):
        """Boolean broadcastable to `(B, H, T, M)`: which query sees which example; or `None`."""
        seen = self.restrictions()
        if self.is_causal:
            earlier = ops.arange(native.shape(self.key)[1], dtype="int32") < append_axes(
                self.limit, 1
            )
            earlier = ops.expand_dims(earlier, axis=(0, 1) if len(earlier.shape) == 2 else 1)
            seen = masks.intersect(seen, earlier)
        return seen

    def restrictions(self):
        """`visibility()` but for causality."""
        padding = None if self.mask is None else ops.expand_dims(masks.by_head(self.mask), axis=2)
        near = None if self.window is None else self.window.visibility()
        return masks.intersect(masks.intersect(padding, near), self.visible)

    def by_query(self):
        """What differs from query to query: pairs of a tensor and its axis of queries, by name."""
        found = {"limit": (self.limit, -1)}
        if self.visible is not None and self.visible.shape[2] != 1:
            found["visible"] = self.visible, -2
        if self.window is not None:
            found["position"] = self.window.position, -1
        if self.own is not None:
            found.update(own_mask=(self.own.mask, 1), own_visible=(self.own.visible, -1))
        return {
            name: (x, axis % len(x.shape)) for name, (x, axis) in found.items() if x is not None
        }

    def of_queries(self, by_query):
        """The examples as some queries see them, with tensors of `by_query` for these alone."""
        changes = {name: by_query[name] for name in ("limit", "visible") if name in by_query}
        if self.window is not None:
            changes["window"] = replace(self.window, position=by_query["position"])
        if self.own is not None:
            changes["own"] = replace(
                self.own, mask=by_query.get("own_mask"), visible=by_query.get("own_visible")
            )
        return replace(self, **changes)

    def of_head(self, sequence, head):
        """The examples as one head of one sequence sees them, integer scalars."""
        changes = _of_head(self, sequence, head)
        if self.limit is not None and len(self.limit.shape) == 2:
            changes["limit"] = take_one(self.limit, sequence, 0)
        if self.window is not None:
            changes["window"] = self.window.of_sequence(sequence)
        if self.own is not None:
            changes["own"] = replace(self.own, **_of_head(self.own, sequence, head))
        return replace(self, **changes)

    def of_block(self, block):
        """The examples as a block of queries, a slice, sees them; causally up to the last one."""
        pieces = {}
        # For lengths that are not known, torch can't compile comprehensions that read a slice.
        for name, (x, axis) in self.by_query().items():
            pieces[name] = x[(slice(None),) * axis + (block,)]
        examples = self.of_queries(pieces)
        if self.is_causal and self.query_start is None:
            examples = examples.first(-(-block.stop // self.stride))
            # An own example is none of those in this block.
            changes = {"is_triangular": False, "has_running_means": False}
            examples = replace(examples, query_start=block.start, **changes)
        if self.own is None:
            return examples
        key, value = self.own.key[:, block], self.own.value[:, block]
        log_scale = self.own.log_scale
        if log_scale is not None:
            log_scale = log_scale[:, block]
        own = replace(examples.own, key=key, value=value, log_scale=log_scale)
        return replace(examples, own=own)

    def first(self, count):
        """The first `count` examples."""
        changes = {"key": self.key[:, :count], "value": self.value[:, :count]}
        if self.mask is not None:
            changes["mask"] = self.mask[:, :count]
        if self.visible is not None:
            changes["visible"] = self.visible[..., :count]
        if self.log_scale is not None:
            changes["log_scale"] = self.log_scale[:, :count]
        if self.window is not None:
            changes["window"] = self.window.first(count)
        return replace(self, **changes)

    def has_bands(self):
        """Whether a window leaves so little to each query that the rest need not be looked at."""
        if self.window is None or self.visible is not None or self.query_start is not None:
            return False
        if native.is_tracing():
            return False
        return self.window.has_bands(self.is_causal)

    def kernel_mask(self):
        """`visibility()` less what an `is_triangular` flag says already."""
        return self.restrictions() if self.is_triangular else self.visibility()

    def sighted(self):
        """Boolean broadcastable to `(B, H, T)`: which queries see any example; `None` if all do.

        For examples without `own`.
        """
        if self.all_are_sighted:
            return None
        if self.visible is not None or self.window is not None:
            return ops.any(self.visibility(), axis=-1)
        if self.mask is None:
            return None
        if not self.is_causal:
            return ops.any(masks.by_head(self.mask), axis=-1, keepdims=True)
        some = ops.expand_dims(ops.any(self.mask, axis=-1), axis=-1)
        first = ops.expand_dims(first_valid(self.mask), axis=-1)
        return ops.expand_dims(ops.logical_and(some, first < self.limit), axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class OwnExample:
    """An example that only one query sees: the window a causal query stands in, as far as it goes.

    Attributes:
        key: `(B, T, H, D)`.
        value: `(B, T, H, Dv)`.
        mask: boolean `(B, T)`, or `(B, T, H)` if heads differ, False where the query has none; or
            `None`.
        visible: boolean `(B, H, T)`, sizes of 1 for what is the same for all; or `None`.
        log_scale: `(B, T, H)`, as for `Examples`.
    """

    key: Any
    value: Any
    mask: Any = None
    visible: Any = None
    log_scale: Any = None

    def with_key(self, key):
        """The example with another `key`."""
        return self if key is self.key else replace(self, key=key)

    def visibility(self):
        """Boolean broadcastable to `(B, H, T)`; or `None`."""
        padding = None if self.mask is None else masks.by_head(self.mask)
        return masks.intersect(padding, self.visible)


def _of_head(examples, sequence, head):
    """`mask` and `visible` of examples, or of own ones, as one head of one sequence has them."""
    return {
        "mask": take_head(examples.mask, sequence, head, 2),
        "visible": take_head(examples.visible, sequence, head, 1),
    }
