"""Reading tensors along their time axis at positions that may differ between sequences."""

from keras import ops


def take_along_time(x, index):
    """Reads `x` of shape `(batch, time, ...)` at `index`, `(n,)` or `(batch, n)`.

    Returns:
        A tensor of shape `(batch, n, ...)`.
    """
    if len(index.shape) == 1:
        return ops.take(x, index, axis=1)
    return ops.take_along_axis(x, append_axes(index, len(x.shape) - 2), axis=1)


def append_axes(x, count):
    """Appends `count` axes of size one to `x`."""
    for _ in range(count):
        x = ops.expand_dims(x, axis=-1)
    return x


def first_valid(mask):
    """Position `(batch,)` of the first True of `mask`, `(batch, time)`; 0 where there is none."""
    return ops.cast(ops.argmax(ops.cast(mask, "int32"), axis=1), "int32")
