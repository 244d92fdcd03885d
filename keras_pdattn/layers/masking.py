"""The masks that Keras attaches to tensors."""

import contextlib

# Keras has no public way to detach a mask; KerasHub imports these two as well.
from keras.src.backend import get_keras_mask, set_keras_mask


@contextlib.contextmanager
def detached_masks(*tensors):
    """Takes the masks off `tensors` inside the block, and puts them back after it.

    Projections do not support masks and would warn that they lose them, while
    whoever uses the same tensors later still needs theirs.
    """
    masks = [get_keras_mask(tensor) for tensor in tensors]
    for tensor in tensors:
        set_keras_mask(tensor, None)
    try:
        yield
    finally:
        for tensor, mask in zip(tensors, masks):
            set_keras_mask(tensor, mask)


def attach_mask(tensor, mask):
    """Attaches `mask` to `tensor`, for the layers that come after."""
    set_keras_mask(tensor, mask)
