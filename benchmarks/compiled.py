"""Layers as a user would compile them: jit on JAX and TensorFlow, eager or compiled on torch."""

import keras


def forward_of(layer, compiles_torch=False, **call):
    """The layer as self-attention of `x`, compiled; `call` are its other call arguments."""
    if keras.backend.backend() == "torch":
        import torch

        solve = torch.compile(layer) if compiles_torch else layer

        def forward(x):
            with torch.no_grad():
                return solve(x, x, **call)

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


def training_of(layer, compiles_torch=False, **call):
    """Gradients of a loss with respect to inputs and weights, compiled."""

    def loss_of(solve, x):
        return keras.ops.mean(keras.ops.square(solve(x, x, **call)))

    if keras.backend.backend() == "torch":
        import torch

        solve = torch.compile(layer) if compiles_torch else layer

        def step(x):
            x = x.detach().requires_grad_()
            variables = [weight.value for weight in layer.trainable_weights]
            return torch.autograd.grad(loss_of(solve, x), [x, *variables])[0]

        return step
    if keras.backend.backend() == "jax":
        import jax

        fixed = [weight.value for weight in layer.non_trainable_variables]

        def stateless_loss(x, variables):
            output, _ = layer.stateless_call(variables, fixed, x, x, **call)
            return keras.ops.mean(keras.ops.square(output))

        gradients = jax.jit(jax.grad(stateless_loss, argnums=(0, 1)))
        variables = [weight.value for weight in layer.trainable_variables]

        return lambda x: gradients(x, variables)
    import tensorflow as tf

    @tf.function(jit_compile=True, reduce_retracing=False)
    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = loss_of(layer, x)
        return tape.gradient(loss, [x, *(weight.value for weight in layer.trainable_weights)])

    return lambda x: gradients(x)[0]


PASSES = {"forward": forward_of, "training step": training_of}


def wait(result):
    """Returns when `result` is there, which JAX, and all on a GPU, promise only."""
    if keras.backend.backend() == "jax":
        import jax

        jax.block_until_ready(result)
    elif keras.backend.backend() == "torch":
        import torch

        if result.is_cuda:
            torch.cuda.synchronize()
    else:
        keras.ops.convert_to_numpy(keras.ops.cast(result[:, -1:], "float32"))
