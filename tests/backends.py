"""What Keras leaves to each backend and tests need: gradients, compilers, float64."""

import contextlib
import functools
from pathlib import Path

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()


def jitted(function):
    """`function` as it is, but compiled as a whole on JAX, where ops one by one compile longer."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    return function


def gradients(function, arrays, *others):
    """Gradients of the scalar `function(*tensors, *others)` with respect to each of `arrays`."""
    return output_and_gradients(function, arrays, 1.0, *others)[1]


def output_and_gradients(function, arrays, cotangent, *others):
    """`function(*tensors, *others)`, and gradients of the sum of it times `cotangent`.

    With respect to each of `arrays`; all as arrays of NumPy, of one pass.
    """
    if BACKEND == "jax":
        output, grads = _jax_gradients(function, len(arrays))(cotangent, *arrays, *others)
        return to_numpy(output), [np.asarray(x) for x in grads]
    if BACKEND == "torch":
        tensors = [ops.convert_to_tensor(x).clone().requires_grad_() for x in arrays]
        output = function(*tensors, *others)
        output.backward(ops.convert_to_tensor(cotangent, dtype=output.dtype))
        grads = [np.zeros(t.shape) if t.grad is None else t.grad.cpu().numpy() for t in tensors]
        return to_numpy(output), grads
    import tensorflow as tf

    tensors = [ops.convert_to_tensor(x) for x in arrays]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = function(*tensors, *others)
    weights = ops.convert_to_tensor(cotangent, dtype=output.dtype)
    grads = tape.gradient(output, tensors, weights, unconnected_gradients="zero")
    return to_numpy(output), [x.numpy() for x in grads]


@functools.lru_cache(maxsize=64)
def _jax_gradients(function, count):
    import jax

    @jax.jit
    def both(cotangent, *inputs):
        arrays, others = inputs[:count], inputs[count:]
        output, pull = jax.vjp(lambda *arrays: function(*arrays, *others), *arrays)
        return output, pull(jax.numpy.asarray(cotangent, output.dtype))

    return both


def compiled(function, shapes=None):
    """`function` of tensors through the backend's compiler.

    Args:
        function: from tensors to tensors.
        shapes: dict from the name of an argument to its shape, `None` where a
            size is not known until the call; a mask is boolean.
    """
    if BACKEND == "torch":
        import torch

        torch._dynamo.reset()
        return torch.compile(function, backend="eager", dynamic=shapes is not None)
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    # As Keras compiles models: to rewrite the code first, as users may, takes a while.
    if shapes is None:
        return tf.function(function, autograph=False)
    dtypes = {name: tf.bool if name == "mask" else tf.float32 for name in shapes}
    signature = [tf.TensorSpec(shape, dtypes[name]) for name, shape in shapes.items()]
    return tf.function(function, input_signature=signature, autograph=False)


@contextlib.contextmanager
def float64():
    """Lets the backend compute in float64, which JAX does not unless told to."""
    if BACKEND == "jax":
        import jax

        with jax.enable_x64(True):
            yield
    else:
        yield


def to_numpy(x):
    """A float64 array of a tensor of any dtype."""
    return ops.convert_to_numpy(ops.cast(x, "float64" if is_float64(x) else "float32")).astype(
        "float64"
    )


def is_float64(x):
    return keras.backend.standardize_dtype(x.dtype) == "float64"


def forget_programs(most_mappings):
    """Drops compiled programs of JAX once the process has more than `most_mappings`.

    Each program maps a few pages. Linux allows a process 65,530 mappings, and the compiler
    crashes beyond.
    """
    mappings = Path("/proc/self/maps")
    if BACKEND == "jax" and mappings.exists():
        if mappings.read_bytes().count(b"\n") > most_mappings:
            import jax

            jax.clear_caches()
