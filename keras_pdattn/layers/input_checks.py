"""Checks of what attention layers are called on: early, by name, the same on every backend."""

from keras_pdattn.ops.masks import fits


def check_shapes(query, value, key):
    """Raises unless the shapes are those of sequences that can attend to each other."""
    received = f"query.shape={query}, value.shape={value}, key.shape={key}"
    if not fits(value[:-1], key[:-1], exactly=True):
        raise ValueError(
            "All dimensions of `value` and `key`, except the last one, must be equal. "
            f"Received: {received}"
        )
    if len(query) < 3 or len(value) < 3:
        raise ValueError(
            "`query`, `value` and `key` must have the shape (batch, time, features), or more axes "
            f"between batch and features. Received: {received}"
        )
    if len(query) != len(value) or not fits(query[:1], value[:1], exactly=True):
        raise ValueError(
            "`query` must have the rank and the batch size of `value` and `key`. "
            f"Received: {received}"
        )


def check_rank(expected, query, value, key):
    """Raises unless the inputs have the rank the layer was built for."""
    if len(query) != expected:
        raise ValueError(
            f"The layer was built for inputs of rank {expected}. "
            f"Received: query.shape={query}, value.shape={value}, key.shape={key}"
        )


def check_axes(attention_axes, query, value):
    """Raises unless `attention_axes` are axes of the inputs, and the others are equal."""
    rank = len(query)
    if attention_axes is None:
        return
    axes = [axis + rank if axis < 0 else axis for axis in attention_axes]
    if len(set(axes)) < len(axes) or not all(0 < axis < rank - 1 for axis in axes):
        raise ValueError(
            "`attention_axes` must be different axes between batch and features. "
            f"Received: attention_axes={attention_axes} for inputs of rank {rank}"
        )
    for axis in set(range(1, rank - 1)) - set(axes):
        if not fits(query[axis : axis + 1], value[axis : axis + 1], exactly=True):
            raise ValueError(
                "Axes that are not attended over must have one size in `query` and `value`. "
                f"Received: query.shape={query}, value.shape={value}, "
                f"attention_axes={attention_axes}"
            )


def check_widths(expected, **shapes):
    """Raises unless the last axis of each of `shapes` has the size in `expected`.

    Args:
        expected: dict from a name to the size the layer was built with, or
            `None` to ask only that there is one.
        **shapes: the shapes by name.
    """
    for name, shape in shapes.items():
        if shape[-1] is None:
            raise ValueError(
                f"The last axis of `{name}`, its features, must have a size. "
                f"Received: {name}.shape={shape}"
            )
        if expected is not None and shape[-1] != expected[name]:
            raise ValueError(
                f"The layer was built for a `{name}` with {expected[name]} features. "
                f"Received: {name}.shape={shape}"
            )
