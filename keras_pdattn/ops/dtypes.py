"""Which dtype sums are carried in."""

import keras
from keras import ops


def accumulator(dtype):
    """Returns `dtype`, or float32 where `dtype` is narrower than that.

    Statistics, normalisers and softmaxes are summed in this dtype: in 16 bits
    a running sum of ones stalls at 256 (bfloat16) or 2,048 (float16).
    """
    return keras.backend.result_type(dtype, "float32")


def widen(x):
    """Casts `x` to its accumulator dtype."""
    return ops.cast(x, accumulator(x.dtype))
