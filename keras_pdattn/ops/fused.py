"""Softmax attention by the backend's own kernel, the weights never written down."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.dtypes import accumulator, cast, is_double, widen
from keras_pdattn.ops.indexing import append, fit_axis, lead_with_zero
from keras_pdattn.ops.kernels import for_products, in_output_layout

#: How many causal queries share a block, where the kernel wants a mask of theirs.
CAUSAL_BLOCK = 1024
#: The same on a GPU, where starting a kernel takes longer than such a block.
CAUSAL_BLOCK_ON_GPU = 8192
#: Up to how many of them weights are faster written down, if there are own examples.
LEAST_WITH_OWN = 512
#: Kernels want depths that are multiples of this.
ALIGNMENT = 8


def can_fuse(examples):
    """Whether the kernel takes such examples, and keeps their dtype."""
    if is_double(examples.value.dtype):
        return False
    if native.IS_TORCH:
        return True
    has_one_depth = examples.key.shape[-1] == examples.value.shape[-1]
    return examples.own is None and (has_one_depth or keras.backend.backend() != "jax")


def is_fastest(query, examples):
    """Whether that op is a kernel that writes down no weights, and so the fastest.

    It is on torch, and for 16 bits on JAX on a GPU. Own examples take more around it.
    """
    if not native.IS_TORCH:
        dtype = examples.value.dtype
        is_narrow = accumulator(dtype) != keras.backend.standardize_dtype(dtype)
        return native.jax_runs_on_gpu() and is_narrow
    return examples.own is None or query.shape[1] > LEAST_WITH_OWN


def fused_softmax_attention(query, examples, scale, flash_attention=None):
    """Softmax attention by the backend's kernel.

    Args:
        query: `(B, T, H, D)`.
        examples: `Examples` that `can_fuse`.
        scale: factor on the products of queries and keys.
        flash_attention: as in `keras.ops.dot_product_attention`.

    Returns:
        The output, `(B, T, H, Dv)`; zero for a query that sees nothing.
    """
    if examples.is_causal and _takes_masks_for_causality(flash_attention, examples):
        return _in_causal_blocks(query, examples, scale)
    mask, is_causal = examples.kernel_mask(), examples.is_triangular
    return _attend(query, examples, mask, examples.sighted(), scale, is_causal, flash_attention)


def _attend(query, examples, mask, sighted, scale, is_causal=False, flash_attention=None):
    tensors = query, examples.key, examples.value
    if not flash_attention:
        tensors = [for_products(tensor) for tensor in tensors]
    output = native.softmax_attention(*tensors, mask, scale, is_causal, flash_attention)
    if sighted is not None:
        # The kernels give the mean of all values where every score is masked.
        output = ops.where(in_output_layout(sighted), output, 0.0)
    return cast(output, examples.value.dtype)


def _takes_masks_for_causality(flash_attention, examples):
    """Whether torch is to choose a kernel, and causality is not all that limits queries."""
    is_causal_only = examples.is_triangular and examples.kernel_mask() is None
    return native.IS_TORCH and not flash_attention and not is_causal_only


def _in_causal_blocks(query, examples, scale):
    """A block of queries after the other, each with the examples up to its last query.

    Torch's kernel takes causality as a mask if there is any other: of all pairs none is made,
    and half of them are not looked at.
    """
    size = CAUSAL_BLOCK_ON_GPU if query.is_cuda else CAUSAL_BLOCK
    length = query.shape[1]
    if length <= size:
        return _attend_block(query, examples, slice(0, length), scale)
    attend, outputs = keras.remat(_attend_block), []
    for start in range(0, length, size):
        block = slice(start, min(start + size, length))
        outputs.append(attend(query[:, block], examples, block, scale))
    return ops.concatenate(outputs, axis=1)


def _attend_block(query, examples, block, scale):
    examples = examples.of_block(block)
    if examples.own is not None:
        return _attend_with_own(query, examples, scale)
    return _attend(query, examples, examples.visibility(), examples.sighted(), scale)


def _attend_with_own(query, examples, scale):
    """Each query's own example as one key for all, whose score is a feature of the query.

    Its value is zero. A column of ones tells what weight the others have; the rest is the
    weight of the own value.
    """
    own, depth = examples.own, examples.value.shape[-1]
    score = ops.sum(widen(query) * widen(own.key), axis=-1, keepdims=True)
    # In two numbers, as 16 bits would round one off.
    high = cast(score, query.dtype)
    low = cast(score - widen(high), query.dtype)
    query = ops.concatenate([query, high, low], axis=-1)
    own_key = _append(ops.zeros_like(examples.key[:, :1]), [1.0, 1.0])
    key = ops.concatenate([own_key, _append(examples.key, [0.0, 0.0])], axis=1)
    value = lead_with_zero(_append(examples.value, [1.0]))
    width = -(-max(key.shape[-1], value.shape[-1]) // ALIGNMENT) * ALIGNMENT
    query, key, value = (fit_axis(x, 3, width) for x in (query, key, value))
    mask = _lead_with_own(examples.visibility(), own.visibility())
    with_own = dataclasses.replace(examples, key=key, value=value)
    output = _attend(query, with_own, mask, _sees_any(examples), scale)
    others, weight = output[..., :depth], 1.0 - output[..., depth : depth + 1]
    if own.visibility() is not None:
        weight = ops.where(in_output_layout(own.visibility()), weight, 0.0)
    return others + weight * own.value


def _sees_any(examples):
    """`sighted()` of examples and own ones."""
    own_mask, sighted = examples.own.visibility(), examples.sighted()
    return None if own_mask is None or sighted is None else ops.logical_or(sighted, own_mask)


def _append(x, features):
    """Appends features, a list of numbers, to the last axis of `x`."""
    return append(x, ops.convert_to_tensor(features, dtype=x.dtype), axis=-1)


def _lead_with_own(mask, own_mask):
    """Puts a column for own examples in front of `mask`, `(B or 1, H or 1, T, M)`."""
    if own_mask is None:
        own_mask = ops.ones((1, 1, 1), dtype="bool")
    own_mask = ops.expand_dims(own_mask, axis=-1)
    lead = np.broadcast_shapes(mask.shape[:3], own_mask.shape[:3])
    return ops.concatenate([ops.broadcast_to(x, (*lead, x.shape[3])) for x in (own_mask, mask)], 3)
