"""Boolean masks: one convention, True lets see, and errors that say so."""

import keras
import numpy as np
from keras import ops


def as_boolean(name, mask):
    """Returns `mask` as a boolean tensor.

    Raises:
        ValueError: if it is an additive float mask, or a float mask whose
            values can't be read because it is symbolic or traced.
    """
    if not hasattr(mask, "dtype"):
        mask = np.asarray(mask)
    dtype = keras.backend.standardize_dtype(mask.dtype)
    if dtype == "bool":
        return mask if keras.backend.is_keras_tensor(mask) else ops.convert_to_tensor(mask)
    if not keras.backend.is_int_dtype(dtype) and not _holds_zeros_and_ones(mask):
        raise ValueError(
            f"`{name}` must be boolean, True where a query may see a key (or 0 and 1). An additive "
            "mask (0 and large negative numbers) has the opposite sense and is refused; convert it "
            f"with `{name} > -1`. Inside a compiled or symbolic call a float mask is refused "
            f"whatever it holds; cast it to bool. Received: {name} of dtype {dtype}"
        )
    return mask if keras.backend.is_keras_tensor(mask) else ops.cast(mask, "bool")


def _holds_zeros_and_ones(mask):
    """Whether a float `mask` can be read here and now, and holds nothing but 0 and 1."""
    if keras.backend.is_keras_tensor(mask):
        return False
    try:
        values = keras.ops.convert_to_numpy(mask)
    except Exception:  # Each backend has its own class for "this is being traced".
        return False
    return bool(np.isin(values, (0, 1)).all())


def padding(name, mask, x):
    """Returns `mask` as a boolean `(batch, time)`, checked against `x`, `(batch, time, ...)`."""
    mask = as_boolean(name, mask)
    if not fits(mask.shape, x.shape[:2], exactly=True):
        raise ValueError(
            f"`{name}` must have the shape (batch, time) of what it masks. Received: {name} of "
            f"shape {tuple(mask.shape)} for a tensor of shape {tuple(x.shape)}"
        )
    return mask


def broadcastable(name, mask, target):
    """Returns `mask` as a boolean that broadcasts to `target`, of the same rank."""
    mask = as_boolean(name, mask)
    if not fits(mask.shape, target):
        raise ValueError(
            f"`{name}` must be broadcastable to (batch, heads, queries, keys) = {tuple(target)}. "
            f"Received: {name} of shape {tuple(mask.shape)}"
        )
    return mask


def fits(shape, target, exactly=False):
    """Whether `shape` has the rank of `target` and, where both are known, its sizes (or 1)."""
    if len(shape) != len(target):
        return False
    return all(
        size is None or wanted is None or size == wanted or (size == 1 and not exactly)
        for size, wanted in zip(shape, target)
    )


def intersect(mask, other):
    """Both masks at once; either may be `None`."""
    if mask is None or other is None:
        return other if mask is None else mask
    return ops.logical_and(mask, other)


def check_shapes(query, key, value):
    """Raises a `ValueError` unless the shapes of projected tensors fit each other."""
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    received = ", ".join(f"{name}.shape={tuple(shape)}" for name, shape in shapes.items())
    if any(len(shape) != 4 for shape in shapes.values()):
        raise ValueError(
            "`query`, `key` and `value` must have the shape (batch, time, heads, depth). "
            f"Received: {received}"
        )
    batch_and_heads = [(shape[0], shape[2]) for shape in shapes.values()]
    if not all(fits(other, batch_and_heads[0], exactly=True) for other in batch_and_heads[1:]):
        raise ValueError(
            f"`query`, `key` and `value` must have one batch size and one number of heads. "
            f"Received: {received}"
        )
    if not fits(key.shape[:2], value.shape[:2], exactly=True):
        raise ValueError(f"`key` and `value` must have one length. Received: {received}")
    if not fits((query.shape[3],), (key.shape[3],), exactly=True):
        raise ValueError(f"`query` and `key` must have one depth. Received: {received}")
