"""Reading, cutting and filling tensors along the axes that time runs over."""

import math

from keras import ops

from keras_pdattn.ops import native


def take_along_time(x, index):
    """Reads `x` of shape `(batch, time, ...)` at `index`, `(n,)` or `(batch, n)`.

    Returns:
        A tensor of shape `(batch, n, ...)`.
    """
    if len(index.shape) == 1:
        return native.take(x, index, axis=1)
    return native.take_along_axis(x, append_axes(index, len(x.shape) - 2), axis=1)


def take_one(x, index, axis):
    """`x` with its entry at `index`, an integer scalar, alone along an axis; if only one, that."""
    if x.shape[axis] == 1:
        return x
    return native.take(x, ops.reshape(index, (1,)), axis)


def take_head(x, sequence, head, axis):
    """`take_one` of sequences, along axis 0, and of heads, along `axis` if there is that one.

    `x` may be `None`.
    """
    if x is None:
        return None
    x = take_one(x, sequence, 0)
    return take_one(x, head, axis) if axis < len(x.shape) else x


def start_at(index, axis, rank):
    """Where a slice of `rank` axes starts: at `index` along `axis`, at 0 along others.

    All of one dtype, as JAX wants them.
    """
    starts = [0 if isinstance(index, int) else ops.zeros_like(index)] * rank
    starts[axis] = index
    return tuple(starts)


def slices(length, size):
    """Slices of `size` that make up `length`, the last one shorter if need be."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def append_axes(x, count):
    """Appends `count` axes of size one to `x`."""
    if native.IS_TORCH:
        return x[(..., *[None] * count)]
    for _ in range(count):
        x = ops.expand_dims(x, axis=-1)
    return x


def swap_heads_and_time(x):
    """Turns `(B, T, H, D)` into `(B, H, T, D)`, the layout of matrix products, or back."""
    return ops.transpose(x, (0, 2, 1, 3))


def zero_where_masked(x, mask):
    """Puts zero for what `mask`, `(batch, time)`, leaves out of `x`, however large.

    `mask` may be `(batch, time, heads)` too, or `None`.
    """
    if mask is None:
        return x
    return native.zero_unless(append_axes(mask, len(x.shape) - len(mask.shape)), x)


def first_valid(mask):
    """Position `(batch,)` of the first True of `mask`, `(batch, time)`; 0 where there is none."""
    return ops.cast(ops.argmax(ops.cast(mask, "int32"), axis=1), "int32")


def is_at_most(length, other):
    """Whether the one length is known to be at most the other."""
    return isinstance(length, int) and isinstance(other, int) and length <= other


def even(length):
    """The least even number that is no smaller."""
    return length + length % 2


def fit_axis(x, axis, size, fill=0, front=0):
    """Cuts `x` along `axis`, or adds `fill` behind, until it has `size` entries.

    `front` more are added before these.
    """
    shape, behind = list(native.shape(x)), None
    if isinstance(size, int) and x.shape[axis] is not None:
        behind = size - x.shape[axis]
        if behind < 0:
            x, behind = x[(slice(None),) * axis + (slice(0, size),)], 0
        if behind == front == 0:
            return x
        if native.IS_TORCH:
            return _pad_axis(x, axis, front, behind, fill)
    shape[axis] = size if behind is None else behind
    x = [x, ops.full(shape, fill, dtype=x.dtype)]
    if front:
        shape[axis] = front
        x = [ops.full(shape, fill, dtype=x[0].dtype), *x]
    return native.concatenate(x, axis=axis)[(slice(None),) * axis + (slice(0, front + size),)]


def _pad_axis(x, axis, front, behind, fill=0):
    """`x` with so many entries more in front and behind, along `axis`."""
    widths = [(0, 0)] * len(x.shape)
    widths[axis] = (front, behind)
    return native.pad(x, widths, fill)


def split_axis(x, axis, size):
    """Cuts `axis` of `x` into pieces of `size`, which becomes the axis behind."""
    shape = native.shape(x)
    pieces = (shape[axis] // size, size)
    return native.reshape(x, tuple(shape[:axis]) + pieces + tuple(shape[axis + 1 :]))


def join_axes(x, axis):
    """Undoes `split_axis`: `axis` of `x` and the axis behind become one."""
    shape = native.shape(x)
    joined = (shape[axis] * shape[axis + 1],)
    return native.reshape(x, tuple(shape[:axis]) + joined + tuple(shape[axis + 2 :]))


def overlapping(x, axis, count, width, step):
    """Stretches of `x` along `axis`, each beginning `step` behind the one before.

    Args:
        x: tensor, with `(count - 1) * step` entries along `axis` and `width`, rounded up to whole
            steps, more.
        axis: non-negative integer; becomes two axes, of stretches and of their entries.
        count: the number of stretches.
        width: the number of entries in a stretch.
        step: positive integer.
    """
    if width == step:
        return split_axis(x, axis, step)
    if native.is_eager_torch():
        return native.overlapping(x, axis, width, step)
    lead, parts = (slice(None),) * axis, []
    for start in range(0, width, step):
        steps = split_axis(x[lead + (slice(start, start + count * step),)], axis, step)
        parts.append(steps[lead + (slice(None), slice(0, width - start))])
    return native.concatenate(parts, axis=axis + 1)


def lead_with_zero(x):
    """Puts a zero in front of `x` along time."""
    return _pad_axis(x, 1, 1, 0)


def delay(x, axis, steps=1):
    """Shifts `x` some steps later along `axis`, zeros coming in."""
    return _pad_axis(x[(slice(None),) * axis + (slice(0, -steps),)], axis, steps, 0)


def append(x, other, axis):
    """Concatenates `other`, broadcast to the other axes of `x`, behind `x` along `axis`."""
    shape = list(native.shape(x))
    shape[axis] = native.shape(other)[axis]
    return native.concatenate([x, ops.broadcast_to(other, shape)], axis=axis)


def coordinates(position, grid):
    """The coordinates of raster `position` on `grid`, one tensor an axis."""
    if grid is None:
        return [position]
    found = []
    for size in reversed(grid[1:]):
        found.append(position % size)
        position = position // size
    return [position] + found[::-1]


def raster(coordinates_, grid):
    """The raster position of coordinates on `grid`; undoes `coordinates`."""
    position = coordinates_[0]
    for coordinate, size in zip(coordinates_[1:], (grid or ())[1:]):
        position = position * size + coordinate
    return position


def to_grid(x, grid):
    """Turns `(batch, time, *rest)` into `(batch, *grid, *rest)`; `None` is one axis."""
    if grid is None:
        return x
    shape = native.shape(x)
    return native.reshape(x, (shape[0],) + tuple(grid) + tuple(shape[2:]))


def from_grid(x, num_axes):
    """Turns `(batch, *grid, *rest)`, the grid of `num_axes` axes, into `(batch, time, *rest)`."""
    if num_axes == 1:
        return x
    shape = native.shape(x)
    time = math.prod(shape[1 : 1 + num_axes])
    return native.reshape(x, (shape[0], time) + tuple(shape[1 + num_axes :]))
