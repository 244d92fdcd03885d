"""What a backend does in one operation of its own that `keras.ops` takes several for."""

import functools
import itertools

import keras
from keras import ops

from keras_pdattn.ops.dtypes import cast, widen

IS_TORCH = keras.backend.backend() == "torch"
IS_TENSORFLOW = keras.backend.backend() == "tensorflow"
IS_JAX = keras.backend.backend() == "jax"
if IS_TORCH:
    from keras_pdattn.ops import torch_native
if IS_JAX:
    from keras_pdattn.ops import jax_native
if IS_TENSORFLOW:
    from keras_pdattn.ops import tensorflow_native


def linear(x, kernel, bias=None, num_widths=1):
    """x W + b, over the last `num_widths` axes of `x` and as many first ones of `kernel`.

    Run eagerly on torch, one operation is half the time of a short sequence's projection,
    and saves a pass over that of a long one.

    Args:
        x: tensor `(*lead, *widths)`.
        kernel: tensor `(*widths, *units)`.
        bias: tensor `(*units)`, or `None`.
        num_widths: the number of `widths`.

    Returns:
        Tensor `(*lead, *units)`.
    """
    if IS_TORCH:
        return torch_native.linear(x, kernel, bias, num_widths)
    x = ops.tensordot(x, kernel, axes=num_widths)
    return x if bias is None else x + bias


def value(weight):
    """The tensor of a weight, on torch at half the time of `ops.convert_to_tensor`."""
    if IS_TORCH and isinstance(weight, keras.Variable):
        return weight.value
    return ops.convert_to_tensor(weight)


def shape(x):
    """`ops.shape`, which checks for symbolic tensors first."""
    return tuple(x.shape) if IS_TORCH else ops.shape(x)


def integers(numbers, x):
    """`numbers` as a vector of int32 where `x` is, whose queue on a GPU torch does not wait for."""
    if IS_TORCH:
        return torch_native.integers(numbers, x)
    return ops.convert_to_tensor(numbers, dtype="int32")


def reshape(x, shape):
    """`ops.reshape`, which checks for symbolic tensors at ten times the cost of torch's own."""
    return x.reshape(shape) if IS_TORCH else ops.reshape(x, shape)


def pad(x, widths, fill=0):
    """`ops.pad`, which makes an operation first to see what it takes: ten times torch's own cost.

    Args:
        x: tensor.
        widths: for each axis a pair, how many entries come in front and behind.
        fill: number, what these are.
    """
    if IS_TORCH:
        return torch_native.pad(x, widths, fill)
    return ops.pad(x, widths, constant_values=fill)


def split(x, sizes, axis):
    """Cuts `axis` of `x` into parts of these sizes.

    Slices would each add up a gradient as large as `x` on torch.
    """
    if len(sizes) == 1:
        return [x]
    if IS_TORCH:
        return torch_native.split(x, sizes, axis)
    return ops.split(x, list(itertools.accumulate(sizes[:-1])), axis=axis)


def concatenate(tensors, axis):
    """`ops.concatenate`, on torch at a quarter of its cost; one tensor as it is."""
    if len(tensors) == 1:
        return tensors[0]
    return torch_native.concatenate(tensors, axis) if IS_TORCH else ops.concatenate(tensors, axis)


def mean(x, axis, dtype=None, keepdims=False):
    """The mean of `x` along an axis, of known size but on torch, added up in float32 or wider.

    In `dtype`, that of `x` if `None`.
    """
    if IS_TORCH:
        return torch_native.mean(x, axis, dtype, keepdims)
    dtype = dtype or keras.backend.standardize_dtype(x.dtype)
    # Not `ops.mean`, which computes float64 in float32 on some backends.
    total = ops.sum(widen(x), axis=axis, keepdims=keepdims)
    return cast(total / max(x.shape[axis], 1), dtype)


def widened(x):
    """`x` in its accumulator dtype, for operators with others in that: torch widens in these."""
    return x if IS_TORCH else widen(x)


def take(x, index, axis):
    """`ops.take` for a vector of indices that are in range, which ONNX knows on torch."""
    return torch_native.take(x, index, axis) if IS_TORCH else ops.take(x, index, axis=axis)


def entry(x, index):
    """`x[index]` for an integer scalar, which torch would wait for a GPU to know."""
    return torch_native.entry(x, index) if IS_TORCH else x[index]


def take_along_axis(x, index, axis):
    """`ops.take_along_axis` for indices that are in range, broadcast to the other axes of `x`."""
    if IS_TORCH:
        return torch_native.take_along_axis(x, index, axis)
    return ops.take_along_axis(x, index, axis=axis)


