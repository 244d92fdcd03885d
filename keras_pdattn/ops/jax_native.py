"""JAX's own operations; imported where it is the backend."""

import functools

import jax


def softmax_attention_of_lengths(
    query, key, value, query_lengths, key_lengths, scale, is_causal, implementation
):
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        implementation=implementation,
    )


@functools.cache
def takes_lengths(dtype, depth):
    """Whether cuDNN's kernel takes such tensors on this machine."""
    x, lengths = jax.ShapeDtypeStruct((1, 64, 1, depth), dtype), jax.ShapeDtypeStruct((1,), "int32")
    attend = functools.partial(
        softmax_attention_of_lengths, scale=1.0, is_causal=False, implementation="cudnn"
    )
    try:
        jax.eval_shape(attend, x, x, x, lengths, lengths)
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True
