"""JAX's own operations; imported where it is the backend."""

import functools

import jax


def softmax_attention_of_lengths(
    query, key, value, query_lengths, key_lengths, scale, is_causal, mask, implementation
):
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        implementation=implementation,
    )


@functools.cache
def has_cudnn(dtype, depth):
    """Whether cuDNN has a kernel for such tensors on this machine, and for its gradient."""
    x, lengths = jax.ShapeDtypeStruct((1, 64, 1, depth), dtype), jax.ShapeDtypeStruct((1,), "int32")

    def total(query, key, value, query_lengths, key_lengths):
        rest = query_lengths, key_lengths, 1.0, False, None, "cudnn"
        return softmax_attention_of_lengths(query, key, value, *rest).sum()

    try:
        jax.eval_shape(jax.grad(total), x, x, x, lengths, lengths)
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True
