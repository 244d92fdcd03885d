"""The primal form of a finite feature map: the weight matrix W, as a state that queries read.

Time grows with the length, not its square. The matrix of one head is the sum of
`features x values` over its training set; a further column, with ones for values, gives
the normaliser h. A causal query reads the state before its chunk of keys, and meets
the keys of the chunk itself in the dual form.
"""

from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.dtypes import cast, exp_of_at_most_zero, nothing, widen
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
from keras_pdattn.ops.sums import cumulative_sum

#: Keys in a chunk of the causal form: as many as a state has rows, within these.
LEAST_CHUNK, MOST_CHUNK = 64, 256


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


def sums_come_first(num_examples, num_features, width, value_depth):
    """Whether inputs are summed, and the sums projected, in fewer multiplications than the reverse.

    Args:
        num_examples: the number of examples; `None` if unknown.
        num_features: width of the feature map.
        width: that of the inputs that values are projected from.
        value_depth: depth of a value.
    """
    saved = (width + num_features) * value_depth - width * num_features
    if not isinstance(num_examples, int):
        return saved > 0
    return num_examples * saved > num_features * width * value_depth


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
    rows = chunk_size(num_features) * stride
    return (query_length + rows - 1) // rows


def primal_attention(query, examples):
    """Attention through states, without a weight for each query and key.

    Args:
        query: features of the queries, `(B, T, H, F)`.
        examples: `Examples` with features for keys, without `visible` and
            `window`.

    Returns:
        The output, `(B, T, H, Dv)`, in the dtype of values.
    """
    key = zero_where_masked(examples.key, examples.mask)
    log_scale, value = examples.log_scale, widen(examples.value)
    if log_scale is not None and examples.mask is not None:
        log_scale = ops.where(append_axes(examples.mask, 1), log_scale, nothing())
    if examples.is_causal:
        sums, log_factor = causal_sums(query, key, value, log_scale, examples)
        output, total = native.split(sums, [value.shape[-1], 1], axis=-1)
    else:
        log_factor = None
        if log_scale is not None:
            log_factor = ops.stop_gradient(native.largest(log_scale, axis=1, keepdims=True))
            key = key * append_axes(ops.exp(log_scale - log_factor), 1)
        by_head, key_sum = ops.swapaxes(query, 1, 2), append_axes(ops.sum(key, axis=1), 1)
        state = _state(key, key_sum, value, examples.projections)
        # Not `ops.matmul`, which computes float64 in float32 on some backends.
        sums = (ops.einsum("bhtf,bhfd->bhtd", by_head, x) for x in (state, key_sum))
        output, total = (ops.swapaxes(x, 1, 2) for x in sums)
    if examples.own is not None:
        output, total = _with_own(output, total, log_factor, query, examples.own)
    return cast(share(output, total), examples.value_dtype)


def with_ones(value):
    """Values with a further number, one, whose sum is the normaliser."""
    return native.pad(value, [(0, 0)] * (len(value.shape) - 1) + [(0, 1)], fill=1)


def _state(key, key_sum, value, projections):
    """The state of all keys, `(B, H, F, Dv)`; of inputs where values are yet to be projected."""
    if projections is None:
        return ops.einsum("bmhf,bmhd->bhfd", key, value)
    _, project = projections
    sums = native.sum_of_products(key, join_axes(value, 2))
    state = ops.einsum("bhfw,whd->bhfd", sums, widen(project.kernel))
    if project.bias is None:
        return state
    return state + key_sum * ops.expand_dims(widen(project.bias), axis=1)


def causal_sums(query, key, value, log_scale, examples):
    """Sums of kernel times values `with_ones` over what each query sees.

    Returns:
        The sums, `(B, T, H, Dv + 1)`, and the logarithms of the factors left off them,
        `(B, T, H)` or `None`.
    """
    length, start = ops.shape(query)[1], examples.start
    if start is None:
        return _chunked_sums(query, key, value, log_scale, examples)
    # By step, so that the windows of all sequences begin a chunk together.
    step = ops.expand_dims(start, axis=1) + ops.arange(length, dtype="int32")
    query = take_along_time(query, native.at_most(step, length - 1))
    sums = _chunked_sums(query, key, value, log_scale, examples)
    step = ops.arange(length, dtype="int32") - ops.expand_dims(start, axis=1)
    # Those before the start see nothing, as the query at the first step.
    step = native.at_least(step, 0)
    return [None if x is None else take_along_time(x, step) for x in sums]