def is_tracing():
    """Whether torch records operations for ONNX, loops included as often as they run here."""
    return IS_TORCH and torch_native.is_tracing()


def refuse_tracing(what):
    """Raises a `ValueError` if torch records operations, for a loop over a sequence."""
    if is_tracing():
        raise ValueError(
            f"{what} can't be exported to ONNX from PyTorch, which would record the steps of one "
            "length. Export it from another backend. Received: an export from PyTorch"
        )


def softmax_attention(query, key, value, mask, scale, is_causal, flash_attention=None):
    """`ops.dot_product_attention`; on torch without its copies of queries, keys and values."""
    if IS_TORCH and not flash_attention:
        return torch_native.softmax_attention(query, key, value, mask, scale, is_causal)
    return ops.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        flash_attention=flash_attention,
    )


def mask_of_running_means(ends, some, dtype):
    """What `softmax_attention` is to add to the scores of running means, on torch.

    Query i sees the one at its place, and those before that are the ends of windows.

    Args:
        ends: boolean `(B or 1, T, H)`.
        some: boolean `(B, T, H)`, False where it does not see the one at its place; or `None`.
            Each query must see one.
        dtype: that of queries.

    Returns:
        Tensor `(B or 1, H, T, T)`.
    """
    return torch_native.mask_of_running_means(ends, some, dtype)


def has_exact_sums(x):
    """Whether products of float32, where `x` is, are as exact as sums: torch may be told not to."""
    return not IS_TORCH or torch_native.has_exact_sums(x)


def has_cudnn(dtype, depth):
    """Whether `softmax_attention_of_lengths` of such tensors is a kernel of cuDNN, in JAX."""
    return jax_runs_on_gpu() and jax_native.has_cudnn(dtype, depth)


def softmax_attention_of_lengths(
    query, key, value, query_lengths, key_lengths, scale, is_causal=False, mask=None
):
    """Softmax attention of sequences of different lengths, filled up to one; on JAX.

    The kernel does not work on what fills them up.

    Args:
        query: tensor `(sequences, T, heads, depth)`.
        key: tensor `(sequences, S, heads, depth)`.
        value: tensor `(sequences, S, heads, depth)`.
        query_lengths: int32 `(sequences,)`, how many queries each has; all if `None`.
        key_lengths: int32 `(sequences,)`, how many keys; likewise.
        scale: factor on the products of queries and keys.
        is_causal: whether query `i` sees keys `0` to `i` only.
        mask: boolean, broadcastable to `(sequences, heads, T, S)`, or `None`.

    Returns:
        Tensor `(sequences, T, heads, depth)`.
    """
    return jax_native.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        implementation="cudnn" if runs_on_gpu() else "xla",
    )


def raised(x, other):
    """`x + other`; on torch in the memory of `x`, which is lost."""
    return x.add_(other) if IS_TORCH else x + other


def at_least(x, least):
    """`ops.maximum` with a number, which torch would first bring to where `x` is."""
    return x.clamp(min=least) if IS_TORCH else ops.maximum(x, least)


def at_most(x, most):
    """`ops.minimum` with a number, as `at_least`."""
    return x.clamp(max=most) if IS_TORCH else ops.minimum(x, most)


def is_eager(x):
    """Whether operations on `x` run as they come, those of loops compiled anew at each call."""
    if IS_TORCH:
        return is_eager_torch()
    return tensorflow_native.is_eager() if IS_TENSORFLOW else jax_native.is_eager(x)


def is_eager_torch():
    """Whether torch runs operations as they come, one pass over tensors each."""
    return IS_TORCH and not (torch_native.is_compiling() or torch_native.is_tracing())


def prefix_moments(x, weight, count):
    """`_prefix_moments` of `ops.statistics`, on torch, in place and with a gradient of its own."""
    return torch_native.run(torch_native.PrefixMoments, x, weight, count)


def causal_sums(query, key, value, stride, is_triangular):
    """What causal queries find in the states before their chunk and in the chunk, on torch.

    With a gradient of its own, which reads states as well: that is a third fewer passes.

    Args:
        query: `(B, H, n, stride * C, F)`, in n chunks.
        key: `(B, H, n, C, F)`.
        value: `(B, H, n, C, D)`.
        stride: queries to a key.
        is_triangular: whether a query sees the key at its own place.

    Returns:
        Tensor `(B, H, n, stride * C, D)`.
    """
    return torch_native.run(torch_native.CausalSums, query, key, value, stride, is_triangular)[0]


