"""Scores and masks of any backend as NumPy arrays of one layout, checked."""

import math

import keras
import numpy as np

from keras_pdattn.ops import masks
from keras_pdattn.ops.dtypes import dtype_of


def as_floats(name, x):
    """`x` as a NumPy array, which is not copied if it is one; raises unless floating point."""
    dtype = dtype_of(name, x)
    if not isinstance(x, np.ndarray):
        x = keras.ops.convert_to_numpy(x)
    if not keras.backend.is_float_dtype(dtype):
        raise ValueError(f"`{name}` must be floating point. Received: {name} of dtype {dtype}")
    return x


def as_scores(scores):
    """Scores over any number of axes as `(batch, heads, queries, keys)`.

    Returns:
        The scores, and the shapes `(batch, *queries)` and `(batch, *keys)` before.
    """
    scores = as_floats("scores", scores)
    batch, axes = scores.shape[:1], scores.shape[2:]
    if not axes or len(axes) % 2 or 0 in scores.shape:
        raise ValueError(
            "`scores` must have the shape (batch, heads, queries, keys), or as many axes of "
            "queries as of keys, none of them empty. "
            f"Received: scores of shape {scores.shape}"
        )
    queries, keys = axes[: len(axes) // 2], axes[len(axes) // 2 :]
    flat = scores.reshape(*scores.shape[:2], math.prod(queries), math.prod(keys))
    return flat, batch + queries, batch + keys


def as_mask(name, mask, shape):
    """A padding mask as a boolean `(batch, positions)`; all True for `None`.

    Args:
        name: what it is called in errors.
        mask: of the shape `shape`, or that with all axes but the first flattened.
        shape: `(batch, *grid)`.
    """
    flat = (shape[0], math.prod(shape[1:]))
    if mask is None:
        return np.ones(flat, "bool")
    mask = keras.ops.convert_to_numpy(masks.as_boolean(name, mask))
    if mask.shape not in (shape, flat):
        raise ValueError(
            f"`{name}` must have the shape (batch, positions) = {flat} of what it masks. "
            f"Received: {name} of shape {mask.shape}"
        )
    return mask.reshape(flat)
