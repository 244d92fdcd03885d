"""The primal form of a finite feature map: the weight matrix W, as a state that queries read.

Time grows with the length, not its square. The matrix of one head is the sum of
`features x (values, 1)` over its training set, the last column being the
normaliser h. A causal query reads the state before its chunk of keys, and meets
the keys of the chunk itself in the dual form.
"""

from keras import ops

from keras_pdattn.ops.dtypes import cumulative_sum, exp_of_at_most_zero, widen
from keras_pdattn.ops.indexing import (
    append_axes,
    delay,
    fit_axis,
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


def is_cheaper(query_length, num_examples, num_features, dual_width, value_depth, is_causal):
    """Whether the primal form takes fewer multiplications than the dual one.

    Args:
        query_length: the number of queries; `None` if unknown.
        num_examples: the number of examples; `None` if unknown.
        num_features: width of the feature map.
        dual_width: width of the vectors whose products give the kernel.
        value_depth: depth of a value.
        is_causal: whether queries see prefixes.
    """
    if not isinstance(query_length, int) or not isinstance(num_examples, int):
        return True
    state = num_features * (value_depth + 1)
    primal = (query_length + num_examples) * state
    if is_causal:
        in_chunk = min(chunk_size(num_features), num_examples)
        primal += query_length * in_chunk * (num_features + value_depth + 1)
    return primal < query_length * num_examples * (dual_width + value_depth)


def primal_attention(query, examples):
    """Attention through states, without a weight for each query and key.

    Args:
        query: features of the queries, `(B, T, H, F)`.
        examples: `Examples` with features for keys, without `visible` and
            `window`.

    Returns:
        The output, `(B, T, H, Dv)`, in the dtype of the value.
    """
    value = _with_normaliser(examples.value)
    key = zero_where_masked(examples.key, examples.mask)
    log_scale = examples.log_scale
    if log_scale is not None and examples.mask is not None:
        log_scale = ops.where(append_axes(examples.mask, 1), log_scale, UNSEEN)
    if examples.is_causal:
        both = _causal(query, key, value, log_scale, examples)
    else:
        if log_scale is not None:
            largest = ops.stop_gradient(ops.max(log_scale, axis=1, keepdims=True))
            key = key * append_axes(ops.exp(log_scale - largest), 1)
        state = ops.einsum("bmhf,bmhd->bhfd", key, value)
        both = ops.einsum("bthf,bhfd->bthd", query, state)
    output = share(both[..., :-1], both[..., -1:])
    return ops.cast(output, examples.value.dtype)


def _causal(query, key, value, log_scale, examples):
    """Sums of kernel times `value` over what each query sees, `(B, T, H, Dv + 1)`.

    Each carries a factor of its query's own, which cancels in the normalisation.
    """
    query_length, start, own = ops.shape(query)[1], examples.start, examples.own
    by_query = [query]
    if own is not None:
        by_query += [own.key, _with_normaliser(own.value)]
        by_query += [] if own.mask is None else [ops.broadcast_to(own.mask, ops.shape(query)[:2])]
        by_query += [] if own.log_scale is None else [own.log_scale]
    if start is not None:
        # By step, so that the windows of all sequences begin a chunk together.
        step = ops.expand_dims(start, axis=1) + ops.arange(query_length, dtype="int32")
        by_query = [take_along_time(x, ops.minimum(step, query_length - 1)) for x in by_query]
    chunk = chunk_size(key.shape[-1])
    rows = chunk * examples.stride
    count = (query_length + rows - 1) // rows

    def chunks(x, size, fill=0):
        x = fit_axis(x, 1, count * size, fill)
        shape = ops.shape(x)
        return ops.reshape(x, (shape[0], count, size) + tuple(shape[2:]))

    query, *own_parts = (chunks(x, rows) for x in by_query)
    key, value = chunks(key, chunk), chunks(value, chunk)
    limit = ops.arange(rows, dtype="int32") // examples.stride
    limit = limit + 1 if examples.is_triangular else limit
    seen = ops.arange(chunk, dtype="int32") < ops.expand_dims(limit, axis=1)
    products = ops.where(seen, ops.einsum("bnqhf,bnkhf->bnhqk", query, key), 0.0)
    own_kernel = None
    if own is not None:
        own_kernel = ops.sum(query * own_parts[0], axis=-1)
        if own.mask is not None:
            own_kernel = ops.where(append_axes(own_parts[2], 1), own_kernel, 0.0)
    if log_scale is None:
        states = delay(cumulative_sum(_sums(key, value), axis=1))
        both = ops.einsum("bnqhf,bnhfd->bnqhd", query, states)
    else:
        log_scale = chunks(log_scale, chunk, fill=UNSEEN)
        states, reached = _scaled_states(key, value, log_scale)
        log_scale = ops.expand_dims(ops.transpose(log_scale, (0, 1, 3, 2)), axis=3)
        largest = ops.max(ops.where(seen, log_scale, UNSEEN), axis=-1)
        largest = ops.maximum(
            ops.transpose(largest, (0, 1, 3, 2)), ops.expand_dims(reached, axis=2)
        )
        if own is not None:
            own_scale = own_parts[-1]
            if own.mask is not None:
                own_scale = ops.where(append_axes(own_parts[2], 1), own_scale, UNSEEN)
            largest = ops.maximum(largest, own_scale)
        largest = ops.stop_gradient(largest)
        rescale = ops.exp(ops.expand_dims(reached, axis=2) - largest)
        both = append_axes(rescale, 1) * ops.einsum("bnqhf,bnhfd->bnqhd", query, states)
        by_row = ops.expand_dims(ops.transpose(largest, (0, 1, 3, 2)), axis=-1)
        products = products * exp_of_at_most_zero(log_scale - by_row)
        if own is not None:
            own_kernel = own_kernel * ops.exp(own_scale - largest)
    both = both + ops.einsum("bnhqk,bnkhd->bnqhd", products, value)
    if own is not None:
        both = both + append_axes(own_kernel, 1) * own_parts[1]
    shape = ops.shape(both)
    both = ops.reshape(both, (shape[0], count * rows) + tuple(shape[3:]))[:, :query_length]
    if start is None:
        return both
    step = ops.arange(query_length, dtype="int32") - ops.expand_dims(start, axis=1)
    return zero_where_masked(take_along_time(both, ops.maximum(step, 0)), step >= 0)


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
