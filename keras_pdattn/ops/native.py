"""What a backend does in one operation of its own that `keras.ops` takes several for."""

import functools
import itertools

import keras
from keras import ops

#: What is added to a score that is not to count.
UNSEEN = -1e30


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

    if mask is not None:
        # Not `-inf`, of which a row that sees nothing would make NaN.
        mask = torch.where(mask, 0.0, UNSEEN).to(query.dtype)
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    output = attend(*heads_first, attn_mask=mask, scale=scale, is_causal=is_causal)
    return output.transpose(1, 2)


@functools.cache
def jax_runs_on_gpu():
    """Whether the backend is JAX, on a GPU."""
    if keras.backend.backend() != "jax":
        return False
    return not keras.distribution.list_devices()[0].startswith("cpu")


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
