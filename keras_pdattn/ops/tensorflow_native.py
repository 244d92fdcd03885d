"""TensorFlow's own operations; imported where it is the backend."""

import tensorflow as tf
from keras import ops
from tensorflow.autograph.experimental import do_not_convert


def is_eager():
    return tf.executing_eagerly()


def map(function, xs):
    # Run eagerly, `ops.map` rewrites the code of all that is called, for several times as long as
    # the work takes, and works the first entry twice.
    if is_eager():
        found = [function(x) for x in zip(*(tf.unstack(x) for x in xs))]
        return tf.nest.map_structure(lambda *parts: tf.stack(parts), *found)
    return ops.map(do_not_convert(function), xs)
