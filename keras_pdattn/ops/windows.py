"""Sliding windows: which query sees which key, and attention over the bands that they cut out."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_pdattn.ops import masks, native
from keras_pdattn.ops.indexing import (
    append,
    append_axes,
    coordinates,
    fit_axis,
    from_grid,
    is_at_most,
    join_axes,
    overlapping,
    split_axis,
    take_along_time,
    take_one,
    to_grid,
)
from keras_pdattn.ops.records import replace

#: The least and the most queries along an axis that share a band of keys. Below,
#: products are too small for a matrix kernel; above, bands hold what nobody sees.
LEAST_BLOCK, MOST_BLOCK = 16, 128


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """Limits each query to the keys near it, and to global tokens.

    Query i sees key j where, along every axis, `|i - j| < size * dilation` and
    `i - j` is a multiple of `dilation`. The first `global_tokens` valid keys are
    seen by all; a query that stands where one of them does sees all. What is
    `reach` or more away along an axis, though, nobody sees.

    Attributes:
        size: positive integer, steps to either side, its own position counted.
        dilation: positive integer, the stride of these steps.
        global_tokens: the number of global tokens, 0 for none.
        position: integer `(T,)` or `(B, 1)`, where the queries stand.
        query_grid: sizes of the axes that queries run over; `None` for one axis.
        key_grid: the same for keys.
        key_length: the number of keys, S.
        valid: boolean `(B or 1, S)`, False for padding.
        reach: positive integer, from how many positions away even global tokens
            and keys are not seen; or `None`.
    """

    size: int
    dilation: int
    global_tokens: int
    position: Any
    query_grid: tuple | None
    key_grid: tuple | None
    key_length: Any
    valid: Any
    reach: int | None = None

    @property
    def num_axes(self):
        """The number of axes that the window is a box over."""
        return 1 if self.key_grid is None else len(self.key_grid)

    def first(self, count):
        """The window over the first `count` keys."""
        valid = self.valid[:, :count]
        return replace(self, key_length=native.shape(valid)[1], valid=valid)

    def of_sequence(self, index):
        """The window over the keys of one sequence, an integer scalar."""
        changes = {"valid": take_one(self.valid, index, 0)}
        if len(self.position.shape) == 2:
            changes["position"] = take_one(self.position, index, 0)
        return replace(self, **changes)

    def visibility(self):
        """Boolean `(B or 1, 1, T, S)`: which query is near which key, or either is global."""
        near = None
        query = ops.expand_dims(self.position, axis=-1)
        key = ops.arange(self.key_length, dtype="int32")
        for distance in self._distances(query, key):
            near = masks.intersect(near, distance < self.size * self.dilation)
            if self.dilation > 1:
                near = masks.intersect(near, distance % self.dilation == 0)
        near = near if len(near.shape) == 3 else ops.expand_dims(near, axis=0)
        if self.global_tokens:
            is_global = self.is_global()
            near = ops.logical_or(near, ops.expand_dims(is_global, axis=1))
            near = ops.logical_or(
                near, ops.expand_dims(self.at_queries(is_global, self.position), axis=-1)
            )
            near = masks.intersect(near, self.within_reach(query, key))
        return ops.expand_dims(near, axis=1)

    def _distances(self, query, key):
        """How far raster positions of queries and keys are apart, along each axis."""
        return [
            ops.abs(x - y)
            for x, y in zip(coordinates(query, self.query_grid), coordinates(key, self.key_grid))
        ]

    def within_reach(self, query, key):
        """Whether raster positions are no further apart than is seen at all; `None` if all are."""
        near = None
        if self.reach is not None:
            for distance in self._distances(query, key):
                near = masks.intersect(near, distance < self.reach)
        return near

    def is_global(self):
        """Boolean `(B or 1, S)`: the global tokens, whatever padding comes in front of them."""
        return ops.logical_and(self.valid, self.rank() < self.global_tokens)

    def rank(self):
        """How many valid keys come before each, `(B or 1, S)`."""
        valid = ops.cast(self.valid, "int32")
        return ops.cumsum(valid, axis=1) - valid

    def at_queries(self, x, position):
        """Reads `x`, `(B or 1, S)`, where queries stand; zero beyond the keys."""
        inside = ops.logical_and(position >= 0, position < self.key_length)
        position = native.at_least(native.at_most(position, self.key_length - 1), 0)
        if len(position.shape) == 2:
            x = ops.broadcast_to(x, (ops.shape(position)[0], self.key_length))
        x = take_along_time(x, position)
        # Not `where` on booleans, which a runtime of ONNX lacks.
        is_mask = keras.backend.standardize_dtype(x.dtype) == "bool"
        return ops.logical_and(inside, x) if is_mask else x * ops.cast(inside, x.dtype)

    def has_key_at_each_of(self, query_sizes):
        """Whether, for all that is known, a key stands where each query of such a grid does."""
        sizes = zip(query_sizes, self.key_grid or (self.key_length,))
        return all(is_at_most(queries, keys) for queries, keys in sizes)

    def block(self):
        """The number of queries along an axis that share a band."""
        least = LEAST_BLOCK if self.num_axes == 1 else max(2, LEAST_BLOCK // 4)
        return min(max(self.size, least), MOST_BLOCK)

    def has_bands(self, is_causal):
        """Whether to work in bands: every query asked for, and fewer pairs in bands than in all."""
        if len(self.position.shape) == 2:
            return False
        if is_causal and not self._has_equal_rows():
            return False  # Raster order need not be that of coordinates.
        sizes = (*(self.query_grid or self.position.shape), self.key_length)
        if not all(isinstance(size, int) for size in sizes):
            return True
        num_queries = math.prod(sizes[:-1])
        return self.num_pairs(num_queries, is_causal) < num_queries * self.key_length

    def num_pairs(self, num_queries, is_causal):
        """How many products of a query and a key bands hold."""
        bands = _Bands(self, num_queries, is_causal)
        in_bands = bands.num_queries * (math.prod(bands.widths) + self.global_tokens)
        return in_bands + self.global_tokens * self.key_length

    def _has_equal_rows(self):
        """Whether the rows of both grids are known to be as long."""
        if self.query_grid is None or self.key_grid is None:
            return True
        rows = self.query_grid[1:], self.key_grid[1:]
        return all(isinstance(size, int) for row in rows for size in row) and rows[0] == rows[1]


def banded_attention(query, examples, attend):
    """Attention of each query over the band of keys its window cuts out.

    Every block of queries, with the slab of keys that it reaches, is a sequence of its
    own. Time and memory grow with queries times the width of a band; no tensor has
    an axis of queries and one of all keys.

    Args:
        query: vectors of the queries, `(B, T, H, F)`.
        examples: `Examples` with a `window`, and with vectors for keys.
        attend: function from queries `(b, t, H, F)` and `Examples` that only `visible`
            limits to outputs `(b, t, H, Dv)`.

    Returns:
        The output, `(B, T, H, Dv)`.
    """
    window = examples.window
    bands = _Bands(window, ops.shape(query)[1], examples.is_causal)
    tokens = _GlobalTokens.of(window, examples) if window.global_tokens else None

    def slabs(name):
        x = getattr(examples, name)
        if x is None:
            return None
        x = bands.slabs(x)
        if tokens is not None:
            x = append(x, ops.expand_dims(getattr(tokens, name), axis=1), axis=2)
        return join_axes(x, 0)

    batch, visible = ops.shape(query)[0], bands.visibility()
    visible = ops.broadcast_to(visible, (batch, *ops.shape(visible)[1:]))
    if tokens is not None:
        visible = append(visible, tokens.visibility(bands), axis=3)
    visible = ops.expand_dims(join_axes(visible, 0), axis=1)
    in_slabs = _seen_by(
        visible,
        examples,
        key=slabs("key"),
        value=slabs("value"),
        log_scale=slabs("log_scale"),
        all_are_sighted=examples.mask is None and window.has_key_at_each_of(bands.query_sizes),
    )
    output = attend(join_axes(bands.blocks(query), 0), in_slabs)
    output = bands.unblock(output, batch)
    return output if tokens is None else tokens.answer(output, query, examples, attend)


def _seen_by(visible, examples, **changes):
    """`examples` with changes, of which `visible` alone says who sees them."""
    return replace(
        examples,
        mask=None,
        limit=None,
        is_triangular=False,
        visible=visible,
        window=None,
        grid=None,
        **changes,
    )


class _Bands:
    """Cuts axes of queries into blocks, and those of keys into the slabs these blocks see.

    A dilated window is a plain one on each residue class of positions, so the
    classes are set side by side first.
    """

    def __init__(self, window, query_length, is_causal):
        self.window = window
        self.num_axes = window.num_axes
        self.block = window.block()
        self.is_causal = is_causal
        self.reach = window.size - 1
        self.query_sizes = window.query_grid or (query_length,)
        self.num_blocks = [
            (size + self.block * window.dilation - 1) // (self.block * window.dilation)
            for size in self.query_sizes
        ]

    def ahead(self, axis):
        """How far a query sees along `axis`; in raster order a causal one sees no later row."""
        return 0 if self.is_causal and axis == 0 else self.reach

    @property
    def num_queries(self):
        """The number of queries, and of what fills up their blocks."""
        return math.prod([n * self.block * self.window.dilation for n in self.num_blocks])

    @property
    def widths(self):
        """The number of keys in a slab along each axis."""
        return [self.block + self.reach + self.ahead(axis) for axis in range(self.num_axes)]

    def visibility(self):
        """Boolean `(B or 1, N, block, slab)`: which query of a block sees which key of its slab.

        Of global tokens, none is seen as one of a slab.
        """
        valid = self.window.valid
        if self.window.global_tokens:
            valid = ops.logical_and(valid, ops.logical_not(self.window.is_global()))
        valid = ops.expand_dims(self.slabs(valid), axis=2)
        return ops.logical_and(valid, ops.convert_to_tensor(self._near()))

    def _near(self):
        """`visibility` in any slab of valid keys, `(block, slab)`."""
        differences = []
        for axis in range(self.num_axes):
            query = np.arange(self.block)
            key = np.arange(-self.reach, self.block + self.ahead(axis))
            difference = np.subtract.outer(query, key)
            shape = [1] * (2 * self.num_axes)
            shape[axis], shape[self.num_axes + axis] = difference.shape
            differences.append(difference.reshape(shape))
        differences = np.broadcast_arrays(*differences)
        near = np.all([np.abs(difference) <= self.reach for difference in differences], axis=0)
        if self.is_causal:
            past, tied = np.zeros_like(near), np.ones_like(near)
            for difference in differences:
                past |= tied & (difference > 0)
                tied &= difference == 0
            near = near & (past | tied)
        return near.reshape(self.block**self.num_axes, -1)

    def blocks(self, x):
        """Cuts `(B, T, *rest)` into `(B, N, block, *rest)`."""
        x = to_grid(x, self.window.query_grid)
        for axis, count in enumerate(self.num_blocks):
            x = fit_axis(x, 1 + axis, count * self.block * self.window.dilation)
        x = self._classes(x)
        for axis in range(self.num_axes):
            x = split_axis(x, 2 + 2 * axis, self.block)
        return self._gather(x)

    def slabs(self, x):
        """Cuts `(B, S, *rest)` into `(B, N, slab, *rest)`, zeros beyond the ends."""
        x, dilation = to_grid(x, self.window.key_grid), self.window.dilation
        for axis, count in enumerate(self.num_blocks):
            size = (count - 1 + -(-self.widths[axis] // self.block)) * self.block
            front = self.reach * dilation
            x = fit_axis(x, 1 + axis, size * dilation - front, front=front)
        x = self._classes(x)
        for axis, (count, width) in enumerate(zip(self.num_blocks, self.widths)):
            x = overlapping(x, 2 + 2 * axis, count, width, self.block)
        return self._gather(x)

    def _classes(self, x):
        """Turns `(B, *grid, *rest)` into `(B, classes, *(count * block), *rest)`."""
        dilation = self.window.dilation
        if dilation == 1:
            return ops.expand_dims(x, axis=1)
        shape = ops.shape(x)
        batch, grid, rest = shape[0], shape[1 : 1 + self.num_axes], shape[1 + self.num_axes :]
        sizes = tuple(size // dilation for size in grid)
        split = tuple(part for size in sizes for part in (size, dilation))
        x = native.reshape(x, (batch,) + split + tuple(rest))
        inner = list(range(1, 1 + 2 * self.num_axes))
        tail = list(range(1 + 2 * self.num_axes, len(x.shape)))
        x = ops.transpose(x, [0] + inner[1::2] + inner[::2] + tail)
        return native.reshape(x, (batch, dilation**self.num_axes) + sizes + tuple(rest))

    def _gather(self, x):
        """Turns `(B, classes, n, width, *rest)`, a pair an axis, into `(B, N, slab, *rest)`."""
        shape, end = ops.shape(x), 2 + 2 * self.num_axes
        counts, widths = list(range(2, end, 2)), list(range(3, end, 2))
        x = ops.transpose(x, [0, 1, *counts, *widths, *range(end, len(shape))])
        count, width = (
            math.prod([shape[axis] for axis in axes]) for axes in ([1, *counts], widths)
        )
        return native.reshape(x, (shape[0], count, width, *shape[end:]))

    def unblock(self, x, batch):
        """Undoes `blocks` for `x`, `(B * N, block, *rest)`."""
        dilation, axes = self.window.dilation, self.num_axes
        rest = tuple(ops.shape(x)[2:])
        x = native.reshape(
            x,
            (batch,) + (dilation,) * axes + tuple(self.num_blocks) + (self.block,) * axes + rest,
        )
        order = [0]
        for axis in range(1, 1 + axes):
            order += [axis + axes, axis + 2 * axes, axis]
        x = ops.transpose(x, order + list(range(1 + 3 * axes, len(x.shape))))
        sizes = tuple(count * self.block * dilation for count in self.num_blocks)
        x = native.reshape(x, (batch,) + sizes + rest)
        for axis, size in enumerate(self.query_sizes):
            x = x[(slice(None),) * (1 + axis) + (slice(0, size),)]
        return from_grid(x, axes)


@dataclasses.dataclass(frozen=True, eq=False)
class _GlobalTokens:
    """The global tokens of each sequence, taken together.

    Attributes:
        position: integer `(B or 1, g)`.
        exists: boolean `(B or 1, g)`, False where a sequence has fewer valid keys.
        key, value: `(B, g, H, ...)`.
        log_scale: `(B, g, H)`, or `None`.
    """

    position: Any
    exists: Any
    key: Any
    value: Any
    log_scale: Any

    @classmethod
    def of(cls, window, examples):
        valid, rank = window.valid, window.rank()
        nth = ops.expand_dims(ops.arange(window.global_tokens, dtype="int32"), axis=-1)
        found = ops.logical_and(
            ops.expand_dims(valid, axis=1), ops.equal(ops.expand_dims(rank, axis=1), nth)
        )
        position = ops.cast(ops.argmax(ops.cast(found, "int32"), axis=-1), "int32")
        exists = ops.any(found, axis=-1)
        index = ops.broadcast_to(position, (ops.shape(examples.key)[0], window.global_tokens))

        def take(x):
            return None if x is None else take_along_time(x, index)

        return cls(
            position, exists, take(examples.key), take(examples.value), take(examples.log_scale)
        )

    def visibility(self, bands):
        """Boolean `(B or 1, N or 1, block or 1, g)`: which query of a block sees which token."""
        window, seen = bands.window, ops.expand_dims(self.exists, axis=(1, 2))
        token = ops.expand_dims(self.position, axis=(1, 2))
        position = ops.expand_dims(bands.blocks(ops.expand_dims(window.position, 0)), axis=-1)
        seen = masks.intersect(seen, window.within_reach(position, token))
        if bands.is_causal:
            seen = masks.intersect(seen, token <= position)
        return seen

    def answer(self, output, query, examples, attend):
        """Puts the outputs of queries that stand on global tokens, which see all, in place."""
        window = examples.window
        last = ops.shape(query)[1] - 1
        index = ops.broadcast_to(self.position, ops.shape(self.key)[:2])
        asked = take_along_time(query, native.at_most(index, last))
        visible = ops.expand_dims(window.valid, axis=1)
        key, position = ops.arange(window.key_length, dtype="int32"), append_axes(self.position, 1)
        visible = masks.intersect(visible, window.within_reach(position, key))
        if examples.is_causal:
            visible = masks.intersect(visible, key <= position)
        answers = attend(asked, _seen_by(ops.expand_dims(visible, axis=1), examples))
        is_global = window.at_queries(window.is_global(), window.position)
        rank = ops.minimum(window.rank(), window.global_tokens - 1)
        rank = window.at_queries(rank, window.position)
        rank = ops.broadcast_to(rank, ops.shape(output)[:2])
        return ops.where(append_axes(is_global, 2), take_along_time(answers, rank), output)
