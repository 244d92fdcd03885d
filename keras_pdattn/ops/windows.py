"""Sliding windows: which query sees which key, and attention over the bands that they cut out."""

import dataclasses
import math
from typing import Any

import numpy as np
from keras import ops

from keras_pdattn.ops import masks
from keras_pdattn.ops.indexing import (
    append_axes,
    coordinates,
    fit_axis,
    from_grid,
    join_axes,
    split_axis,
    take_along_time,
    to_grid,
)

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
        inside = position < self.key_length
        position = ops.minimum(position, self.key_length - 1)
        if len(position.shape) == 2:
            x = ops.broadcast_to(x, (ops.shape(position)[0], self.key_length))
        return ops.where(inside, take_along_time(x, position), ops.zeros((1, 1), dtype=x.dtype))

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
        in_bands = bands.num_queries * (bands.width + self.global_tokens)
        return in_bands + self.global_tokens * self.key_length

    def _has_equal_rows(self):
        """Whether the rows of both grids are known to be as long."""
        if self.query_grid is None or self.key_grid is None:
            return True
        rows = self.query_grid[1:], self.key_grid[1:]
        return all(isinstance(size, int) for row in rows for size in row) and rows[0] == rows[1]


def banded_attention(query, examples, weigh, dropout=None):
    """Attention of each query over the band of keys its window cuts out.

    Time and memory grow with queries times the width of a band; no tensor has
    an axis of queries and one of all keys.

    Args:
        query: vectors of the queries, `(B, T, H, F)`.
        examples: `Examples` with a `window`, and with vectors for keys.
        weigh: function from `(products, log_scale, visible)` to weights.
        dropout: function applied to the weights, or `None`.

    Returns:
        The output, `(B, T, H, Dv)`, in the dtype of the value.
    """
    window, value, is_causal = examples.window, examples.value, examples.is_causal
    bands = _Bands(window, ops.shape(query)[1], is_causal)
    valid = window.valid
    if window.global_tokens:
        is_global = window.is_global()
        valid = ops.logical_and(valid, ops.logical_not(is_global))
    blocks = bands.blocks(query)
    products = ops.einsum("bnqhf,bnkhf->bhnqk", blocks, bands.slabs(examples.key))
    visible = ops.logical_and(
        ops.expand_dims(bands.slabs(valid), axis=(1, 3)), ops.convert_to_tensor(bands.near())
    )
    log_scale = examples.log_scale
    if log_scale is not None:
        log_scale = ops.transpose(bands.slabs(log_scale), (0, 3, 1, 2))
        log_scale = ops.expand_dims(log_scale, axis=3)
    if window.global_tokens:
        tokens = _GlobalTokens.of(window, examples)
        extra = ops.einsum("bnqhf,bghf->bhnqg", blocks, tokens.key)
        products = ops.concatenate([products, extra], axis=-1)
        seen = ops.expand_dims(tokens.exists, axis=(1, 2, 3))
        token = ops.expand_dims(tokens.position, axis=(1, 2, 3))
        position = ops.expand_dims(ops.arange(ops.shape(query)[1], dtype="int32"), axis=0)
        position = ops.expand_dims(bands.blocks(position), axis=(1, 4))
        seen = masks.intersect(seen, window.within_reach(position, token))
        if is_causal:
            seen = masks.intersect(seen, token <= position)
        visible = _join(visible, seen, products)
        if log_scale is not None:
            extra = ops.expand_dims(ops.transpose(tokens.log_scale, (0, 2, 1)), axis=(2, 3))
            log_scale = _join(log_scale, extra, products[:, :, :, :1])
    weights = weigh(products, log_scale, visible)
    weights = weights if dropout is None else dropout(weights)
    weights = ops.cast(weights, value.dtype)
    width = bands.width
    output = ops.einsum("bhnqk,bnkhd->bnqhd", weights[..., :width], bands.slabs(value))
    if window.global_tokens:
        output = output + ops.einsum("bhnqg,bghd->bnqhd", weights[..., width:], tokens.value)
    output = bands.unblock(output)
    if window.global_tokens:
        output = tokens.answer(output, query, examples, weigh, dropout)
    return output


