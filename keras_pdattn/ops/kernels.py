"""Kernels, normalised over what each query sees."""

import functools

import keras
from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.dtypes import accumulator, cast, exp_of_at_most_zero, nothing, widen
from keras_pdattn.ops.indexing import append_axes


def masked_softmax(parts):
    """Softmax over the examples of all parts, as `(weights, total)`, not yet over their total.

    Args:
        parts: for each part of the examples `(logits, log_scale, visible)`, tensors
            `(..., queries, examples)` or broadcastable to that; the latter two may be `None`.

    Returns:
        A list of the weights of each part, and the total of all, `(..., queries, 1)`: infinite
        for a query that sees nothing, which makes zeros of its weights, and `None` where there is
        nothing left to divide by.
    """
    logits = [_seen_logits(*part) for part in parts]
    if native.IS_TORCH:
        weights, total = _softmax(logits), None
    else:
        # To divide the output and not the weights saves XLA passes over all pairs.
        largest = _largest(logits)
        weights = [ops.exp(x - largest) for x in logits]
        total = _total(weights)
    sighted = _sighted([visible for _, _, visible in parts])
    if sighted is not None:
        total = ops.ones_like(weights[0][..., :1]) if total is None else total
        total = ops.where(sighted, total, float("inf"))
        total = ops.cast(total, logits[0].dtype)
    return weights, total


def _seen_logits(logits, log_scale, visible):
    if log_scale is not None:
        logits = logits + log_scale
    return logits if visible is None else ops.where(visible, logits, nothing())


def _largest(parts):
    """Of all parts, along the last axis; without a gradient."""
    found = [native.largest(x, axis=-1, keepdims=True) for x in parts]
    return ops.stop_gradient(functools.reduce(_larger, found))


def _larger(x, other):
    # Not `ops.maximum`, which computes float64 in float32 on some backends.
    return ops.where(x > other, x, other)


def _total(parts):
    return functools.reduce(ops.add, [ops.sum(x, axis=-1, keepdims=True) for x in parts])


def _sighted(visible):
    """Which queries see anything of any part; `None` if all do."""
    if any(part is None for part in visible):
        return None
    found = [ops.any(part, axis=-1, keepdims=True) for part in visible]
    return functools.reduce(ops.logical_or, found)


def _softmax(parts):
    """In one pass, which is the fastest for operations that run as they come."""
    logits = native.concatenate(parts, axis=-1)
    # Of one, `ops.softmax` would warn, though a sequence of one is nothing odd.
    is_one = logits.shape[-1] == 1
    weights = ops.exp(logits - logits) if is_one else ops.softmax(logits, axis=-1)
    return native.split(weights, [part.shape[-1] for part in parts], axis=-1)


def masked_kernel(parts):
    """Kernels, each example's times `exp(log_scale)`, and their sum over all parts.

    Args:
        parts: as for `masked_softmax`, with kernels for logits.

    Returns:
        A list of the kernels of each part, zero of what is not seen, and their total.
    """
    largest = None
    if parts[0][1] is not None:
        largest = _largest([_seen_logits(scale, None, visible) for _, scale, visible in parts])
    weights = [_seen_kernel(*part, largest) for part in parts]
    return weights, _total(weights)


def _seen_kernel(kernel, log_scale, visible, largest):
    if log_scale is not None:
        kernel = kernel * exp_of_at_most_zero(log_scale - largest)
    return kernel if visible is None else ops.where(visible, kernel, 0.0)


def share(part, total=None):
    """`part / total`; `part` itself where the total is nothing, as `part` is then, or `None`."""
    if total is None:
        return part
    # What a sum of kernels is nothing below. Gradients are divided by that sum before they meet
    # features as small again, and in between have to be within the range of float32.
    least = 2.0**-90
    return native.ratio(part, native.one_for_less(total, least))


def weighted_sums(weights, total, dropouts, multiply, dtype):
    """Sums of values times weights, and what is yet to `share` them.

    Args:
        weights: for each part of the examples a tensor `(..., queries, examples)`.
        total: their sum, `(..., queries, 1)`; or `None` if that is 1.
        dropouts: for each part a function that drops entries of a tensor; or `None`.
        multiply: function from such weights to the sums of values that these weigh.
        dtype: that of the values.

    Returns:
        A pair of the sums and their total; of the sums alone if these need none.
    """
    if accumulator(dtype) != keras.backend.standardize_dtype(dtype):
        # Sums of what is not normalised may be beyond the range of 16 bits.
        weights, total = [share(part, total) for part in weights], None
    if dropouts is not None:
        weights = [dropout(part) for dropout, part in zip(dropouts, weights)]
    sums = multiply([cast(part, dtype) for part in weights])
    return (sums,) if total is None else (sums, total)


def for_products(x):
    """`x` in a dtype that the backend's matrix products are safe in.

    TensorFlow, and XLA on a CPU, add up 16-bit products in 16 bits: long sums
    stall, and on TensorFlow scores overflow float16 before they are scaled.
    """
    return x if keras.backend.backend() == "torch" or native.jax_runs_on_gpu() else widen(x)


def in_output_layout(rows):
    """Turns `(B, H, T)` into `(B, T, H, 1)`, the layout of outputs."""
    return append_axes(ops.transpose(rows, (0, 2, 1)), 1)
