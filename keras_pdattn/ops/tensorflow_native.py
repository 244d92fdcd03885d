"""TensorFlow's own operations; imported where it is the backend."""

from tensorflow.autograph.experimental import do_not_convert

__all__ = ["do_not_convert"]
