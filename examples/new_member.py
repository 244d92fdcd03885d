"""Adds a member of your own, and gets an attention layer from it.

A transform that divides queries and keys by the largest key of each feature. What it
says is how to fit and how to apply; causal use, masks, scores, saving and three
backends follow.

    KERAS_BACKEND=torch python examples/new_member.py
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops

from keras_pdattn import Primal
from keras_pdattn.layers import PrimalDualAttention
from keras_pdattn.transforms import Transform


@keras.saving.register_keras_serializable(package="examples")
class LargestNorm(Transform):
    """T(x) = x / max_j |k_j|, per head and feature, over the keys a query may see."""

    def fit(self, key, mask):
        size = ops.abs(key)
        if mask is not None:
            size = ops.where(ops.expand_dims(mask, axis=(2, 3)), size, 0.0)
        return ops.max(size, axis=1, keepdims=True) + 1e-6

    def apply(self, x, statistics, weights):
        return x / ops.cast(statistics, x.dtype)


PRIMAL = Primal("softmax", transform=LargestNorm(), training_set="scaled_heads")


def build():
    """A model whose causal attention has the new member, padding masked."""
    inputs = keras.Input((None, 16))
    x = keras.layers.Masking()(inputs)
    attention = PrimalDualAttention(num_heads=4, key_dim=4, primal=PRIMAL, name="attention")
    return keras.Model(inputs, attention(x, x, use_causal_mask=True))


def main(folder):
    x = np.random.default_rng(0).normal(size=(2, 12, 16)).astype("float32")
    keras.utils.set_random_seed(0)
    model = build()
    full = model.predict(x, verbose=0)
    prefix = model.predict(x[:, :5], verbose=0)
    print(f"causal: a prefix differs by {np.abs(full[:, :5] - prefix).max():.0e}")

    padded = np.concatenate([x, np.zeros((2, 3, 16), "float32")], axis=1)
    difference = np.abs(model.predict(padded, verbose=0)[:, :12] - full).max()
    print(f"masked: padding changes outputs by {difference:.0e}")

    attention = model.get_layer("attention")
    _, scores = attention(x, x, use_causal_mask=True, return_attention_scores=True)
    sums = ops.convert_to_numpy(ops.sum(scores, axis=-1))
    print(f"scores: {tuple(scores.shape)}, rows sum to {sums.min():.4f} to {sums.max():.4f}")

    model.save(folder / "model.keras")
    np.save(folder / "inputs.npy", x)
    for backend in ("tensorflow", "jax", "torch"):
        command = [sys.executable, __file__, str(folder), backend]
        subprocess.run(command, env={**os.environ, "KERAS_BACKEND": backend}, check=True)
        there = np.load(folder / f"{backend}.npy")
        print(f"saved:  {backend} differs by {np.abs(there - full).max():.0e}")


def load(folder, backend):
    """Loads the model under this backend; importing this file has made its member known."""
    model = keras.saving.load_model(folder / "model.keras")
    x = np.load(folder / "inputs.npy")
    np.save(folder / f"{backend}.npy", model.predict(x, verbose=0))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        load(Path(sys.argv[1]), sys.argv[2])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
