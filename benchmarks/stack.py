"""A training step of a stack the size of ViT-tiny: 12 blocks, width 192, 3 heads, 197 tokens.

KERAS_BACKEND=jax python -m benchmarks.stack
"""

import argparse

import keras
import numpy as np
from rich.console import Console

from benchmarks import results
from benchmarks.compiled import training_of
from benchmarks.speed import compare
from keras_pdattn import Primal, layers
from keras_pdattn.training_sets import ScaledHeads

BATCH, TOKENS, WIDTH, HEADS, BLOCKS = 8, 197, 192, 3, 12
MEMBERS = {
    "softmax": Primal(),
    "Attention-BN": Primal(transform="batch_norm"),
    "Attention-SH": Primal(training_set=ScaledHeads((1, 2, 4))),
}


class Stack(keras.layers.Layer):
    """Pre-norm blocks of attention and a perceptron; called like an attention layer."""

    def __init__(self, attention):
        super().__init__()
        self.norms = [keras.layers.LayerNormalization() for _ in range(2 * BLOCKS)]
        self.attentions = [attention() for _ in range(BLOCKS)]
        self.widening = [keras.layers.Dense(4 * WIDTH, activation="gelu") for _ in range(BLOCKS)]
        self.narrowing = [keras.layers.Dense(WIDTH) for _ in range(BLOCKS)]

    def build(self, shape, _):
        for attention in self.attentions:
            attention.build(shape, shape)
        for layer in (*self.norms, *self.widening):
            layer.build(shape)
        for layer in self.narrowing:
            layer.build((*shape[:-1], 4 * WIDTH))

    def call(self, x, _):
        for index, attention in enumerate(self.attentions):
            y = self.norms[2 * index](x)
            x = x + attention(y, y)
            y = self.norms[2 * index + 1](x)
            x = x + self.narrowing[index](self.widening[index](y))
        return x


def step_of(attention):
    stack = Stack(attention)
    stack.build((BATCH, TOKENS, WIDTH), None)
    return training_of(stack)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    depth = WIDTH // HEADS
    x = np.random.default_rng(0).normal(size=(BATCH, TOKENS, WIDTH)).astype("float32")
    x = keras.ops.convert_to_tensor(x)

    def ours(name):
        return lambda: layers.PrimalDualAttention(HEADS, depth, primal=MEMBERS[name])

    softmax = step_of(ours("softmax"))
    rows = {
        "softmax against Keras": compare(
            [softmax, step_of(lambda: keras.layers.MultiHeadAttention(HEADS, depth))],
            x,
            options.rounds,
        )
    }
    for name in ("Attention-BN", "Attention-SH"):
        rows[f"{name} against our softmax"] = compare(
            [step_of(ours(name)), softmax], x, options.rounds
        )
    results.write("stack", {"rows": rows})
    for name, row in rows.items():
        Console().print(f"{name}: {row['ratio']:.2f}, {row['seconds']:.3f} s")


if __name__ == "__main__":
    main()
