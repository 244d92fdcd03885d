"""Torch's own operations; imported where it is the backend."""

import functools
import itertools

import torch
from torch.compiler import is_compiling  # noqa: F401
from torch.nn import functional

from keras_pdattn.ops.dtypes import nothing

#: Dtypes that sums may be carried in.
WIDE = torch.float32, torch.float64


def linear(x, kernel, bias, num_widths):
    x = x if num_widths == 1 else x.flatten(-num_widths)
    matrix = kernel.reshape(x.shape[-1], -1).t()
    x = functional.linear(x, matrix, None if bias is None else bias.reshape(-1))
    # Not `unflatten`, after which an exporter takes the length of its sample for that of all.
    return x.reshape((*x.shape[:-1], *kernel.shape[num_widths:]))


def pad(x, widths, fill):
    return functional.pad(x, [width for pair in reversed(widths) for width in pair], value=fill)


def integers(numbers, x):
    return torch.tensor(numbers, dtype=torch.int32).to(x.device, non_blocking=True)


def mean(x, axis, dtype, keepdims):
    dtype = getattr(torch, dtype) if dtype else x.dtype
    if x.is_cuda or dtype in WIDE:
        # On a GPU sums are wide in any case.
        return x.mean(axis, keepdims, dtype=dtype)
    return x.mean(axis, keepdims, dtype=torch.float32).to(dtype)


def concatenate(tensors, axis):
    return torch.cat(tensors, axis)


def split(x, sizes, axis):
    return x.split_with_sizes(sizes, axis)


def take(x, index, axis):
    return x.index_select(axis, index)


def entry(x, index):
    return x.index_select(0, index).squeeze(0)


def take_along_axis(x, index, axis):
    shape = list(x.shape)
    shape[axis] = -1
    return x.gather(axis, index.long().expand(shape))


def zero_unless(mask, x):
    return torch.where(mask, x, 0.0)


def is_tracing():
    return torch.jit.is_tracing()


def softmax_attention(query, key, value, mask, scale, is_causal):
    """Chooses flash attention by itself; asking beforehand would break a compiled graph.

    Takes a mask, boolean or to be added to scores, or causality, not both.
    """
    tensors, dtype = (query, key, value), query.dtype
    if not dtype == key.dtype == value.dtype:
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
        tensors = [x.to(dtype) for x in tensors]
    if mask is not None and mask.dtype == torch.bool:
        hidden = nothing()
        if dtype == torch.float16:
            # Scores may be as low as any number that it holds; what sees nothing is given
            # everything, lest `-inf` make NaN of it.
            mask, hidden = mask | ~mask.any(-1, keepdim=True), -torch.inf
        mask = torch.where(mask, 0.0, hidden)
    mask = mask if mask is None else mask.to(dtype)
    output = functional.scaled_dot_product_attention(
        *[x.transpose(1, 2) for x in tensors], attn_mask=mask, scale=scale, is_causal=is_causal
    )
    return output.transpose(1, 2)


def mask_of_running_means(ends, some, dtype):
    length, hidden = ends.shape[1], -torch.inf
    later = torch.full((length, length), hidden, dtype=dtype, device=ends.device).triu_(1)
    # One pass over all pairs, where booleans would take three. Kernels want time last in memory.
    mask = later + torch.where(ends.mT.contiguous().unsqueeze(2), 0.0, hidden).to(dtype)
    own = mask.diagonal(dim1=2, dim2=3)
    own.zero_() if some is None else own.copy_(torch.where(some.mT, 0.0, hidden))
    return mask


def has_exact_sums(x):
    """Whether products of float32 `x` are as exact as sums."""
    is_narrowed = torch.is_autocast_enabled(x.device.type)
    return not is_narrowed and torch.get_float32_matmul_precision() == "highest"


def run(function, *inputs):
    """`function`, a `torch.autograd.Function`; without what that costs where gradients are off.

    Which on a short sequence is more than what it computes.
    """
    return (function.apply if torch.is_grad_enabled() else function.forward)(*inputs)


