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
        by_query: dict of tensors `(B, H, T, ...)`.
        length: the number of queries, T.
        block: how many make a block.

    Returns:
        Tuple of tensors `(B, H, T, D)`.
    """

    def solve_block(pieces):
        index, *pieces = pieces

        # TensorFlow finds no gradient of what a rematerialised function closes over.
        @keras.remat
        def solve(*tensors):
            return function(dict(zip((*shared, *by_query), tensors)), index)

        return solve(*shared.values(), *pieces)

    pieces = [cut_in_blocks(x, 2, length, block) for x in by_query.values()]
    indices = ops.arange(num_blocks(length, block), dtype="int32")
    found = native.map(solve_block, (indices, *pieces))
    return tuple(join_axes(ops.moveaxis(x, 0, 2), 2)[:, :, :length] for x in found)


def cut_in_blocks(x, axis, length, block):
    """Blocks of `x` along `axis`, of that `length`, the last filled up with zeros; on axis 0."""
    filled = fit_axis(x, axis, num_blocks(length, block) * block)
    return ops.moveaxis(split_axis(filled, axis, block), axis, 0)


def num_blocks(length, block):
    """How many blocks there are, the last one perhaps not full."""
    return (length + block - 1) // block


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