def _join(first, second, like):
    """Concatenates along the last axis, all other axes broadcast to those of `like`."""
    lead = tuple(ops.shape(like)[:-1])
    return ops.concatenate(
        [ops.broadcast_to(x, lead + (ops.shape(x)[-1],)) for x in (first, second)], axis=-1
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
        return math.prod(n * self.block * self.window.dilation for n in self.num_blocks)

    @property
    def width(self):
        """The number of keys in a slab."""
        return math.prod(self.block + self.reach + self.ahead(a) for a in range(self.num_axes))

    def near(self):
        """Boolean `(block, slab)`, True where a query of a block sees a key of its slab."""
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
        return near.reshape(self.block**self.num_axes, self.width)

    def blocks(self, x):
        """Cuts `(B, T, *rest)` into `(B, N, block, *rest)`."""
        x = self._classes(to_grid(x, self.window.query_grid), self.num_blocks)
        return self._gather(x, [self.block] * self.num_axes)

    def slabs(self, x):
        """Cuts `(B, S, *rest)` into `(B, N, slab, *rest)`, zeros beyond the ends."""
        counts = [count + self._blocks_ahead(axis) for axis, count in enumerate(self.num_blocks)]
        x = self._classes(to_grid(x, self.window.key_grid), counts)
        widths = []
        for axis in range(self.num_axes):
            x = self._overlap(x, axis)
            widths.append(self.block + self.reach + self.ahead(axis))
        return self._gather(x, widths)

    def _blocks_ahead(self, axis):
        return -(-self.ahead(axis) // self.block)

    def _classes(self, x, counts):
        """Turns `(B, *grid, *rest)` into `(B, classes, *(count * block), *rest)`."""
        dilation, block = self.window.dilation, self.block
        for axis, count in enumerate(counts):
            x = fit_axis(x, 1 + axis, count * block * dilation)
        if dilation == 1:
            return ops.expand_dims(x, axis=1)
        shape = ops.shape(x)
        batch, rest = shape[0], tuple(shape[1 + self.num_axes :])
        split = tuple(size for count in counts for size in (count * block, dilation))
        x = ops.reshape(x, (batch,) + split + rest)
        inner = list(range(1, 1 + 2 * self.num_axes))
        tail = list(range(1 + 2 * self.num_axes, len(x.shape)))
        x = ops.transpose(x, [0] + inner[1::2] + inner[::2] + tail)
        sizes = tuple(count * block for count in counts)
        return ops.reshape(x, (batch, dilation**self.num_axes) + sizes + rest)

    def _overlap(self, x, axis):
        """Repeats along a grid axis what neighbouring blocks share: n blocks become n slabs."""
        block, ahead = self.block, self.ahead(axis)
        before, after = -(-self.reach // block), self._blocks_ahead(axis)
        axis = axis + 2
        if before:
            pads = [[0, 0]] * axis + [[before * block, 0]] + [[0, 0]] * (len(x.shape) - axis - 1)
            x = ops.pad(x, pads)
        x = split_axis(x, axis, block)
        lead = (slice(None),) * axis
        steps = before + after
        shifted = [x[lead + (slice(t, t - steps or None),)] for t in range(steps + 1)]
        x = ops.concatenate(shifted, axis=axis + 1) if steps else x
        trim = (before * block - self.reach, ahead - after * block)
        x = x[lead + (slice(None), slice(trim[0], trim[1] or None))]
        return join_axes(x, axis)

    def _gather(self, x, widths):
        """Turns `(B, classes, *(n * width), *rest)` into `(B, N, prod(widths), *rest)`."""
        shape = ops.shape(x)
        rest = tuple(shape[2 + self.num_axes :])
        split = tuple(
            size for count, width in zip(self.num_blocks, widths) for size in (count, width)
        )
        x = ops.reshape(x, (shape[0], shape[1]) + split + rest)
        inner = list(range(2, 2 + 2 * self.num_axes))
        tail = list(range(2 + 2 * self.num_axes, len(x.shape)))
        x = ops.transpose(x, [0, 1] + inner[::2] + inner[1::2] + tail)
        count = shape[1] * math.prod(self.num_blocks)
        return ops.reshape(x, (shape[0], count, math.prod(widths)) + rest)

    def unblock(self, x):
        """Undoes `blocks`."""
        dilation, axes = self.window.dilation, self.num_axes
        shape = ops.shape(x)
        batch, rest = shape[0], tuple(shape[3:])
        x = ops.reshape(
            x,
            (batch,) + (dilation,) * axes + tuple(self.num_blocks) + (self.block,) * axes + rest,
        )
        order = [0]
        for axis in range(1, 1 + axes):
            order += [axis + axes, axis + 2 * axes, axis]
        x = ops.transpose(x, order + list(range(1 + 3 * axes, len(x.shape))))
        sizes = tuple(count * self.block * dilation for count in self.num_blocks)
        x = ops.reshape(x, (batch,) + sizes + rest)
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

    def answer(self, output, query, examples, weigh, dropout):
        """Puts the outputs of queries that stand on global tokens, which see all, in place."""
        window = examples.window
        last = ops.shape(query)[1] - 1
        index = ops.broadcast_to(self.position, ops.shape(self.key)[:2])
        asked = take_along_time(query, ops.minimum(index, last))
        products = ops.einsum("bghf,bshf->bhgs", asked, examples.key)
        visible = ops.expand_dims(window.valid, axis=1)
        key, position = ops.arange(window.key_length, dtype="int32"), append_axes(self.position, 1)
        visible = masks.intersect(visible, window.within_reach(position, key))
        if examples.is_causal:
            visible = masks.intersect(visible, key <= position)
        visible = ops.expand_dims(visible, axis=1)
        log_scale = examples.log_scale
        if log_scale is not None:
            log_scale = ops.expand_dims(ops.transpose(log_scale, (0, 2, 1)), axis=2)
        weights = weigh(products, log_scale, visible)
        weights = weights if dropout is None else dropout(weights)
        weights = ops.cast(weights, examples.value.dtype)
        answers = ops.einsum("bhgs,bshd->bghd", weights, examples.value)
        is_global = window.at_queries(window.is_global(), window.position)
        rank = ops.minimum(window.rank(), window.global_tokens - 1)
        rank = window.at_queries(rank, window.position)
        rank = ops.broadcast_to(rank, ops.shape(output)[:2])
        return ops.where(append_axes(is_global, 2), take_along_time(answers, rank), output)
