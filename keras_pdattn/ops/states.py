"""The primal form of a finite feature map: the weight matrix W, as a state that queries read.

Time grows with the length, not its square. The matrix of one head is the sum of
`features x values` over its training set; a further column, with ones for values, gives
the normaliser h. A causal query reads the state before its chunk of keys, and meets
the keys of the chunk itself in the dual form.
"""

from keras import ops

from keras_pdattn.ops.dtypes import cast, cumulative_sum, exp_of_at_most_zero, widen
from keras_pdattn.ops.indexing import (
    append_axes,
    delay,
    fit_axis,
    join_axes,
    split_axis,
    take_along_time,
    zero_where_masked,
)
from keras_pdattn.ops.kernels import share

#: Keys in a chunk of the causal form: as many as a state has rows, within these.
LEAST_CHUNK, MOST_CHUNK = 64, 256
#: The logarithm of the factor of a key that nobody sees.
UNSEEN = -1e30


def chunk_size(num_features):
    """The number of keys that a causal query may meet in the dual form."""
    return min(max(num_features, LEAST_CHUNK), MOST_CHUNK)


def is_cheaper(
    query_length, num_examples, num_features, dual_width, value_depth, is_causal, stride=1
):
    """Whether the primal form takes fewer multiplications than the dual one.

    Args:
        query_length: the number of queries; `None` if unknown.
        num_examples: the number of examples; `None` if unknown.
        num_features: width of the feature map.
        dual_width: width of the vectors whose products give the kernel.
        value_depth: depth of a value.
        is_causal: whether queries see prefixes.
        stride: queries to an example, if causal.
    """
    if not isinstance(query_length, int) or not isinstance(num_examples, int):
        return True
    sizes = query_length, num_examples, num_features, value_depth
    primal = multiply_adds(*sizes, is_causal, stride)
    return primal < query_length * num_examples * (dual_width + value_depth)


def multiply_adds(query_length, num_examples, num_features, value_depth, is_causal, stride=1):
    """Multiply-adds of the primal form, for one head.

    Args:
        query_length: the number of queries.
        num_examples: the number of examples.
        num_features: width of the feature map.
        value_depth: depth of a value.
        is_causal: whether queries see prefixes.
        stride: queries to an example, if causal.
    """
    state = num_features * (value_depth + 1)
    if not is_causal:
        return (query_length + num_examples) * state
    chunk = chunk_size(num_features)
    count = num_chunks(query_length, num_features, stride)
    rows = count * chunk * stride
    return (rows + count * chunk) * state + rows * chunk * (num_features + value_depth + 1)


