"""The dual form: attention through the weights of all pairs of a query and an example."""

import dataclasses
from typing import Any

from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.blocks import cut_in_blocks, map_blocks, map_heads, num_blocks
from keras_pdattn.ops.dtypes import cast, widen
from keras_pdattn.ops.indexing import slices, swap_heads_and_time
from keras_pdattn.ops.kernels import for_products, share, weighted_sums
from keras_pdattn.ops.records import replace
from keras_pdattn.ops.windows import banded_attention

#: Up to how many weights are held at once, those of all heads and sequences; how many rows of
#: them, those of one sequence; and the least queries that share a block. The most of each and of
#: the next are what `benchmarks/blocks.py` measures.
MOST_WEIGHTS, MOST_ROWS = 2**22, 2**11
LEAST_BLOCK = 32
#: From how many weights of one head on XLA on a CPU is faster with one after the other, whose
#: weights stay in its caches; how many at once, and the least queries of these.
LEAST_APART = 2**18
MOST_OF_HEAD, LEAST_OF_HEAD = 2**20, 64
#: Into how many pieces causal queries are cut at most, and for how many queries there is one.
MOST_PIECES, LEAST_PIECE = 4, 1024
#: What queries of a block are a multiple of, which matrix products take together.
ROWS_AT_ONCE = 8
#: Up to how many weights of one sequence are written down whole, even if blocks would be smaller,
#: unless heads are apart.
MOST_WHOLE = 2**21
#: How many times as many there may be on a GPU, which small blocks would leave idle.
TIMES_ON_GPU = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Operands:
    """What matrix products of the dual form are made of, heads first.

    Examples are columns, whose gradients are products that XLA on a CPU works at five times the
    rate of those of rows.

    Attributes:
        query: `(B, H, T, F)`.
        key: `(B, H, F, M)`.
        value: `(B, H, Dv, M)`.
        log_scale: `(B, H, 1, M)`, or `None`.
        own_key: `(B, H, T, F)`; `None` without own examples, as those below.
        own_value: `(B, H, T, Dv)`.
        own_log_scale: `(B, H, T)`, or `None`.
    """

    query: Any
    key: Any
    value: Any
    log_scale: Any = None
    own_key: Any = None
    own_value: Any = None
    own_log_scale: Any = None

    #: Those with an entry for each query.
    OF_QUERIES = ("query", "own_key", "own_value", "own_log_scale")

    @classmethod
    def of(cls, query, examples):
        """From vectors of the queries, `(B, T, H, F)`, and `Examples` with vectors for keys."""
        examples = examples.with_keys(widen)
        log_scale, own = examples.log_scale, examples.own
        operands = cls(
            query=swap_heads_and_time(widen(query)),
            key=_in_columns(examples.key),
            value=_in_columns(for_products(examples.value)),
            log_scale=None if log_scale is None else _row(log_scale),
        )
        if own is None:
            return operands
        log_scale = own.log_scale
        return replace(
            operands,
            own_key=swap_heads_and_time(own.key),
            own_value=swap_heads_and_time(for_products(own.value)),
            own_log_scale=None if log_scale is None else ops.transpose(log_scale, (0, 2, 1)),
        )

    def tensors(self):
        """Those there are, by name."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: x for name, x in found.items() if x is not None}

    def weigh(self, examples, weigh):
        """Weights of the examples, `(B, H, T, M)`, and of own ones, `(B, H, T, 1)`; their total."""
        products = _einsum_of_heads("tf,fm->tm", self.query, self.key)
        parts = [(products, self.log_scale, examples.visibility())]
        if self.own_key is not None:
            # No column of the others: to join them takes longer than these themselves.
            products = ops.sum(self.query * self.own_key, axis=-1)
            own = products, self.own_log_scale, examples.own.visibility()
            parts.append(tuple(None if x is None else ops.expand_dims(x, axis=-1) for x in own))
        return weigh(parts)

    def weighted_values(self, weights, total, dropout=None):
        """Sums of values, `(B, H, T, Dv)`, and what is yet to share them; see `weighted_sums`."""
        dropouts = None
        if dropout is not None:
            dropouts = [dropout.of_part(index) for index in range(len(weights))]

        def multiply(weights):
            weights, *of_own = weights
            sums = _einsum_of_heads("tm,dm->td", weights, self.value)
            return sums + of_own[0] * self.own_value if of_own else sums

        return weighted_sums(weights, total, dropouts, multiply, self.value.dtype)


def _einsum_of_heads(equation, x, y):
    """`ops.einsum` of matrices, those of each head of each sequence; `equation` is of one head.

    One head alone is given as matrices: only in their products does XLA on a CPU choose which
    side comes first, and the gradient of columns takes a fifth of the time if these come last.
    Not on torch, which would export models that take one sequence alone.
    """
    if not native.IS_TORCH and x.shape[:2] == y.shape[:2] == (1, 1):
        product = ops.einsum(equation, x[0, 0], y[0, 0])
        return ops.expand_dims(product, axis=(0, 1))
    equation = equation.replace(",", ",bh").replace("->", "->bh")
    return ops.einsum(f"bh{equation}", x, y)


def _in_columns(x):
    """Turns `(B, M, H, D)` into `(B, H, D, M)`."""
    return ops.transpose(x, (0, 2, 3, 1))


def _row(log_scale):
    """Turns `(B, M, H)` into `(B, H, 1, M)`."""
    return ops.expand_dims(ops.transpose(log_scale, (0, 2, 1)), axis=2)


def dual_attention(query, examples, weigh, dropout=None, return_weights=True, form=None):
    """Attention through its weights, one for each query and example that it may see.

    Args:
        query: vectors of the queries, `(B, T, H, F)`.
        examples: `Examples` with vectors for keys, F wide; products of the two
            give the kernel.
        weigh: function from parts, each `(products, log_scale, visible)`, to
            `(weights, total)`: `masked_softmax` or `masked_kernel`.
        dropout: `Dropout` of the weights, or `None`.
        return_weights: whether the weights are wanted. If not, they are never
            written down for keys outside of a window.
        form: `"whole"` to write down all weights at once, `"blocks"` those of a block of
            queries at a time; `None` for what `dual_form` says.

    Returns:
        `(output, weights, own_weights)`: `(B, T, H, Dv)`, and before dropout
        `(B, H, T, M)` and `(B, H, T)` (`None` without own examples).
    """
    if form is None and examples.has_bands() and not return_weights:

        def attend(query, examples):
            return dual_attention(query, examples, weigh, dropout, False, form="whole")[0]

        return banded_attention(query, examples, attend), None, None
    form = form or dual_form(query.shape, examples.key.shape[1], native.is_eager(query))
    in_blocks = form == "blocks" and not return_weights
    pieces = causal_pieces(query.shape[1], examples) if in_blocks else []
    if len(pieces) > 1:
        return _attend_in_pieces(query, examples, weigh, dropout, pieces), None, None
    dtype = examples.value.dtype
    operands = Operands.of(query, examples)
    if in_blocks:
        output = _attend_in_blocks(operands, examples, weigh, dropout)
        return cast(swap_heads_and_time(output), dtype), None, None
    weights, total = operands.weigh(examples, weigh)
    output = share(*operands.weighted_values(weights, total, dropout))
    output = cast(swap_heads_and_time(output), dtype)
    if not return_weights:
        return output, None, None
    weights, *of_own = [share(part, total) for part in weights]
    return output, weights, of_own[0][..., 0] if of_own else None


def causal_pieces(length, examples):
    """Slices of causal queries that each get the examples up to the last of them alone.

    A loop over blocks takes the same examples for all: so fewer pairs are looked at that nobody
    sees. Each piece takes a compiler its time.
    """
    if not (examples.is_causal and examples.query_start is None and isinstance(length, int)):
        return []
    count = min(MOST_PIECES, max(length // LEAST_PIECE, 1))
    return slices(length, -(-length // count))


def _attend_in_pieces(query, examples, weigh, dropout, pieces):
    outputs = []
    for index, piece in enumerate(pieces):
        its_query, its_examples = query[:, piece], examples.of_block(piece)
        its_dropout = None if dropout is None else dropout.of_piece(index)
        # In blocks however short, lest weights of several pieces are held at once.
        output, _, _ = dual_attention(its_query, its_examples, weigh, its_dropout, False, "blocks")
        outputs.append(output)
    return native.concatenate(outputs, axis=1)


def _attend_in_blocks(operands, examples, weigh, dropout):
    """The output, `(B, H, T, Dv)`, for one block of queries after the other."""
    batch, num_heads, length, _ = operands.query.shape
    num_examples = operands.key.shape[3]
    are_apart = takes_heads_apart(length, num_examples, native.is_eager(operands.query))
    if are_apart:
        block = block_of_head(length, num_examples)
    else:
        block = block_size(batch, num_heads, length, num_examples)
    seen = _seen_in_blocks(operands, examples, block)
    if not are_apart:
        return _attend_block_by_block(operands, seen, weigh, dropout, block)

    def attend(tensors, *head):
        sequence, index = head
        # Blocks of a head come one after the other, as seeds of dropout do.
        first = (sequence * num_heads + index) * num_blocks(length, block)
        its_dropout = None if dropout is None else dropout.of_block(first)

        def seen_by_head(index):
            return seen(index).of_head(*head)

        return _attend_block_by_block(Operands(**tensors), seen_by_head, weigh, its_dropout, block)

    return map_heads(attend, operands.tensors())


def _seen_in_blocks(operands, examples, block):
    """Function from the index of a block to the examples as its queries see them.

    For where the block is worked: of what a loop over heads reads before, it would keep one for
    each head until a backward pass.
    """
    length = ops.shape(operands.query)[2]
    limits = {
        name: cut_in_blocks(x, axis, length, block)
        for name, (x, axis) in examples.by_query().items()
    }

    def seen(index):
        return examples.of_queries({name: native.entry(x, index) for name, x in limits.items()})

    return seen


def _attend_block_by_block(operands, seen, weigh, dropout, block):
    """The output for one block after the other, `seen(index)` being its examples."""
    tensors = operands.tensors()
    by_query = {name: tensors.pop(name) for name in Operands.OF_QUERIES if name in tensors}

    def attend(tensors, index):
        operands = Operands(**tensors)
        its_dropout = None if dropout is None else dropout.of_block(index)
        weights, total = operands.weigh(seen(index), weigh)
        return operands.weighted_values(weights, total, its_dropout)

    length = ops.shape(operands.query)[2]
    # Divided here, sums need not be worked again for the gradient of their total.
    return share(*map_blocks(attend, tensors, by_query, length, block))


def takes_heads_apart(length, num_examples, is_eager=False):
    """Whether one head after the other is worked; not if operations run as they come."""
    if is_eager or native.IS_TORCH or native.runs_on_gpu():
        return False
    is_known = isinstance(length, int) and isinstance(num_examples, int)
    return is_known and length * num_examples >= LEAST_APART


def block_of_head(length, num_examples):
    """How many queries of one head share a block."""
    return _even_block(length, max(MOST_OF_HEAD // num_examples, LEAST_OF_HEAD))


def block_size(batch, num_heads, length, num_examples):
    """How many queries share a block."""
    times = _times()
    # On JAX a size that is not known is a symbol, which can't be compared.
    of_query = num_examples if isinstance(num_examples, int) else times * MOST_WEIGHTS
    of_query *= _all_heads(batch, num_heads)
    most = min(times * MOST_WEIGHTS // max(of_query, 1), times * MOST_ROWS // num_heads)
    return _even_block(length, max(most, LEAST_BLOCK))


def _even_block(length, most):
    """The size of blocks, `most` at most, of which the last one is nearly full."""
    most -= most % ROWS_AT_ONCE
    if not isinstance(length, int):
        return most
    count = max(num_blocks(length, most), 1)
    return max(num_blocks(length, count * ROWS_AT_ONCE), 1) * ROWS_AT_ONCE


def dual_form(query_shape, num_examples, is_eager=False):
    """Whether to write down weights `"whole"` or in `"blocks"`, `query_shape` as `(B, T, H, F)`."""
    batch, length, num_heads, _ = query_shape
    if native.is_tracing():
        return "whole"
    if not isinstance(length, int):
        return "blocks"
    if length <= 2 * LEAST_BLOCK:
        return "whole"
    if not isinstance(num_examples, int) or takes_heads_apart(length, num_examples, is_eager):
        return "blocks"
    times, of_head = _times(), length * num_examples
    is_short = num_heads * of_head <= times * MOST_WHOLE
    if isinstance(batch, int):
        # A block of its own would be worked again in the backward pass for nothing.
        is_short = is_short or length <= block_size(batch, num_heads, length, num_examples)
    are_few = _all_heads(batch, num_heads) * of_head <= times * 2 * MOST_WEIGHTS
    return "whole" if is_short and are_few else "blocks"


def _all_heads(batch, num_heads):
    """The number of heads of all sequences; of one where it is not known how many there are."""
    return num_heads * (batch if isinstance(batch, int) else 1)


def _times():
    return TIMES_ON_GPU if native.runs_on_gpu() else 1