def _chunked_sums(query, key, value, log_scale, examples):
    """`causal_sums` for queries by step: states before each chunk, products in it."""
    length, chunk = ops.shape(query)[1], chunk_size(key.shape[-1])
    rows, count = chunk * examples.stride, num_chunks(length, key.shape[-1], examples.stride)

    def chunks(x, size, fill=0):
        """Cuts `(B, H, T, ...)` into `(B, H, n, size, ...)`."""
        return split_axis(fit_axis(x, 2, count * size, fill), 2, size)

    def by_query(x):
        return None if x is None else ops.swapaxes(join_axes(x, 2), 1, 2)[:, :length]

    query, key, value = (ops.swapaxes(x, 1, 2) for x in (query, key, value))
    query, key, value = chunks(query, rows), chunks(key, chunk), chunks(with_ones(value), chunk)
    if log_scale is None and native.is_eager_torch():
        sums = native.causal_sums(query, key, value, examples.stride, examples.is_triangular)
        return native.contiguous(by_query(sums)), None
    products, log_factor = ops.einsum("bhnqf,bhnkf->bhnqk", query, key), None
    seen = _seen_in_chunk(rows, chunk, examples)
    products = ops.where(seen, products, 0.0)
    if log_scale is None:
        state = delay(cumulative_sum(_states(key, value), axis=2), axis=2)
    else:
        log_scale = chunks(ops.swapaxes(log_scale, 1, 2), chunk, fill=nothing())
        state, reached = _scaled_states(key, value, log_scale)
        # The largest factor that each query sees is left off its sums.
        log_scale, reached = (ops.expand_dims(x, axis=3) for x in (log_scale, reached))
        largest = native.largest(ops.where(seen, log_scale, nothing()), axis=-1)
        log_factor = ops.stop_gradient(ops.maximum(largest, reached))
        products = products * exp_of_at_most_zero(log_scale - append_axes(log_factor, 1))
        query = query * append_axes(ops.exp(reached - log_factor), 1)
    sums = ops.einsum("bhnqf,bhnfd->bhnqd", query, state)
    sums = sums + ops.einsum("bhnqk,bhnkd->bhnqd", products, value)
    return by_query(sums), by_query(log_factor)


def _seen_in_chunk(rows, chunk, examples):
    """Boolean `(rows, chunk)`: which query of a chunk sees which of its keys."""
    limit = ops.arange(rows, dtype="int32") // examples.stride
    limit = limit + 1 if examples.is_triangular else limit
    return ops.arange(chunk, dtype="int32") < ops.expand_dims(limit, axis=1)


def _with_own(output, total, log_factor, query, own):
    """Sums, and each query's own example besides; all less a factor then that cancels."""
    key, log_scale = zero_where_masked(own.key, own.mask), own.log_scale
    kernel = ops.sum(query * key, axis=-1)
    if log_scale is not None:
        if own.mask is not None:
            log_scale = ops.where(append_axes(own.mask, 1), log_scale, nothing())
        largest = ops.stop_gradient(ops.maximum(log_factor, log_scale))
        output, total = (x * append_axes(ops.exp(log_factor - largest), 1) for x in (output, total))
        kernel = kernel * ops.exp(log_scale - largest)
    kernel = append_axes(kernel, 1)
    return output + kernel * widen(own.value), total + kernel


def _states(key, value):
    """The state of each chunk alone, `(B, H, n, F, Dv + 1)`."""
    return ops.einsum("bhnkf,bhnkd->bhnfd", key, value)


def _scaled_states(key, value, log_scale):
    """States of the keys before each chunk, and the logarithms of factors left off these.

    The logarithms are `(B, H, n)`.
    """
    native.refuse_tracing("A causal call with random features")
    largest = ops.stop_gradient(native.largest(log_scale, axis=3))
    key = key * append_axes(ops.exp(log_scale - ops.expand_dims(largest, axis=3)), 1)

    def step(before, its_state):
        state, reached, index = before
        here = ops.take(largest, index, axis=2)
        reaches = ops.maximum(reached, here)
        kept, added = (append_axes(ops.exp(x - reaches), 2) for x in (reached, here))
        return (state * kept + its_state * added, reaches, index + 1), before

    # Of one tensor, as TensorFlow's scan must know the lengths of several.
    states = ops.moveaxis(_states(key, value), 2, 0)
    init = ops.zeros_like(states[0]), ops.full_like(largest[:, :, 0], nothing()), 0
    _, (state, reached, _) = ops.scan(step, init, states)
    return ops.moveaxis(state, 0, 2), ops.moveaxis(reached, 0, 2)
