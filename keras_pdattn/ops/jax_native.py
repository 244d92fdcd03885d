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
    return found, (of_part - found * _repeated(of_total, found.shape[-1])) / total


def _repeated(x, width):
    """`x`, of which the last axis may be one entry, `width` times.

    As a product, of which the gradient is one: XLA on a CPU sums up short rows so in a tenth of
    the time of a reduction.
    """
    if x.shape[-1] == width or jax.default_backend() != "cpu":
        return x
    return jnp.matmul(x, jnp.ones((1, width), x.dtype), precision="highest")
