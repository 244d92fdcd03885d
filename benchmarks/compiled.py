"""Layers as a user would compile them: jit on JAX and TensorFlow, eager on torch."""

import keras


def forward_of(layer, **call):
    """The layer as self-attention of `x`, compiled; `call` are its other call arguments."""
    if keras.backend.backend() == "torch":
        import torch

        def forward(x):
            with torch.no_grad():
                return layer(x, x, **call)

        return forward
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(lambda x: layer(x, x, **call))
    import tensorflow as tf

    return tf.function(
        lambda x: layer(x, x, **call),
        jit_compile=True,
        reduce_retracing=False,
    )


def training_of(layer, **call):
    """Loss and its gradients with respect to inputs and weights, compiled."""

    def loss(x):
        return keras.ops.mean(keras.ops.square(layer(x, x, **call)))

    if keras.backend.backend() == "torch":
        import torch

        def step(x):
            x = x.detach().requires_grad_()
            variables = [weight.value for weight in layer.trainable_weights]
            return torch.autograd.grad(loss(x), [x, *variables])[0]

        return step
    if keras.backend.backend() == "jax":
        import jax

        fixed = [weight.value for weight in layer.non_trainable_variables]

        def stateless_loss(variables, x):
            output, _ = layer.stateless_call(variables, fixed, x, x, **call)
            return keras.ops.mean(keras.ops.square(output))

        gradients = jax.jit(jax.grad(stateless_loss, argnums=(0, 1)))
        variables = [weight.value for weight in layer.trainable_variables]
        return lambda x: gradients(variables, x)[1]
    import tensorflow as tf

    @tf.function(jit_compile=True, reduce_retracing=False)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(x)
        return tape.gradient(value, [x, *(w.value for w in layer.trainable_weights)])[0]

    return step
