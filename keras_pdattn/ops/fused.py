"""Softmax attention by the backend's own kernel, the weights never written down."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.dtypes import accumulator, cast, is_double, nothing, widen
from keras_pdattn.ops.indexing import (
    append_axes,
    even,
    fit_axis,
    lead_with_zero,
    slices,
    swap_heads_and_time,
)
from keras_pdattn.ops.kernels import for_products, in_output_layout
from keras_pdattn.ops.records import replace

#: How many causal queries share a block, where the kernel wants a mask of theirs.
CAUSAL_BLOCK = 1024
#: The same on a GPU, where starting a kernel takes longer than such a block.
CAUSAL_BLOCK_ON_GPU = 8192
#: Up to how many of them weights are faster written down, if there are own examples.
LEAST_WITH_OWN = 512
#: Kernels want depths that are multiples of this.
ALIGNMENT = 8
#: How many times as many queries, or examples, groups of heads may be filled up to for one kernel;
#: and how many queries at most, which do not leave a GPU idle.
MOST_FILLING, MOST_FILLED = 4, 2**17


def can_fuse(examples):
    """Whether the kernel takes such examples, keeps their dtype and writes down no weights."""
    if is_double(examples.value.dtype):
        return False
    if examples.own is not None:
        if native.IS_TORCH:
            return examples.is_causal
        dtype = keras.backend.standardize_dtype(examples.value.dtype)
        width = _width_with_own(examples)
        return _sees_all_before(examples) and native.has_cudnn(dtype, width)
    has_one_depth = examples.key.shape[-1] == examples.value.shape[-1]
    return has_one_depth or not native.IS_JAX


def is_fastest(query, examples):
    """Whether that op is a kernel that writes down no weights, and so the fastest.

    It is on torch, and for 16 bits on JAX on a GPU. Own examples take more around it.
    """
    if not native.IS_TORCH:
        dtype = examples.value.dtype
        is_narrow = accumulator(dtype) != keras.backend.standardize_dtype(dtype)
        return native.jax_runs_on_gpu() and is_narrow
    takes_no_more = examples.own is None or examples.has_running_means
    return takes_no_more or query.shape[1] > LEAST_WITH_OWN


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
    if examples.has_running_means:
        return _attend_to_running_means(query, examples, scale)
    if _sees_all_before(examples):
        return _Call.of(query, examples).answer(scale, flash_attention)
    if examples.is_causal and _takes_masks_for_causality(flash_attention, examples):
        return _in_causal_blocks(query, examples, scale)
    mask, is_causal = examples.kernel_mask(), examples.is_triangular
    return _attend(query, examples, mask, examples.sighted(), scale, is_causal, flash_attention)


def has_kernel_for_groups():
    """Whether the backend has a kernel that takes groups of heads with other numbers of examples.

    JAX runs one kernel after the other, each of which leaves most of a GPU idle if sequences are
    short.
    """
    return native.jax_runs_on_gpu()


def fused_attention_of_groups(queries, examples, scale):
    """Softmax attention of groups of heads by one call of the backend's kernel.

    Args:
        queries: list of tensors `(B, T, H, D)`, of which only H differs.
        examples: list of `Examples`, one for each group.
        scale: factor on the products of queries and keys.

    Returns:
        List of outputs, `(B, T, H, Dv)`; `None` where no kernel takes these together.
    """
    dtypes = {keras.backend.standardize_dtype(x.dtype) for x in queries}
    if not native.has_cudnn(*dtypes, queries[0].shape[3]) or any(map(_is_restricted, examples)):
        return None
    calls = [_Call.of(*group) for group in zip(queries, examples)]
    return _answer_together(calls, scale) if _fit_together(calls) else None


def _is_restricted(examples):
    """Whether more than causality, in a form that kernels know, limits queries."""
    own = examples.own
    limits = [examples.mask, examples.visible, examples.window]
    if own is None:
        is_known = examples.is_triangular or not examples.is_causal
    else:
        is_known = examples.is_causal and not examples.is_triangular
        limits += [own.mask, own.visible, examples.start, examples.query_start]
    return not is_known or any(limit is not None for limit in limits)


def _attend_to_running_means(query, examples, scale):
    """Attention where the own example of each query is among the others, at its place."""
    some, sighted = examples.own.mask, None
    if some is not None:
        # In a sequence that is all padding nothing is in the window of any head.
        sighted = examples.limit >= append_axes(examples.start, 1)
        sighted = append_axes(sighted & ops.any(some[..., 0], axis=1, keepdims=True), 1)
        # What sees nothing is given something, lest the kernel make NaN of it.
        some = some | ~sighted
        sighted = ops.transpose(sighted, (0, 2, 1))
    mask = native.mask_of_running_means(examples.mask, some, query.dtype)
    return _attend(query, examples, mask, sighted, scale)


def _attend(query, examples, mask, sighted, scale, is_causal=False, flash_attention=None):
    tensors = query, examples.key, examples.value
    output = _by_kernel(*tensors, mask, scale, is_causal, flash_attention)
    if sighted is not None:
        # The kernels give the mean of all values where every score is masked.
        output = native.zero_unless(in_output_layout(sighted), output)
    return cast(output, examples.value.dtype)


def _by_kernel(query, key, value, mask, scale, is_causal, flash_attention=None):
    """`native.softmax_attention`, in the shapes that a kernel of cuDNN takes in JAX.

    That has no gradient for odd lengths, nor masks that are broadcast over queries: Keras would
    write down all weights instead, as it may for a single query.
    """
    if not flash_attention:
        query, key, value = (for_products(x) for x in (query, key, value))
    lengths = query.shape[1], key.shape[1]
    if flash_attention is False or not _has_cudnn(query, key, value) or not _is_odd(mask, lengths):
        return native.softmax_attention(query, key, value, mask, scale, is_causal, flash_attention)
    depth, dtype = value.shape[3], keras.backend.standardize_dtype(value.dtype)
    is_of_keys = mask is not None and mask.shape[1] == mask.shape[2] == 1
    if is_of_keys and native.has_cudnn(dtype, depth + ALIGNMENT):
        query, key, value = _hide_keys(query, key, value, mask)
        mask = None
    query, key, value = (fit_axis(x, 1, even(x.shape[1])) for x in (query, key, value))
    of_each = [np.full(query.shape[0], length, "int32") for length in lengths]
    if mask is not None:
        mask = ops.broadcast_to(mask, (*mask.shape[:2], *lengths))
        for axis in (2, 3):
            mask = fit_axis(mask, axis, even(mask.shape[axis]), fill=False)
        of_each = [None, None]
    output = native.softmax_attention_of_lengths(
        query, key, value, *of_each, scale, is_causal, mask
    )
    return output[:, : lengths[0], :, :depth]


def _hide_keys(query, key, value, mask):
    """Queries, keys and values, a feature hiding what `mask`, `(B or 1, 1, 1, S)`, leaves out.

    Of a mask, the kernel would have an entry for each query and key.
    """
    mask = ops.transpose(mask, (0, 3, 2, 1))
    # In float16 their scores could make up for what hides them.
    key = native.zero_unless(mask, key)
    hidden = ops.where(mask, 0.0, max(nothing(), float(ml_dtypes.finfo(key.dtype).min) / 2))
    hidden = ops.broadcast_to(cast(hidden, key.dtype), (*key.shape[:3], 1))
    width = key.shape[3] + ALIGNMENT
    query = fit_axis(fit_axis(query, 3, query.shape[3] + 1, fill=1), 3, width)
    key = fit_axis(native.concatenate([key, hidden], axis=-1), 3, width)
    return query, key, fit_axis(value, 3, width)


def _is_odd(mask, lengths):
    """Whether a kernel of cuDNN wants other shapes for several queries."""
    return lengths[0] > 1 and (mask is not None or any(length % 2 for length in lengths))


def _has_cudnn(*tensors):
    """Whether JAX has a kernel of cuDNN for queries, keys and values, whose sizes are known."""
    if not native.jax_runs_on_gpu():
        return False
    is_known = all(isinstance(size, int) for x in tensors for size in x.shape)
    dtypes = {keras.backend.standardize_dtype(x.dtype) for x in tensors}
    depths = {x.shape[3] for x in tensors}
    return is_known and len(dtypes) == len(depths) == 1 and native.has_cudnn(*dtypes, *depths)


def _takes_masks_for_causality(flash_attention, examples):
    """Whether torch is to choose a kernel, and causality is not all that limits queries."""
    return native.IS_TORCH and not flash_attention and _is_restricted(examples)


def _in_causal_blocks(query, examples, scale):
    """A block of queries after the other, each with the examples up to its last query.

    Torch's kernel takes causality as a mask if there is any other: of all pairs none is made,
    and half of them are not looked at.
    """
    size = CAUSAL_BLOCK_ON_GPU if query.is_cuda else CAUSAL_BLOCK
    length = query.shape[1]
    if length <= size:
        return _attend_block(query, examples.of_block(slice(0, length)), scale)
    attend, outputs = keras.remat(_attend_block), []
    for block in slices(length, size):
        outputs.append(attend(query[:, block], examples.of_block(block), scale))
    return native.concatenate(outputs, axis=1)


def _attend_block(query, examples, scale):
    if examples.own is not None:
        return _attend_with_own(query, examples, scale)
    return _attend(query, examples, examples.visibility(), examples.sighted(), scale)


def _sees_all_before(examples):
    """Whether there are own examples, and each query sees its own and all others before it."""
    return examples.own is not None and not _is_restricted(examples)


def _attend_with_own(query, examples, scale):
    """Attention of queries that have own examples, of which a mask says what each sees."""
    own, query, with_own = examples.own, *_lead_with_own(query, examples)
    mask = _lead_mask_with_own(examples.visibility(), own.visibility())
    output = _attend(query, with_own, mask, _sees_any(examples), scale)
    return _mix_with_own(output, own)


def _lead_with_own(query, examples):
    """Queries, and examples with one more, the same for all, in the place of each query's own.

    Its score is zero, and those of the others are less that of the own example, which features
    of the query take off: no softmax notices. Its value is zero, and a column of ones tells what
    weight the others have; the rest is the weight of the own value.
    """
    own = examples.own
    less = -ops.sum(widen(query) * native.widened(own.key), axis=-1, keepdims=True)
    high = cast(less, query.dtype)
    features = [query, high]
    if high is not less:
        # 16 bits rounded it off: what they left takes another feature.
        features.append(cast(less - native.widened(high), query.dtype))
    width = _width_with_own(examples)
    query = fit_axis(native.concatenate(features, axis=-1), 3, width)
    key, value = (
        lead_with_zero(fit_axis(x, 3, width, fill=1)) for x in (examples.key, examples.value)
    )
    return query, replace(examples, key=key, value=value)


def _width_with_own(examples):
    """How wide vectors are with features for own examples."""
    depth = max(examples.key.shape[-1], examples.value.shape[-1])
    return -(-(depth + 2) // ALIGNMENT) * ALIGNMENT


def _mix_with_own(output, own):
    """The output, from that of the examples that `_lead_with_own` gives."""
    depth = own.value.shape[-1]
    others, weight = output[..., :depth], 1.0 - output[..., depth : depth + 1]
    if own.visibility() is not None:
        weight = native.zero_unless(in_output_layout(own.visibility()), weight)
    return others + weight * own.value


def _sees_any(examples):
    """`sighted()` of examples and own ones."""
    own_mask, sighted = examples.own.visibility(), examples.sighted()
    return None if own_mask is None or sighted is None else ops.logical_or(sighted, own_mask)


def _lead_mask_with_own(mask, own_mask):
    """Puts a column for own examples in front of `mask`, `(B or 1, H or 1, T, M)`."""
    if own_mask is None:
        own_mask = ops.ones((1, 1, 1), dtype="bool")
    own_mask = ops.expand_dims(own_mask, axis=-1)
    lead = np.broadcast_shapes(mask.shape[:3], own_mask.shape[:3])
    return native.concatenate(
        [ops.broadcast_to(x, (*lead, x.shape[3])) for x in (own_mask, mask)], 3
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """A call of a kernel where nothing but causality limits queries.

    Attributes:
        query: `(B, T, H, D)`.
        key: `(B, M, H, D)`.
        value: `(B, M, H, Dv)`.
        is_causal: whether query i sees keys 0 to i only.
        finish: function from the kernel's output to that of the queries.
    """

    query: Any
    key: Any
    value: Any
    is_causal: bool
    finish: Callable = lambda output: output

    @classmethod
    def of(cls, query, examples):
        """The call for queries of `Examples` that are not restricted."""
        if examples.own is None:
            return cls(query, examples.key, examples.value, examples.is_triangular)
        return cls._by_place(*_lead_with_own(query, examples), examples.own)

    @classmethod
    def _by_place(cls, query, examples, own):
        """The queries at one place of their windows as heads of their own, its own example leading.

        The first of these sees that alone, the next one also the first window, and so on: what
        kernels know as causal, with no mask and half of the products.
        """
        batch, length, num_heads, width = native.shape(query)
        stride = examples.stride
        num_windows = (length + stride - 1) // stride
        by_place = (batch, num_windows, stride * num_heads, width)

        def at_each_place(x):
            x = ops.expand_dims(fit_axis(x, 1, num_windows), axis=2)
            x = ops.broadcast_to(x, (batch, num_windows, stride, num_heads, width))
            return native.reshape(x, by_place)

        def finish(output):
            output = native.reshape(output, (batch, num_windows * stride, num_heads, width))
            return _mix_with_own(output[:, :length], own)

        query = native.reshape(fit_axis(query, 1, num_windows * stride), by_place)
        key, value = at_each_place(examples.key), at_each_place(examples.value)
        return cls(query, key, value, True, finish)

    def answer(self, scale, flash_attention):
        """The output of the queries."""
        tensors = self.query, self.key, self.value
        output = _by_kernel(*tensors, None, scale, self.is_causal, flash_attention)
        return self.finish(cast(output, self.value.dtype))


def _fit_together(calls):
    """Whether a kernel takes such calls as one, and does not mostly work on what fills them up."""
    tensors = [(call.query, call.key, call.value) for call in calls]
    if len({call.is_causal for call in calls}) > 1:
        return False
    if not all(_has_cudnn(*group) for group in tensors):
        return False
    queries, keys, _ = zip(*tensors)
    (used, filled), of_keys = _filling(queries), _filling(keys)
    if used < filled and filled > MOST_FILLED:
        return False
    return filled <= MOST_FILLING * used and of_keys[1] <= MOST_FILLING * of_keys[0]


def _filling(tensors):
    """How many vectors there are, and how many once all sequences have the length of the longest.

    Of `(B, T, H, D)`, which differ in T and H.
    """
    batches, lengths, heads, _ = zip(*(x.shape for x in tensors))
    used = sum(length * count for length, count in zip(lengths, heads))
    return batches[0] * used, batches[0] * max(lengths) * sum(heads)


def _answer_together(calls, scale):
    """The outputs of the queries, each head being a sequence with lengths of its own."""
    groups = [[getattr(call, name) for call in calls] for name in ("query", "key", "value")]
    depth = max(x.shape[3] for group in groups for x in group)
    heads = [x.shape[2] for x in groups[0]]
    lengths = [
        np.repeat([x.shape[1] for x in group], heads).astype("int32") for group in groups[:2]
    ]
    batch = groups[0][0].shape[0]
    output = native.softmax_attention_of_lengths(
        *(_as_rows(group, depth) for group in groups),
        *(np.tile(one, batch) for one in lengths),
        scale,
        calls[0].is_causal,
    )
    output = native.reshape(output, (batch, sum(heads), *output.shape[1::2]))
    outputs = native.split(swap_heads_and_time(output), heads, axis=2)
    return [
        call.finish(output[:, : call.query.shape[1], :, : call.value.shape[3]])
        for call, output in zip(calls, outputs)
    ]


def _as_rows(tensors, depth):
    """Heads as sequences of one head, filled up to one length and depth: `(B * H, T, 1, D)`."""
    length = even(max(x.shape[1] for x in tensors))
    filled = [fit_axis(fit_axis(x, 1, length), 3, depth) for x in tensors]
    x = swap_heads_and_time(native.concatenate(filled, axis=2))
    return native.reshape(x, (-1, length, 1, depth))
