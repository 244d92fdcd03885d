"""Causal attention by its definition: each query fitted on its own prefix, a block at a time."""

from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.indexing import join_axes
from keras_pdattn.ops.records import replace

#: Queries whose prefixes are held at once: their memory is that many times the keys'.
BLOCK = 16


def num_prefixes(query_length):
    """How many prefixes are solved for that many queries: whole blocks of them, but for few."""
    return query_length if query_length <= BLOCK else -(-query_length // BLOCK) * BLOCK


def prefix_by_prefix(solve, queries, keys, dropout, is_pointwise):
    """Solves, for each query, the problem of the keys up to it.

    For members that can't serve all queries of a causal call at once. Every
    query becomes a sequence of its own, whose keys beyond it are padding.

    Args:
        solve: function from `Queries`, `Examples` and `dropout` to `(output, scores)`.
        queries: `Queries`, T of them.
        keys: `Examples` that are the keys themselves, S of them.
        dropout: `Dropout`, or `None`.
        is_pointwise: whether transforms look at each query alone.

    Returns:
        `(output, scores)`, scores `None` where `solve` gives none.
    """
    query_length = ops.shape(queries.x)[1]
    native.refuse_tracing("This member in a causal call")
    if isinstance(query_length, int) and query_length <= BLOCK:
        positions = ops.arange(query_length, dtype="int32")
        return _solve_at(positions, solve, queries, keys, dropout, is_pointwise)
    count = (query_length + BLOCK - 1) // BLOCK
    positions = native.at_most(ops.arange(count * BLOCK, dtype="int32"), query_length - 1)

    def solve_block(block):
        index, positions = block
        its_dropout = None if dropout is None else dropout.of_block(index)
        output, scores = _solve_at(positions, solve, queries, keys, its_dropout, is_pointwise)
        return (output,) if scores is None else (output, scores)

    blocks = ops.arange(count, dtype="int32"), native.reshape(positions, (count, BLOCK))
    output, *scores = native.map(solve_block, blocks)
    output = join_axes(ops.moveaxis(output, 0, 1), 1)[:, :query_length]
    if not scores:
        return output, None
    return output, join_axes(ops.moveaxis(scores[0], 0, 2), 2)[:, :, :query_length]


def _solve_at(positions, solve, queries, keys, dropout, is_pointwise):
    """Solves for the queries at `positions`, `(n,)`."""
    batch, key_length = ops.shape(keys.key)[0], ops.shape(keys.key)[1]
    count = ops.shape(positions)[0]

    def rows(x):
        """Gives each prefix a copy of its sequence."""
        return ops.repeat(x, count, axis=0)

    def prefix_mask(mask, length, ends):
        reached = ops.arange(length, dtype="int32") <= ops.expand_dims(ends, axis=-1)
        reached = ops.tile(reached, (batch, 1))
        return reached if mask is None else ops.logical_and(reached, rows(mask))

    end = ops.tile(positions, (batch,))
    if is_pointwise:
        x = native.take(queries.x, positions, axis=1)
        x = native.reshape(x, (batch * count, 1) + tuple(ops.shape(x)[2:]))
        prefix_queries = replace(queries, x=x, mask=None, end=end)
    else:
        length = ops.shape(queries.x)[1]
        prefix_queries = replace(
            queries, x=rows(queries.x), mask=prefix_mask(queries.mask, length, positions), end=end
        ).zero_padding()
    visible = keys.visible
    if visible is not None:
        if visible.shape[2] != 1:
            visible = native.take(visible, positions, axis=2)
        visible = ops.transpose(visible, (0, 2, 1, 3))
        heads_and_keys = tuple(ops.shape(visible)[2:])
        visible = ops.broadcast_to(visible, (batch, count) + heads_and_keys)
        visible = ops.expand_dims(
            native.reshape(visible, (batch * count,) + heads_and_keys), axis=2
        )
    prefix_keys = replace(
        keys,
        key=rows(keys.key),
        value=rows(keys.value),
        mask=prefix_mask(
            keys.mask, key_length, positions if queries.start is None else positions + queries.start
        ),
        limit=None,
        is_triangular=False,
        is_prefix=True,
        visible=visible,
    ).zero_padding()
    output, scores = solve(prefix_queries, prefix_keys, dropout=dropout)
    output = native.reshape(output, (batch, count) + tuple(ops.shape(output)[2:]))
    if scores is not None:
        shape = ops.shape(scores)
        scores = native.reshape(scores, (batch, count, shape[1], shape[3]))
        scores = ops.transpose(scores, (0, 2, 1, 3))
    return output, scores