def sum_of_products(key, value):
    """Sums over time of products: of `(B, M, H, F)` and `(B, M, W)`, `(B, H, F, W)`."""
    if is_eager_torch():
        return torch_native.run(torch_native.SumOfProducts, key, value)
    return ops.einsum("bmhf,bmw->bhfw", key, value)


def run_length(x):
    """How many entries are summed up before runs of them are, on torch."""
    return torch_native.run_length(x)


def ratio(part, total, *less):
    """`part` less all of `less`, over `total`.

    Of many entries, run eagerly on torch, with fewer passes over gradients, and fewer tensors. On
    JAX with gradients that do not divide by the square of `total`.
    """
    if is_eager_torch() and part.numel() >= torch_native.LEAST_ENTRIES:
        return torch_native.run(torch_native.Ratio, part, total, *less)
    for one in less:
        part = part - one
    return jax_native.ratio(part, total) if IS_JAX else part / total


def weighted_sum(x, weight):
    """The sum of `x * weight` along axis 1, kept.

    Of weights of time alone, on JAX on a CPU, as a product: XLA there takes several times as long
    to multiply and sum up in one pass.

    Args:
        x: tensor `(B, T, H, D)`.
        weight: tensor of that shape but for axes of one entry.
    """
    if IS_JAX and not runs_on_gpu() and weight.shape[2:] == (1, 1):
        return jax_native.weighted_sum(x, weight)
    return ops.sum(x * weight, axis=1, keepdims=True)


def map(function, xs):
    """`ops.map` over a tuple of tensors; on TensorFlow without what that takes besides."""
    return tensorflow_native.map(function, xs) if IS_TENSORFLOW else ops.map(function, xs)


def zero_unless(mask, x):
    """`x` where `mask` is True, zero elsewhere: `ops.where`, without a tensor of zeros on torch."""
    if IS_TORCH:
        return torch_native.zero_unless(mask, x)
    return ops.where(mask, x, ops.zeros_like(x))


def one_for_less(x, least):
    """`x` with ones in place of what is nearer to zero than `least`."""
    is_less = abs(x) < least
    return x.masked_fill(is_less, 1.0) if IS_TORCH else ops.where(is_less, 1.0, x)


def largest(x, axis, keepdims=False):
    """`ops.max`, which breaks a graph that torch compiles."""
    if IS_TORCH:
        return x.amax(axis, keepdims)
    return ops.max(x, axis=axis, keepdims=keepdims)


def exp_below_zero(x):
    """e^x below zero, x + 1 above: elu(x) + 1, small values not rounded off.

    Run eagerly on torch, a gradient of its own saves half of the passes over `x`.
    """
    if is_eager_torch():
        return torch_native.run(torch_native.ExpBelowZero, x)
    # `x` less its positive part is its negative part, with the slope of `x` at zero.
    positive = ops.relu(x)
    return positive + ops.exp(x - positive)


def heads_apart(x):
    """`x`, `(B, T, H, D)`, with the numbers of one head together in memory, on torch.

    Its products are of one head, and what they give is laid out like that. Elementwise
    operations on two tensors laid out differently take several times as long.
    """
    return x.transpose(1, 2).contiguous().transpose(1, 2) if IS_TORCH else x


def contiguous(x):
    """`x` laid out in memory as it is indexed, on torch: so are gradients of what is read of it."""
    return x.contiguous() if IS_TORCH else x


def into_graph(x):
    """`x` as a tensor of the graph that TensorFlow is building, if it is.

    A loop in there has no gradient if it closes over a tensor from outside.
    """
    return ops.copy(x) if IS_TENSORFLOW else x


def overlapping(x, axis, width, step):
    """`overlapping` of `ops.indexing`, on torch: a view, with a gradient of its own."""
    return torch_native.run(torch_native.Overlapping, x, axis, width, step)


def is_cuda(x):
    """Whether `x` is a tensor of torch on a GPU."""
    return IS_TORCH and x.is_cuda


def runs_on_gpu():
    """Whether TensorFlow or JAX has a GPU to run on; tensors of torch say where they are."""
    return not IS_TORCH and _has_gpu()


@functools.cache
def _has_gpu():
    return any(not device.startswith("cpu") for device in keras.distribution.list_devices())


def jax_runs_on_gpu():
    """Whether the backend is JAX, on a GPU."""
    return IS_JAX and runs_on_gpu()
