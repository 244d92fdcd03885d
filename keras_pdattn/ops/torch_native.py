"""Torch's own operations; imported where it is the backend."""

import functools

import torch
from torch.compiler import is_compiling  # noqa: F401
from torch.nn import functional

from keras_pdattn.ops.dtypes import NOTHING


def linear(x, kernel, bias, num_widths):
    x = x if num_widths == 1 else x.flatten(-num_widths)
    matrix = kernel.reshape(x.shape[-1], -1).t()
    x = functional.linear(x, matrix, None if bias is None else bias.reshape(-1))
    # Not `unflatten`, after which an exporter takes the length of its sample for that of all.
    return x.reshape((*x.shape[:-1], *kernel.shape[num_widths:]))


def pad(x, widths, fill):
    return functional.pad(x, [width for pair in reversed(widths) for width in pair], value=fill)


def mean(x, axis, dtype, keepdims):
    dtype = getattr(torch, dtype)
    if x.is_cuda:
        # Whose sums are wide in any case.
        return x.mean(axis, keepdims, dtype=dtype)
    return x.mean(axis, keepdims, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)


def take(x, index, axis):
    return x.index_select(axis, index)


def take_along_axis(x, index, axis):
    shape = list(x.shape)
    shape[axis] = -1
    return x.gather(axis, index.long().expand(shape))


def is_tracing():
    return torch.jit.is_tracing()


def softmax_attention(query, key, value, mask, scale, is_causal):
    """Chooses flash attention by itself; asking beforehand would break a compiled graph.

    Takes a mask or causality, not both.
    """
    dtype = query.dtype
    if not dtype == key.dtype == value.dtype:
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in (query, key, value)))
    if mask is not None:
        # Not `-inf`, of which a row that sees nothing would make NaN.
        hidden = max(NOTHING, torch.finfo(dtype).min / 2)
        mask = torch.where(mask, 0.0, hidden).to(dtype)
    heads_first = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    output = functional.scaled_dot_product_attention(
        *heads_first, attn_mask=mask, scale=scale, is_causal=is_causal
    )
    return output.transpose(1, 2)


class ExpBelowZero(torch.autograd.Function):
    """e^x below zero, x + 1 above; its slope is its value, one at most."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clamp(max=0).exp_().add_(x.relu())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient):
        (output,) = ctx.saved_tensors
        return gradient * output.clamp(max=1)
