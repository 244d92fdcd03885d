"""JAX's own operations; imported where it is the backend."""

import functools

import jax
import jax.numpy as jnp
from jax.nn import dot_product_attention


@functools.cache
def has_cudnn(dtype, depth):
    """Whether cuDNN has a kernel for such tensors on this machine, and for its gradient."""
    x, lengths = jax.ShapeDtypeStruct((1, 64, 1, depth), dtype), jax.ShapeDtypeStruct((1,), "int32")

    def total(query, key, value, lengths):
        options = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        output = dot_product_attention(query, key, value, implementation="cudnn", **options)
        return output.sum()

    try:
        jax.eval_shape(jax.grad(total), x, x, x, lengths)
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def is_eager(x):
    return not isinstance(x, jax.core.Tracer)


@jax.custom_jvp
def ratio(part, total):
    """`part / total`, whose gradient divides by `total` twice and not by its square.

    The square of a total is beyond the range of floats long before the total is.
    """
    return part / total


@ratio.defjvp
def _change_of_ratio(primals, changes):
    (part, total), (of_part, of_total) = primals, changes
    found = ratio(part, total)
    return found, (of_part - found * _repeated(of_total, found.shape)) / total


def weighted_sum(x, weight):
    """The sum of `x`, `(B, T, H, D)`, times `weight`, `(B or 1, T, 1, 1)`, over time, kept."""
    weight = jnp.broadcast_to(weight[:, :, 0, 0], x.shape[:2])
    rows = x.reshape(*x.shape[:2], -1)
    total = jnp.matmul(jnp.expand_dims(weight, axis=1), rows, precision="highest")
    return total.reshape(x.shape[0], 1, *x.shape[2:])


def _repeated(x, shape):
    """`x` with its last axis and its axis 1 repeated as in `shape`, where they are one entry.

    By products with ones, whose gradients are products too: XLA on a CPU takes ten times as long
    to multiply and sum up in one pass.
    """
    if jax.default_backend() != "cpu":
        return x
    x = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    if x.shape[-1] == 1 and shape[-1] != 1:
        x = jnp.matmul(x, jnp.ones((1, shape[-1]), x.dtype), precision="highest")
    if len(shape) > 2 and x.shape[1] == 1 and shape[1] != 1:
        x = jnp.broadcast_to(x, (shape[0], *x.shape[1:]))
        ones = jnp.ones((*shape[:2], 1), x.dtype)
        rows = jnp.matmul(ones, x.reshape(shape[0], 1, -1), precision="highest")
        x = rows.reshape(*shape[:2], *x.shape[2:])
    return x
