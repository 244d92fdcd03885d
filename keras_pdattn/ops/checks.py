"""Checks of tensors, raised before a backend sees them, the same on every backend."""

import math

import keras
from keras import ops

from keras_pdattn import validation
from keras_pdattn.ops.dtypes import dtype_of
from keras_pdattn.ops.masks import fits

_FORMS = ("fused", "whole", "blocks")

_SPARSE_OR_RAGGED = ("SparseTensor", "RaggedTensor", "IndexedSlices", "BCOO", "BCSR")


def check_tensors(**tensors):
    """Raises unless `tensors` are dense and floating point."""
    for name, tensor in tensors.items():
        if _is_sparse_or_ragged(tensor):
            raise ValueError(
                f"`{name}` must be a dense tensor. Received: {name} of type {type(tensor).__name__}"
            )
        dtype = dtype_of(name, tensor)
        if not keras.backend.is_float_dtype(dtype):
            raise ValueError(f"`{name}` must be floating point. Received: {name} of dtype {dtype}")


def _is_sparse_or_ragged(tensor):
    flags = ("sparse", "ragged", "is_sparse")
    return type(tensor).__name__ in _SPARSE_OR_RAGGED or any(
        getattr(tensor, flag, False) is True for flag in flags
    )


def check_shapes(query, key, value, projections=None):
    """Raises a `ValueError` unless the shapes of tensors, once projected, fit each other."""
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    for name, projection in zip(("key", "value"), projections or ()):
        width, *heads_and_depth = projection.kernel.shape
        if not fits(shapes[name][3:], (width,), exactly=True):
            raise ValueError(
                f"The projection of `{name}` takes inputs {width} wide. "
                f"Received: {name}.shape={(*shapes[name][:2], *shapes[name][3:])}"
            )
        shapes[name] = (*shapes[name][:2], *heads_and_depth)

    def refuse(expected):
        # Not before it is wanted: torch can't compile what names lengths that are not known.
        received = ", ".join(f"{name}.shape={tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"{expected} Received: {received}")

    if any(len(shape) != 4 for shape in shapes.values()):
        refuse("`query`, `key` and `value` must have the shape (batch, time, heads, depth).")
    batch_and_heads = [(shape[0], shape[2]) for shape in shapes.values()]
    if not all(fits(other, batch_and_heads[0], exactly=True) for other in batch_and_heads[1:]):
        refuse("`query`, `key` and `value` must have one batch size and one number of heads.")
    query, key, value = shapes.values()
    if not fits(key[:2], value[:2], exactly=True):
        refuse("`key` and `value` must have one length.")
    if not fits(query[3:], key[3:], exactly=True):
        refuse("`query` and `key` must have one depth.")


def check_grids(query_length, key_length, query_grid, key_grid):
    """Raises a `ValueError` unless both grids are given or neither, and hold the lengths."""
    received = f"query_grid={query_grid}, key_grid={key_grid}"
    if query_grid is None and key_grid is None:
        return
    if query_grid is None or key_grid is None or len(query_grid) != len(key_grid):
        raise ValueError(
            "`query_grid` and `key_grid` must both be given, with one number of axes, or neither. "
            f"Received: {received}"
        )
    for name, length, grid in (("query", query_length, query_grid), ("key", key_length, key_grid)):
        is_known = all(isinstance(size, int) for size in (length, *grid))
        if is_known and math.prod(grid) != length:
            raise ValueError(
                f"`{name}_grid` must hold the {length} positions of `{name}`. Received: {received}"
            )


def check_weights(members, weights):
    """Raises a `ValueError` unless there is a dict of weights for each of `members`."""
    if len(weights) != len(members):
        raise ValueError(
            "`weights` must hold a dict for each transform and one for the feature map, here "
            f"{len(members)} in all. Received: weights of length {len(weights)}"
        )


def check_dropout(rate, seed):
    """Raises a `ValueError` unless `rate` is one that `seed` suffices for."""
    validation.dropout_rate("dropout", rate)
    is_natural = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**31
    if rate > 0 and not (is_natural or isinstance(seed, keras.random.SeedGenerator)):
        raise ValueError(
            "Dropout needs a `seed`, an integer in [0, 2**31) or a `keras.random.SeedGenerator`. "
            f"Received: dropout={rate}, seed={seed!r}"
        )


def check_form(form):
    """Raises a `ValueError` unless there is such a form."""
    if form is not None and form not in _FORMS:
        raise ValueError(f"`form` must be None or one of {_FORMS}. Received: form={form!r}")


def query_start(start, grid):
    """Returns where among the keys the first query stands: `None` for 0, else an int32.

    Raises:
        ValueError: if it is no integer, or comes with a grid.
    """
    if start is None or (isinstance(start, int) and start == 0):
        return None
    if grid is not None:
        raise ValueError(
            "`query_start` is a place on one axis, and grids have several. "
            f"Received: query_start={start}, query_grid={grid}"
        )
    dtype = getattr(start, "dtype", type(start).__name__)
    is_integer = keras.backend.is_int_dtype(keras.backend.standardize_dtype(dtype))
    if not is_integer or getattr(start, "shape", ()) != ():
        raise ValueError(
            "`query_start` must be an integer or an integer scalar tensor. "
            f"Received: query_start={start!r}"
        )
    return ops.cast(start, "int32")
