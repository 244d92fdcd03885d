"""What Keras leaves to each backend and tests need: gradients, compilers, float64."""

import contextlib

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()


def gradients(function, arrays):
    """Gradients of the scalar `function(*tensors)` with respect to each of `arrays`."""
    if BACKEND == "torch":
        tensors = [ops.convert_to_tensor(x).clone().requires_grad_() for x in arrays]
        function(*tensors).backward()
        return [np.zeros(t.shape) if t.grad is None else t.grad.cpu().numpy() for t in tensors]
    if BACKEND == "jax":
        import jax

        tensors = [ops.convert_to_tensor(x) for x in arrays]
        grads = jax.jit(jax.grad(function, argnums=tuple(range(len(arrays)))))(*tensors)
        return [np.asarray(x) for x in grads]
    import tensorflow as tf

    tensors = [ops.convert_to_tensor(x) for x in arrays]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        loss = function(*tensors)
    grads = tape.gradient(loss, tensors, unconnected_gradients="zero")
    return [x.numpy() for x in grads]


def compiled(function, dynamic=False):
    """`function` of tensors through the backend's compiler, lengths unknown if `dynamic`."""
    if BACKEND == "torch":
        import torch

        torch._dynamo.reset()
        return torch.compile(function, backend="aot_eager", dynamic=dynamic)
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, reduce_retracing=dynamic)


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
