"""The dual form: values weighted by a kernel that is normalised over what each query sees."""

import dataclasses

import keras
from keras import ops

from keras_pdattn.ops.dtypes import exp_of_at_most_zero, is_double, widen
from keras_pdattn.ops.windows import banded_attention


def masked_softmax(logits, log_scale=None, visible=None):
    """Softmax over the last axis; a row that sees nothing is zero, with zero gradient."""
    if log_scale is not None:
        logits = logits + log_scale
    if visible is None:
        return _softmax(logits)
    weights = _softmax(ops.where(visible, logits, -1e30))
    return ops.where(visible, weights, 0.0)


def _softmax(logits):
    if logits.shape[-1] == 1:
        # `ops.softmax` would warn, though a sequence of one is nothing odd.
        return ops.exp(logits - logits)
    return ops.softmax(logits, axis=-1)


def masked_share(kernel, log_scale=None, visible=None):
    """`kernel`, each key's times `exp(log_scale)`, over its sum along the last axis.

    A row without any kernel is zero.
    """
    if log_scale is not None:
        seen = log_scale if visible is None else ops.where(visible, log_scale, -1e30)
        largest = ops.stop_gradient(ops.max(seen, axis=-1, keepdims=True))
        kernel = kernel * exp_of_at_most_zero(log_scale - largest)
    if visible is not None:
        kernel = ops.where(visible, kernel, 0.0)
    return share(kernel, ops.sum(kernel, axis=-1, keepdims=True))


def share(part, total):
    """`part / total`; zero, with zero gradient, where the total is."""
    is_zero = total == 0
    return ops.where(is_zero, 0.0, part / ops.where(is_zero, 1.0, total))


def dual_attention(query, examples, weigh, dropout=None, return_weights=True):
    """Attention through its weights, one for each query and example that it may see.

    Args:
        query: vectors of the queries, `(B, T, H, F)`.
        examples: `Examples` with vectors for keys, F wide; products of the two
            give the kernel.
        weigh: function from `(products, log_scale, visible)` to the weights:
            `masked_softmax` or `masked_share`.
        dropout: function applied to the weights, or `None`.
        return_weights: whether the weights are wanted; in a window that they
            are not, they are never written down for keys outside.

    Returns:
        `(output, weights, own_weights)`: `(B, T, H, Dv)`, and before dropout
        `(B, H, T, M)` and `(B, H, T)` (`None` without own examples).
    """
    query, dtype = widen(query), examples.value.dtype
    examples = examples.with_keys(widen)
    examples = dataclasses.replace(examples, value=for_products(examples.value))
    own = examples.own
    if examples.has_bands() and not return_weights:
        output = banded_attention(query, examples, weigh, dropout)
        return ops.cast(output, dtype), None, None
    products = ops.einsum("bthd,bmhd->bhtm", query, examples.key)
    visible, log_scale = examples.visibility(), examples.log_scale
    if log_scale is not None:
        log_scale = ops.expand_dims(ops.transpose(log_scale, (0, 2, 1)), axis=2)
    if own is not None:
        products, log_scale, visible = _append_own(products, log_scale, visible, query, own)
    weights = weigh(products, log_scale, visible)
    kept = weights if dropout is None else dropout(weights)
    kept = ops.cast(kept, examples.value.dtype)
    if own is None:
        output = ops.einsum("bhtm,bmhd->bthd", kept, examples.value)
        return ops.cast(output, dtype), weights, None
    output = ops.einsum("bhtm,bmhd->bthd", kept[..., :-1], examples.value)
    output = output + ops.einsum("bht,bthd->bthd", kept[..., -1], for_products(own.value))
    return ops.cast(output, dtype), weights[..., :-1], weights[..., -1]


def for_products(x):
    """`x` in a dtype that the backend's matrix products are safe in.

    TensorFlow, and XLA on a CPU, add up 16-bit products in 16 bits: long sums
    stall, and on TensorFlow scores overflow float16 before they are scaled.
    """
    return x if keras.backend.backend() == "torch" else widen(x)


def _append_own(products, log_scale, visible, query, own):
    """Adds the column of each query's own example."""
    own_products = ops.einsum("bthd,bthd->bht", query, own.key)
    lead = ops.shape(own_products)

    def append(x, column, default):
        if x is None and column is None:
            return None
        x = default if x is None else x
        column = default[..., 0] if column is None else column
        x = ops.broadcast_to(x, lead + (ops.shape(products)[-1],))
        column = ops.expand_dims(ops.broadcast_to(column, lead), axis=-1)
        return ops.concatenate([x, column], axis=-1)

    everything = ops.ones((1, 1, 1, 1), dtype="bool")
    own_scale = None
    if own.log_scale is not None:
        own_scale = ops.transpose(own.log_scale, (0, 2, 1))
    return (
        append(products, own_products, None),
        append(log_scale, own_scale, None),
        append(visible, own.visibility(), everything),
    )


def has_fused_softmax(key, value):
    """Whether the backend's kernel takes these depths and keeps this dtype."""
    if is_double(value.dtype):
        return False
    return keras.backend.backend() != "jax" or key.shape[-1] == value.shape[-1]


def fused_softmax_attention(query, examples, scale, flash_attention=None):
    """Softmax attention by the backend's own kernel, the weights never written down.

    Args:
        query: `(B, T, H, D)`.
        examples: `Examples` without own ones.
        scale: factor on the products of queries and keys.
        flash_attention: as in `keras.ops.dot_product_attention`.

    Returns:
        The output, `(B, T, H, Dv)`; zero for a query that sees nothing.
    """
    tensors = query, examples.key, examples.value
    if not flash_attention:
        tensors = (for_products(tensor) for tensor in tensors)
    if keras.backend.backend() == "torch" and flash_attention is None:
        # Its kernel chooses flash attention by itself; Keras's way of asking
        # beforehand would break the graph of `torch.compile`.
        flash_attention = False
    output = ops.dot_product_attention(
        *tensors,
        mask=examples.kernel_mask(),
        scale=scale,
        is_causal=examples.is_triangular,
        flash_attention=flash_attention,
    )
    sighted = examples.sighted()
    if sighted is not None:
        # The kernels give the mean of all values where every score is masked.
        output = ops.where(in_output_layout(sighted), output, 0.0)
    return ops.cast(output, examples.value.dtype)


def in_output_layout(rows):
    """Turns `(B, H, T)` into `(B, T, H, 1)`, the layout of outputs."""
    return ops.expand_dims(ops.transpose(rows, (0, 2, 1)), axis=-1)