class ExpBelowZero(torch.autograd.Function):
    """e^x below zero, x + 1 above; its slope is its value, one at most."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clamp(max=0).exp_().add_(x.relu())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, gradient):
        (output,) = ctx.saved_tensors
        return gradient * output.clamp(max=1)

    jvp = backward


#: The least number of entries that passes are saved over at the price of more operations.
LEAST_ENTRIES = 2**18


class Ratio(torch.autograd.Function):
    """`part` less all of `less`, over `total`; gradients need not look at `part`."""

    @staticmethod
    def forward(part, total, *less):
        if not less:
            return part / total
        first, *others = less
        difference = part - first
        for one in others:
            difference = difference.sub_(one)
        return difference.div_(total)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shapes = [x.shape for x in inputs]
        ctx.save_for_backward(output, inputs[1])
        ctx.save_for_forward(output, inputs[1])

    @staticmethod
    def backward(ctx, gradient):
        ratio, total = ctx.saved_tensors
        of_part, of_total, of_less = gradient / total, None, None
        _, wants_total, *wants_less = ctx.needs_input_grad
        if wants_total:
            of_total = (of_part * ratio).neg_()
        if any(wants_less):
            of_less = -of_part
        found = [of_part, of_total, *(of_less if wants else None for wants in wants_less)]
        return tuple(
            x if x is None else x.sum_to_size(shape) for x, shape in zip(found, ctx.shapes)
        )

    @staticmethod
    def jvp(ctx, of_part, of_total, *of_less):
        ratio, total = ctx.saved_tensors
        changes = [of_part, *(-x for x in of_less if x is not None)]
        if of_total is not None:
            changes.append(-ratio * of_total)
        return sum(x for x in changes if x is not None) / total

    @staticmethod
    def vmap(info, in_dims, part, *others):
        # Work in place needs a batch of what is worked on, whatever else there is a batch of.
        part_dim, *dims = in_dims
        if part_dim is None:
            part = part.expand(info.batch_size, *part.shape)
        else:
            part = part.movedim(part_dim, 0)
        others = [
            x if dim is None else _fit_rank(x.movedim(dim, 0), part.dim())
            for x, dim in zip(others, dims)
        ]
        return Ratio.apply(part, *others), 0


def _fit_rank(x, rank):
    """`x` with axes of size one behind its first, `rank` in all."""
    return x.reshape(x.shape[0], *[1] * (rank - x.dim()), *x.shape[1:])


class Overlapping(torch.autograd.Function):
    """`x.unfold`, whose own gradient adds up one entry after the other, in twice the time."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, axis, width, step):
        return x.unfold(axis, width, step).movedim(-1, axis + 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.arguments = inputs
        ctx.length = x.shape[ctx.arguments[0]]

    @staticmethod
    def backward(ctx, gradient):
        axis, width, step = ctx.arguments
        count, shape = gradient.shape[axis], list(gradient.shape)
        shape[axis : axis + 2] = ctx.length // step, step
        total = gradient.new_zeros(shape)
        for index, start in enumerate(range(0, width, step)):
            size = min(step, width - start)
            steps = total.narrow(axis, index, count).narrow(axis + 1, 0, size)
            steps.add_(gradient.narrow(axis + 1, start, size))
        return total.flatten(axis, axis + 1), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return Overlapping.forward(tangent, *ctx.arguments)


class PrefixMoments(torch.autograd.Function):
    """Means of the prefixes of `x`, and their variances, `(B, T, H, D)`.

    The gradient of a sum of squared deviations from a mean needs not look through the mean. What
    is new in memory takes longer than the sums, so there is as little of it as can be.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, count):
        divisor = count.clamp(min=1)
        mean = _prefix_means(x, weight, divisor)
        squares = (x - mean).square_().mul_(_shares(weight, count))
        return mean, _prefix_sums(squares).div_(divisor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[0])
        ctx.save_for_forward(*inputs, output[0])

    @staticmethod
    def backward(ctx, of_mean, of_variance):
        x, weight, count, mean = ctx.saved_tensors
        divisor = count.clamp(min=1)
        constant = torch.addcmul(of_mean, of_variance, mean, value=-2).div_(divisor)
        of_squares = _suffix_sums(of_variance / divisor)
        gradient = _suffix_sums(constant).addcmul_(x, of_squares, value=2)
        return gradient if weight is None else gradient * weight, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        x, weight, count, mean = ctx.saved_tensors
        divisor = count.clamp(min=1)
        of_mean = _prefix_means(tangent, weight, divisor)
        of_squares = 2 * (x - mean) * (tangent - of_mean) * _shares(weight, count)
        return of_mean, _prefix_sums(of_squares).div_(divisor)


class SumOfProducts(torch.autograd.Function):
    """Sums over time of products of keys, `(B, M, H, F)`, and values, `(B, M, W)`.

    Gradients are laid out as contiguous keys and values are, not across them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(key, value):
        with _as_they_are(key):
            sums = key.flatten(2).mT @ value
        return sums.unflatten(1, key.shape[2:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        key, value = ctx.saved_tensors
        gradient, of_key, of_value = gradient.flatten(1, 2), None, None
        wants_key, wants_value = ctx.needs_input_grad
        with _as_they_are(key):
            if wants_key:
                of_key = (value @ gradient.mT).unflatten(2, key.shape[2:])
            if wants_value:
                of_value = key.flatten(2) @ gradient
        return of_key, of_value

    @staticmethod
    def jvp(ctx, of_key, of_value):
        key, value = ctx.saved_tensors
        return SumOfProducts.forward(of_key, value) + SumOfProducts.forward(key, of_value)


class CausalSums(torch.autograd.Function):
    """The sums of values that causal queries weigh by their products with keys, by chunks.

    A gradient with respect to queries is such a sum again, of keys weighed by products of gradients
    and values; one with respect to keys or values is one over queries behind.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(query, key, value, stride, is_triangular):
        with _as_they_are(query):
            products, state = _products_and_state(query, key, value, stride, is_triangular)
            return _sum_of_products((query, state), (products, value)), products, state

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.stride, ctx.is_triangular = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, gradient, *_):
        found = [None] * 5
        if gradient is None:
            return tuple(found)
        query, key, value, products, state = ctx.saved_tensors
        which = ctx.stride, ctx.is_triangular
        of_query, of_key, of_value, *_ = ctx.needs_input_grad
        with _as_they_are(query):
            if torch.is_grad_enabled():
                # Gradients of gradients depend on what these were made from.
                products, state = _products_and_state(query, key, value, *which)
            gradient = gradient.contiguous()
            if of_query or of_key:
                of_products = _less_hidden(gradient @ value.mT, *which)
            if of_key or of_value:
                of_state = _sums_before((query.mT @ gradient).flip(2)).flip(2)
            if of_query:
                found[0] = _sum_of_products((gradient, state.mT), (of_products, key))
            if of_key:
                found[1] = _sum_of_products((value, of_state.mT), (of_products.mT, query))
            if of_value:
                found[2] = _sum_of_products((key, of_state), (products.mT, gradient))
        return tuple(found)

    @staticmethod
    def jvp(ctx, *tangents):
        tensors, total = ctx.saved_tensors, 0
        for index, tangent in enumerate(tangents[: len(tensors)]):
            if tangent is not None:
                changed = (*tensors[:index], tangent, *tensors[index + 1 :])
                sums, *_ = CausalSums.forward(*changed, ctx.stride, ctx.is_triangular)
                total = total + sums
        return total, None, None


def _as_they_are(x):
    """A context in which products stay in the dtype of tensors, wide enough for sums."""
    return torch.autocast(x.device.type, enabled=False)


def _products_and_state(query, key, value, stride, is_triangular):
    """Products of each chunk's queries with the keys of it that they see, and the state before."""
    products = _less_hidden(query @ key.mT, stride, is_triangular)
    return products, _sums_before(key.mT @ value)


def _less_hidden(products, stride, is_triangular):
    """Puts zero, in place, where a query of a chunk, `stride` to a key, does not see a key."""
    by_key = products
    if stride > 1:
        *lead, rows, keys = products.shape
        by_key = products.view(*lead, rows // stride, stride, keys).transpose(-2, -3)
    by_key.tril_(0 if is_triangular else -1)
    return products


def _sums_before(x):
    """For each chunk, `(B, H, n, ...)`, the sum of those before."""
    return functional.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)).cumsum_(2)


def _sum_of_products(first, second):
    """`a b + c d` of two pairs of stacks of matrices, in one tensor."""
    sums = first[0] @ first[1]
    stacks = [x.reshape(-1, *x.shape[-2:]) for x in (sums, *second)]
    return stacks[0].baddbmm_(*stacks[1:]).view(sums.shape)


def run_length(x):
    """How many entries of `x` are summed up before runs of them are.

    On a CPU, of 8 to 64 the fastest; on a GPU, which sums one entry after the other, of 16 to 128.
    """
    return 64 if x.is_cuda else 16


def _prefix_means(x, weight, divisor):
    return _prefix_sums(x.clone() if weight is None else x * weight).div_(divisor)


def _shares(weight, count):
    """What a squared deviation from the mean so far adds to the sum of those from the later."""
    share = count / (count - 1).clamp_(min=1)
    return share if weight is None else share * weight


def _prefix_sums(x):
    """For each entry along time the sum of it and all before, `(B, T, H, D)`; `x` is lost."""
    x = x.contiguous()
    runs = _in_runs(x)
    if _is_cumsum_faster(x):
        before = runs.cumsum_(2)[:, :-1, -1:].cumsum(1)
    else:
        _add_up(runs, range(runs.shape[2]))
        before = _prefix_sums(runs[:, :-1, -1:].clone())
    runs[:, 1:].add_(before)
    return _from_runs(runs, x)


def _suffix_sums(x):
    """For each entry along time the sum of it and all behind, `(B, T, H, D)`; `x` is lost."""
    # Not a product with ones, in a third of the time: users may let products be less than float32.
    if _is_cumsum_faster(x):
        return _prefix_sums(x.flip(1)).flip(1)
    x = x.contiguous()
    runs = _in_runs(x)
    _add_up(runs, range(runs.shape[2] - 1, -1, -1))
    runs[:, :-1].add_(_suffix_sums(runs[:, 1:, :1].clone()))
    return _from_runs(runs, x)


def _is_cumsum_faster(x):
    """Whether running sums of `x` take no longer than it takes to start operations."""
    return x.is_cuda or x.numel() < LEAST_ENTRIES


def _add_up(runs, places):
    """Adds to what is at each of `places` of all runs what is at the one before, in their order.

    On a CPU, of many entries, that takes a quarter of the time of `cumsum`.
    """
    for before, place in itertools.pairwise(places):
        runs[:, :, place].add_(runs[:, :, before])


def _in_runs(x):
    """`x` cut along time, `(B, n, run, H * D)`: a view, but for zeros that fill up the last run."""
    size = run_length(x)
    rest = -x.shape[1] % size
    filled = functional.pad(x, [0, 0, 0, 0, 0, rest]) if rest else x
    return filled.view(x.shape[0], -1, size, x.shape[2] * x.shape[3])


def _from_runs(runs, x):
    """`x` as it is in `runs`, which `_in_runs` made of it."""
    if x.shape[1] % runs.shape[2] == 0:
        return x
    # Into `x`: no view, which autograd would let nobody work on in place.
    return x.copy_(runs.flatten(1, 2)[:, : x.shape[1]].view(x.shape))
