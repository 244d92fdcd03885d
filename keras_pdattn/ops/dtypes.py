"""Which dtype a tensor has, and which sums are carried in."""

import keras
import numpy as np
from keras import ops


def nothing():
    """The logarithm of a factor that leaves nothing.

    As a constant of a module, a float would be an input to what torch compiles for lengths that
    are not known, and no two blocks that are worked again could read it (pytorch issue 193194).
    """
    return -1e30


def accumulator(dtype):
    """Returns `dtype`, or float32 where `dtype` is narrower than that.

    Statistics, normalisers and softmaxes are summed in this dtype: in 16 bits
    a running sum of ones stalls at 256 (bfloat16) or 2,048 (float16).
    """
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


def dtype_of(name, x):
    """Returns the name of the dtype of `x`: a tensor, or what NumPy makes an array of.

    Raises:
        TypeError: if it holds strings.
        ValueError: if it holds no numbers.
    """
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    try:
        standard = keras.backend.standardize_dtype(dtype)
    except ValueError:
        standard = "string" if getattr(dtype, "kind", None) in "SU" else None
    if standard in (None, "string"):
        error = ValueError if standard is None else TypeError
        raise error(f"`{name}` must be a tensor of numbers. Received: {name}={x!r}")
    return standard


def cast(x, dtype):
    """`x` in `dtype`; `ops.cast`, but free where that is nothing to do."""
    if x.dtype == dtype:
        return x
    name = keras.backend.standardize_dtype(x.dtype)
    if name == dtype or name == keras.backend.standardize_dtype(dtype):
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