def num_chunks(query_length, num_features, stride=1):
    """The number of chunks of a causal call, each with a state."""
    return -(-query_length // (chunk_size(num_features) * stride))


def primal_attention(query, examples):
    """Attention through states, without a weight for each query and key.

    Args:
        query: features of the queries, `(B, T, H, F)`.
        examples: `Examples` with features for keys, without `visible` and
            `window`.

    Returns:
        The output, `(B, T, H, Dv)`, in the dtype of the value.
    """
    key = zero_where_masked(examples.key, examples.mask)
    log_scale = examples.log_scale
    if log_scale is not None and examples.mask is not None:
        log_scale = ops.where(append_axes(examples.mask, 1), log_scale, UNSEEN)
    if examples.is_causal:
        value = _with_normaliser(examples.value)
        both, log_factor = _causal_sums(query, key, value, log_scale, examples)
        if examples.own is not None:
            both = _add_own(both, log_factor, query, examples.own)
        output, total = both[..., :-1], both[..., -1:]
    else:
        if log_scale is not None:
            largest = ops.stop_gradient(ops.max(log_scale, axis=1, keepdims=True))
            key = key * append_axes(ops.exp(log_scale - largest), 1)
        state = ops.einsum("bmhf,bmhd->bhfd", key, widen(examples.value))
        output = ops.einsum("bthf,bhfd->bthd", query, state)
        total = ops.einsum("bthf,bhf->bth", query, ops.sum(key, axis=1))
        total = ops.expand_dims(total, axis=-1)
    return cast(share(output, total), examples.value.dtype)


def _causal_sums(query, key, value, log_scale, examples):
    """Sums of kernel times `value` over what each query sees, `(B, T, H, Dv + 1)`.

    With them the logarithms `(B, T, H)` of the factors left off them, or `None`.
    """
    length, start = ops.shape(query)[1], examples.start
    if start is None:
        return _chunked_sums(query, key, value, log_scale, examples)
    # By step, so that the windows of all sequences begin a chunk together.
    step = ops.expand_dims(start, axis=1) + ops.arange(length, dtype="int32")
    query = take_along_time(query, ops.minimum(step, length - 1))
    sums, log_factor = _chunked_sums(query, key, value, log_scale, examples)
    step = ops.arange(length, dtype="int32") - ops.expand_dims(start, axis=1)
    # Those before the start see nothing, as the query at the first step.
    step = ops.maximum(step, 0)
    log_factor = None if log_factor is None else take_along_time(log_factor, step)
    return take_along_time(sums, step), log_factor


def _chunked_sums(query, key, value, log_scale, examples):
    """`_causal_sums` for queries by step: states before each chunk, products in it."""
    length, chunk = ops.shape(query)[1], chunk_size(key.shape[-1])
    rows, count = chunk * examples.stride, num_chunks(length, key.shape[-1], examples.stride)

    def chunks(x, size, fill=0):
        return split_axis(fit_axis(x, 1, count * size, fill), 1, size)

    query, key, value = chunks(query, rows), chunks(key, chunk), chunks(value, chunk)
    limit = ops.arange(rows, dtype="int32") // examples.stride
    limit = limit + 1 if examples.is_triangular else limit
    seen = ops.arange(chunk, dtype="int32") < ops.expand_dims(limit, axis=1)
    products = ops.where(seen, ops.einsum("bnqhf,bnkhf->bnhqk", query, key), 0.0)
    log_factor = None
    if log_scale is None:
        states = delay(cumulative_sum(_sums(key, value), axis=1))
        sums = ops.einsum("bnqhf,bnhfd->bnqhd", query, states)
    else:
        log_scale = chunks(log_scale, chunk, fill=UNSEEN)
        states, reached = _scaled_states(key, value, log_scale)
        sums = ops.einsum("bnqhf,bnhfd->bnqhd", query, states)
        # The largest factor that each query sees is left off its sums.
        log_scale = ops.expand_dims(ops.transpose(log_scale, (0, 1, 3, 2)), axis=3)
        largest = ops.max(ops.where(seen, log_scale, UNSEEN), axis=-1)
        largest = ops.maximum(largest, ops.expand_dims(reached, axis=-1))
        largest = ops.stop_gradient(largest)
        products = products * exp_of_at_most_zero(log_scale - append_axes(largest, 1))
        log_factor = ops.transpose(largest, (0, 1, 3, 2))
        sums = sums * append_axes(ops.exp(ops.expand_dims(reached, axis=2) - log_factor), 1)
        log_factor = join_axes(log_factor, 1)[:, :length]
    sums = sums + ops.einsum("bnhqk,bnkhd->bnqhd", products, value)
    return join_axes(sums, 1)[:, :length], log_factor


def _add_own(sums, log_factor, query, own):
    """Adds each query's own example to its sums, which carry a factor then that cancels."""
    key, log_scale = zero_where_masked(own.key, own.mask), own.log_scale
    kernel = ops.sum(query * key, axis=-1)
    if log_scale is not None:
        if own.mask is not None:
            log_scale = ops.where(append_axes(own.mask, 1), log_scale, UNSEEN)
        largest = ops.stop_gradient(ops.maximum(log_factor, log_scale))
        sums = sums * append_axes(ops.exp(log_factor - largest), 1)
        kernel = kernel * ops.exp(log_scale - largest)
    return sums + append_axes(kernel, 1) * _with_normaliser(own.value)


def _with_normaliser(value):
    """Appends the column whose weighted sum is the normaliser."""
    value = widen(value)
    return ops.concatenate([value, ops.ones_like(value[..., :1])], axis=-1)


def _sums(key, value):
    """The state of each chunk alone, `(B, n, H, F, Dv + 1)`."""
    return ops.einsum("bnkhf,bnkhd->bnhfd", key, value)


def _scaled_states(key, value, log_scale):
    """The states before each chunk, and the logarithms `(B, n, H)` of the factors left off them."""
    largest = ops.stop_gradient(ops.max(log_scale, axis=2))
    key = key * append_axes(ops.exp(log_scale - ops.expand_dims(largest, axis=2)), 1)

    def step(carry, chunk):
        (state, reached), (sums, here) = carry, chunk
        reaches = ops.maximum(reached, here)
        kept, added = (append_axes(ops.exp(x - reaches), 2) for x in (reached, here))
        return (state * kept + sums * added, reaches), carry

    sums = ops.swapaxes(_sums(key, value), 0, 1)
    here = ops.swapaxes(largest, 0, 1)
    init = (ops.zeros_like(sums[0]), ops.full_like(here[0], UNSEEN))
    _, (states, reached) = ops.scan(step, init, (sums, here))
    return ops.swapaxes(states, 0, 1), ops.swapaxes(reached, 0, 1)
