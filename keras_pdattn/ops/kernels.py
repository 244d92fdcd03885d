"""Kernels, normalised over what each query sees."""

import keras
from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.dtypes import accumulator, cast, exp_of_at_most_zero, nothing, widen
from keras_pdattn.ops.indexing import append_axes


def masked_softmax(logits, log_scale=None, visible=None):
    """Softmax over the last axis as `(weights, total)`, the weights not yet over their total.

    The total is infinite in a row that sees nothing, which makes zeros of its weights,
    and `None` where there is nothing left to divide by.
    """
    if log_scale is not None:
        logits = logits + log_scale
    if visible is not None:
        logits = ops.where(visible, logits, nothing())
    if keras.backend.backend() == "jax":
        # To divide the output and not the weights saves XLA passes over all pairs.
        largest = ops.stop_gradient(native.largest(logits, axis=-1, keepdims=True))
        weights = ops.exp(logits - largest)
        total = ops.sum(weights, axis=-1, keepdims=True)
    else:
        weights, total = _softmax(logits), None
    if visible is not None:
        sighted = ops.any(visible, axis=-1, keepdims=True)
        total = ops.ones_like(weights[..., :1]) if total is None else total
        total = ops.where(sighted, total, float("inf"))
        total = ops.cast(total, logits.dtype)
    return weights, total


def _softmax(logits):
    if logits.shape[-1] == 1:
        # `ops.softmax` would warn, though a sequence of one is nothing odd.
        return ops.exp(logits - logits)
    return ops.softmax(logits, axis=-1)


def masked_kernel(kernel, log_scale=None, visible=None):
    """`kernel`, each example's times `exp(log_scale)`, and its sum along the last axis."""
    if log_scale is not None:
        seen = log_scale if visible is None else ops.where(visible, log_scale, nothing())
        largest = ops.stop_gradient(native.largest(seen, axis=-1, keepdims=True))
        kernel = kernel * exp_of_at_most_zero(log_scale - largest)
    if visible is not None:
        kernel = ops.where(visible, kernel, 0.0)
    return kernel, ops.sum(kernel, axis=-1, keepdims=True)


def share(part, total=None):
    """`part / total`; `part` itself where the total is nothing, as `part` is then, or `None`."""
    if total is None:
        return part
    # What a sum of kernels is nothing below. Gradients are divided by that sum before they meet
    # features as small again, and in between have to be within the range of float32.
    least = 2.0**-90
    return native.ratio(part, native.one_for_less(total, least))


def weighted_sums(weights, total, dropout, multiply, dtype):
    """Sums of values times weights, and what is yet to `share` them.

    Args:
        weights: tensor `(..., queries, examples)`.
        total: their sum, `(..., queries, 1)`; or `None` if that is 1.
        dropout: function that drops entries of a tensor, or `None`.
        multiply: function from weights to the sums of values that these weigh.
        dtype: that of the values.

    Returns:
        A pair of the sums and their total; of the sums alone if these need none.
    """
    if accumulator(dtype) != keras.backend.standardize_dtype(dtype):
        # Sums of what is not normalised may be beyond the range of 16 bits.
        weights, total = share(weights, total), None
    kept = weights if dropout is None else dropout(weights)
    sums = multiply(cast(kept, dtype))
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
