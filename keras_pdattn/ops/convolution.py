"""Depthwise convolution of queries and keys, along a sequence or over a grid."""

import functools
import itertools
import operator

from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.dtypes import widen
from keras_pdattn.ops.indexing import from_grid, to_grid


def depthwise(x, kernel, grid=None, taps=lambda offset: True):
    """Sums neighbours of each position, weighted for each head and feature.

    Zeros lie beyond the ends ("same" padding).

    Args:
        x: tensor `(B, T, H, D)`, zero where it is padding.
        kernel: tensor `(k, H, D)`, or `(k, k, H, D)` for a grid of two axes,
            with k odd.
        grid: sizes of the axes that time runs over in raster order; `None` for one.
        taps: function from the offset of a neighbour, a tuple with an integer
            for each axis, to whether it is taken in.

    Returns:
        Tensor `(B, T, H, D)`, float32 or wider.
    """
    x = to_grid(widen(x), grid)
    kernel = ops.cast(kernel, x.dtype)
    sizes = tuple(kernel.shape[:-2])
    margins = [(size // 2, size // 2) for size in sizes]
    padded = native.pad(x, [(0, 0)] + margins + [(0, 0), (0, 0)])
    terms = []
    for tap in itertools.product(*(range(size) for size in sizes)):
        offset = tuple(at - size // 2 for at, size in zip(tap, sizes))
        if taps(offset):
            window = tuple(slice(at, at - size + 1 or None) for at, size in zip(tap, sizes))
            terms.append(kernel[tap] * padded[(slice(None),) + window])
    total = functools.reduce(operator.add, terms) if terms else ops.zeros_like(x)
    return from_grid(total, len(sizes))


def past_or_present(offset):
    """Whether a neighbour comes no later in raster order."""
    return offset <= (0,) * len(offset)


def past(offset):
    """Whether a neighbour comes earlier in raster order."""
    return offset < (0,) * len(offset)
