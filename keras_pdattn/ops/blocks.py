"""Queries in blocks, and heads: what all pairs would take to hold is never held at once."""

import keras
from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.indexing import fit_axis, join_axes, split_axis


def map_blocks(function, shared, by_query, length, block):
    """Calls a function for one block of queries after the other, and joins the results.

    In a backward pass each block is worked again, so that it leaves nothing behind in a
    forward one.

    Args:
        function: from the tensors of a block, a dict, and the index of the block to a tuple
            of tensors `(B, H, block, D)`.
        shared: dict of tensors that are the same for all blocks.
        by_query: dict of pairs, a tensor and the axis along which it has one entry for each
            query; it is filled up with zeros to whole blocks.
        length: the number of queries, T.
        block: how many make a block.

    Returns:
        Tuple of tensors `(B, H, T, D)`.
    """
    count = (length + block - 1) // block

    def cut(x, axis):
        return ops.moveaxis(split_axis(fit_axis(x, axis, count * block), axis, block), axis, 0)

    def solve_block(pieces):
        index, *pieces = pieces
        tensors = {**shared, **dict(zip(by_query, pieces))}
        # TensorFlow finds no gradient of what a rematerialised function closes over.
        names = [name for name, x in tensors.items() if keras.backend.is_float_dtype(x.dtype)]

        @keras.remat
        def solve(*differentiable):
            return function({**tensors, **dict(zip(names, differentiable))}, index)

        return solve(*(tensors[name] for name in names))

    pieces = [cut(x, axis) for x, axis in by_query.values()]
    found = native.map(solve_block, (ops.arange(count, dtype="int32"), *pieces))
    return tuple(join_axes(ops.moveaxis(x, 0, 2), 2)[:, :, :length] for x in found)


def map_heads(function, tensors):
    """Calls a function for one head of one sequence after the other, and joins the results.

    Args:
        function: from the tensors of a head, a dict, and the index of its sequence and of it
            there to a tensor `(1, 1, T, D)`.
        tensors: dict of tensors `(B, H, ...)`.

    Returns:
        Tensor `(B, H, T, D)`.
    """
    batch, num_heads = ops.shape(next(iter(tensors.values())))[:2]

    def solve_head(pieces):
        index, *pieces = pieces
        pieces = [ops.expand_dims(x, axis=(0, 1)) for x in pieces]
        return function(dict(zip(tensors, pieces)), index // num_heads, index % num_heads)

    heads = [ops.reshape(x, (-1, *ops.shape(x)[2:])) for x in tensors.values()]
    output = native.map(solve_head, (ops.arange(batch * num_heads, dtype="int32"), *heads))
    return ops.reshape(output, (batch, num_heads, *ops.shape(output)[3:]))
