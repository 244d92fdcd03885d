"""The dual form: values weighted by a kernel that is normalised over what each query sees."""

import keras
from keras import ops

from keras_pdattn.ops.dtypes import is_double, widen


def masked_softmax(logits, visible=None):
    """Softmax over the last axis; a row that sees nothing is zero, with zero gradient."""
    if visible is None:
        return _softmax(logits)
    weights = _softmax(ops.where(visible, logits, -1e30))
    return ops.where(visible, weights, 0.0)


def _softmax(logits):
    if logits.shape[-1] == 1:
        # `ops.softmax` would warn, though a sequence of one is nothing odd.
        return ops.exp(logits - logits)
    return ops.softmax(logits, axis=-1)


def masked_share(kernel, visible=None):
    """`kernel` over its sum along the last axis; a row without any is zero."""
    if visible is not None:
        kernel = ops.where(visible, kernel, 0.0)
    total = ops.sum(kernel, axis=-1, keepdims=True)
    return ops.where(total > 0, kernel / ops.where(total > 0, total, 1.0), 0.0)


def dual_attention(query, examples, normalize, dropout=None):
    """Attention through its weights, one for each query and example.

    Args:
        query: features of the queries, `(B, T, H, F)`.
        examples: `Examples` with the features of their keys, F wide.
        normalize: function from `(products, visible)`, each `(B, H, T, M)`, to
            the weights: `masked_softmax` or `masked_share`.
        dropout: function applied to the weights, or `None`.

    Returns:
        `(output, weights, own_weights)`: `(B, T, H, Dv)`, and before dropout
        `(B, H, T, M)` and `(B, H, T)` (`None` without own examples).
    """
    own = examples.own
    products = ops.einsum("bthd,bmhd->bhtm", widen(query), widen(examples.key))
    visible = examples.visibility()
    if own is not None:
        products, visible = _append_own(products, visible, query, own)
    weights = normalize(products, visible)
    kept = weights if dropout is None else dropout(weights)
    value = _for_products(examples.value)
    kept = ops.cast(kept, value.dtype)
    if own is None:
        output = ops.einsum("bhtm,bmhd->bthd", kept, value)
        return ops.cast(output, examples.value.dtype), weights, None
    output = ops.einsum("bhtm,bmhd->bthd", kept[..., :-1], value)
    output = output + ops.einsum("bht,bthd->bthd", kept[..., -1], _for_products(own.value))
    return ops.cast(output, examples.value.dtype), weights[..., :-1], weights[..., -1]


def _for_products(x):
    """`x` in a dtype that the backend's matrix products are safe in.

    TensorFlow, and XLA on a CPU, add up 16-bit products in 16 bits: long sums
    stall, and on TensorFlow scores overflow float16 before they are scaled.
    """
    return x if keras.backend.backend() == "torch" else widen(x)


def _append_own(products, visible, query, own):
    """Adds the column of each query's own example."""
    own_products = ops.einsum("bthd,bthd->bht", widen(query), widen(own.key))
    products = ops.concatenate([products, ops.expand_dims(own_products, axis=-1)], axis=-1)
    own_visible = own.visibility()
    if visible is None and own_visible is None:
        return products, None
    own_shape, shape = ops.shape(own_products), ops.shape(products)
    everything = ops.ones((1, 1, 1, 1), dtype="bool")
    visible = everything if visible is None else visible
    visible = ops.broadcast_to(visible, own_shape + (shape[-1] - 1,))
    own_visible = everything[..., 0] if own_visible is None else own_visible
    own_visible = ops.expand_dims(ops.broadcast_to(own_visible, own_shape), axis=-1)
    return products, ops.concatenate([visible, own_visible], axis=-1)


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
        tensors = (_for_products(tensor) for tensor in tensors)
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
