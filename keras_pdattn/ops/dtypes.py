"""Which dtype sums are carried in."""

import keras
from keras import ops


def accumulator(dtype):
    """Returns `dtype`, or float32 where `dtype` is narrower than that.

    Statistics, normalisers and softmaxes are summed in this dtype: in 16 bits
    a running sum of ones stalls at 256 (bfloat16) or 2,048 (float16).
    """
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


def cast(x, dtype):
    """`x` in `dtype`; `ops.cast`, but free where that is nothing to do."""
    standardize = keras.backend.standardize_dtype
    if x.dtype == dtype or standardize(x.dtype) == standardize(dtype):
        return x
    return ops.cast(x, dtype)


def widen(x):
    """Casts `x` to its accumulator dtype."""
    return cast(x, accumulator(x.dtype))


def is_double(dtype):
    """Whether `dtype` is float64, which several ops of Keras compute in float32."""
    return accumulator(dtype) == "float64"


def exp_of_at_most_zero(x):
    """`exp(min(x, 0))`, for `x` that is above zero only where it does not count."""
    return ops.exp(-ops.relu(-x))


def cumulative_sum(x, axis):
    """`keras.ops.cumsum` in the dtype of `x`, float64 included."""
    total = ops.cumsum(x, axis=axis)
    if total.dtype == x.dtype:
        return total
    # Keras took float64 for float32 on this backend: double the reach of each
    # partial sum instead, until it is the length.
    reach = 1
    while reach < x.shape[axis]:
        shape = list(x.shape)
        shape[axis] = reach
        kept = ops.take(x, ops.arange(x.shape[axis] - reach, dtype="int32"), axis=axis)
        x = x + ops.concatenate([ops.zeros(shape, dtype=x.dtype), kept], axis=axis)
        reach *= 2
    return x
