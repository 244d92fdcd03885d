"""What a backend does in one operation of its own that `keras.ops` takes several for."""

import functools
import itertools

import keras
from keras import ops

#: What is added to a score that is not to count.
UNSEEN = -1e30
#: Queries that see a mask of their own and earlier keys, on torch.
CAUSAL_BLOCK = 1024


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
    if keras.backend.backend() != "torch":
        x = ops.tensordot(x, kernel, axes=num_widths)
        return x if bias is None else x + bias
    import torch

    x = x if num_widths == 1 else x.flatten(-num_widths)
    matrix = kernel.reshape(x.shape[-1], -1).t()
    x = torch.nn.functional.linear(x, matrix, None if bias is None else bias.reshape(-1))
    return x.unflatten(-1, kernel.shape[num_widths:])


def reshape(x, shape):
    """`ops.reshape`, which checks for symbolic tensors at ten times the cost of torch's own."""
    return x.reshape(shape) if keras.backend.backend() == "torch" else ops.reshape(x, shape)


def split(x, sizes, axis):
    """Cuts `axis` of `x` into parts of these sizes.

    Slices would each add up a gradient as large as `x` on torch.
    """
    if len(sizes) == 1:
        return [x]
    if keras.backend.backend() == "torch":
        return x.split(sizes, axis)
    return ops.split(x, list(itertools.accumulate(sizes[:-1])), axis=axis)


def softmax_attention(query, key, value, mask, scale, is_causal, flash_attention=None):
    """`ops.dot_product_attention`; on torch without its copies of queries, keys and values."""
    is_torch = keras.backend.backend() == "torch"
    if is_torch and flash_attention is None and query.dtype == key.dtype == value.dtype:
        return _torch_softmax_attention(query, key, value, mask, scale, is_causal)
    return ops.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        flash_attention=False if is_torch and flash_attention is None else flash_attention,
    )


def _torch_softmax_attention(query, key, value, mask, scale, is_causal):
    """Chooses flash attention by itself; asking beforehand would break a compiled graph."""
    import torch

    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=scale)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if mask is None:
        output = attend(query, key, value, is_causal=is_causal)
    elif is_causal:
        output = _torch_causal_attention(query, key, value, mask, attend)
    else:
        output = attend(query, key, value, attn_mask=_additive(mask, query))
    return output.transpose(1, 2)


def _torch_causal_attention(query, key, value, mask, attend):
    """A block of queries after the other: torch takes causality as a mask of pairs if any other."""
    import torch

    @keras.remat
    def attend_block(query, key, value, mask, start):
        position = torch.arange(start, start + query.shape[2], device=query.device)
        earlier = torch.arange(key.shape[2], device=query.device) <= position[:, None]
        return attend(query, key, value, attn_mask=_additive(mask & earlier, query))

    outputs = []
    for start in range(0, query.shape[2], CAUSAL_BLOCK):
        stop = start + CAUSAL_BLOCK
        of_block = mask if mask.shape[2] == 1 else mask[:, :, start:stop]
        seen = key[:, :, :stop], value[:, :, :stop], of_block[..., :stop]
        outputs.append(attend_block(query[:, :, start:stop], *seen, start))
    return torch.cat(outputs, dim=2)


def _additive(mask, query):
    """What is added to scores; not `-inf`, of which a row that sees nothing would make NaN."""
    import torch

    return torch.where(mask, 0.0, UNSEEN).to(query.dtype)


def exp_below_zero(x):
    """e^x below zero, x + 1 above: elu(x) + 1, small values not rounded off.

    Run eagerly on torch, a gradient of its own saves half of the passes over `x`.
    """
    if keras.backend.backend() == "torch":
        return _torch_exp_below_zero().apply(x)
    # `x` less its positive part is its negative part, with the slope of `x` at zero.
    positive = ops.relu(x)
    return positive + ops.exp(x - positive)


@functools.cache
def _torch_exp_below_zero():
    import torch

    class ExpBelowZero(torch.autograd.Function):
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

    return ExpBelowZero


def heads_apart(x):
    """`x`, `(B, T, H, D)`, with the numbers of one head together in memory, on torch.

    Its products are of one head, and what they give is laid out like that. Elementwise
    operations on two tensors laid out differently take several times as long.
    """
    if keras.backend.backend() != "torch":
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)
