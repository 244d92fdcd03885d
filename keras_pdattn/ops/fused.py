"""Softmax attention by the backend's own kernel, the weights never written down."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.dtypes import accumulator, cast, is_double
from keras_pdattn.ops.indexing import fit_axis, lead_with_zero
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
    if native.IS_TORCH or _sees_all_before(examples):
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
    if _sees_all_before(examples):
        return _attend_with_own(query, examples, scale)
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


def _sees_all_before(examples):
    """Whether there are own examples, and each query sees its own and all others before it."""
    own = examples.own
    return own is not None and own.visibility() is None and examples.restrictions() is None


def _attend_with_own(query, examples, scale):
    """Each query's own example as one more key, the same for all, whose score is zero.

    The other scores are less that of the own example, which features of the query take off: no
    softmax notices. The one more value is zero, and a column of ones tells what weight the others
    have; the rest is the weight of the own value.
    """
    own, depth = examples.own, examples.value.shape[-1]
    score = ops.sum(native.widened(query) * native.widened(own.key), axis=-1, keepdims=True)
    # In two numbers, as 16 bits would round one off.
    high = cast(score, query.dtype)
    low = cast(score - native.widened(high), query.dtype)
    width = -(-(max(query.shape[-1], depth) + 2) // ALIGNMENT) * ALIGNMENT
    rest = ops.zeros_like(query[..., : width - query.shape[-1] - 2])
    query = ops.concatenate([query, -high, -low, rest], axis=-1)
    key, value = (
        lead_with_zero(fit_axis(x, 3, width, fill=1)) for x in (examples.key, examples.value)
    )
    with_own = dataclasses.replace(examples, key=key, value=value)
    if _sees_all_before(examples):
        output = _attend_by_place(query, with_own, scale)
    else:
        mask = _lead_with_own(examples.visibility(), own.visibility())
        output = _attend(query, with_own, mask, _sees_any(examples), scale)
    others, weight = output[..., :depth], 1.0 - output[..., depth : depth + 1]
    if own.visibility() is not None:
        weight = ops.where(in_output_layout(own.visibility()), weight, 0.0)
    return others + weight * own.value


def _attend_by_place(query, examples, scale):
    """The queries at one place of their windows as heads of their own, the own example leading.

    The first of these sees that alone, the next one also the first window, and so on: what
    kernels know as causal, with no mask and half of the products.
    """
    batch, length, num_heads, width = ops.shape(query)
    stride = examples.stride
    num_windows = (length + stride - 1) // stride
    by_place = (batch, num_windows, stride * num_heads)

    def of_each_place(x):
        x = ops.expand_dims(fit_axis(x, 1, num_windows), axis=2)
        x = ops.broadcast_to(x, (batch, num_windows, stride, num_heads, width))
        return native.reshape(x, (*by_place, width))

    query = native.reshape(fit_axis(query, 1, num_windows * stride), (*by_place, width))
    examples = dataclasses.replace(
        examples, key=of_each_place(examples.key), value=of_each_place(examples.value)
    )
    output = _attend(query, examples, None, None, scale, is_causal=True)
    return native.reshape(output, (batch, num_windows * stride, num_heads, width))[:, :length]


def _sees_any(examples):
    """`sighted()` of examples and own ones."""
    own_mask, sighted = examples.own.visibility(), examples.sighted()
    return None if own_mask is None or sighted is None else ops.logical_or(sighted, own_mask)


def _lead_with_own(mask, own_mask):
    """Puts a column for own examples in front of `mask`, `(B or 1, H or 1, T, M)`."""
    if own_mask is None:
        own_mask = ops.ones((1, 1, 1), dtype="bool")
    own_mask = ops.expand_dims(own_mask, axis=-1)
    lead = np.broadcast_shapes(mask.shape[:3], own_mask.shape[:3])
    return ops.concatenate([ops.broadcast_to(x, (*lead, x.shape[3])) for x in (own_mask, mask)], 3)
