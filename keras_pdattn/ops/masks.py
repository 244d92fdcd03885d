"""Boolean masks: one convention, True lets see, and errors that say so."""

import keras
import numpy as np
from keras import ops

from keras_pdattn.ops import native
from keras_pdattn.ops.dtypes import dtype_of


def as_boolean(name, mask):
    """Returns `mask` as a boolean tensor.

    Raises:
        ValueError: if it is an additive mask, or a float mask whose values can't
            be read because it is symbolic or traced. (An integer one is trusted
            there, as Keras and KerasHub make such masks themselves.)
    """
    dtype = dtype_of(name, mask)
    if not hasattr(mask, "dtype"):
        mask = np.asarray(mask)
    if dtype == "bool":
        is_symbolic = keras.backend.is_keras_tensor(mask)
        return mask if is_symbolic else native.into_graph(ops.convert_to_tensor(mask))
    is_trusted_unread = keras.backend.is_int_dtype(dtype)
    if not _holds_zeros_and_ones(mask, if_unreadable=is_trusted_unread):
        raise ValueError(
            f"`{name}` must be boolean, True where a query may see a key (or 0 and 1). An additive "
            "mask (0 and large negative numbers) has the opposite sense and is refused; convert it "
            f"with `{name} > -1`. Inside a compiled or symbolic call a float mask is refused "
            f"whatever it holds; cast it to bool. Received: {name} of dtype {dtype}"
        )
    return mask if keras.backend.is_keras_tensor(mask) else ops.cast(mask, "bool")


def _holds_zeros_and_ones(mask, if_unreadable):
    """Whether `mask` holds nothing but 0 and 1; `if_unreadable` where that can't be seen yet."""
    if keras.backend.is_keras_tensor(mask):
        return if_unreadable
    try:
        values = keras.ops.convert_to_numpy(mask)
    except Exception:  # Each backend has its own class for "this is being traced".
        return if_unreadable
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


def of_queries_and_keys(name, mask, query, key):
    """Returns `mask` as a boolean `(B or 1, H or 1, T or 1, S)`.

    Which of its sizes are 1 is known from its static shape then, and keys have
    an axis of their own, as those who pool or window them need.

    Args:
        name: what `mask` is called in errors.
        mask: broadcastable to `(B, H, T, S)`.
        query: tensor of shape `(B, T, H, D)`.
        key: tensor of shape `(B, S, H, D)`.
    """
    mask = as_boolean(name, mask)
    target = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    if not fits(mask.shape, target):
        raise ValueError(
            f"`{name}` must be broadcastable to (batch, heads, queries, keys) = {target}. "
            f"Received: {name} of shape {tuple(mask.shape)}"
        )
    if None not in mask.shape and mask.shape[3] == key.shape[1]:
        return mask
    batch, query_length, num_heads, _ = ops.shape(query)
    known = [1 if size == 1 else None for size in mask.shape[:3]] + [None]
    sizes = (batch, num_heads, query_length, ops.shape(key)[1])
    return ops.broadcast_to(mask, tuple(one or size for one, size in zip(known, sizes)))


def by_head(mask):
    """Turns `mask`, `(batch, time)` or `(batch, time, heads)`, into `(batch, heads or 1, time)`."""
    if len(mask.shape) == 3:
        return ops.transpose(mask, (0, 2, 1))
    return ops.expand_dims(mask, axis=1)


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
