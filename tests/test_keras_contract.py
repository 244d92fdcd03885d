"""Law 2: Keras's own tests of `MultiHeadAttention`, run on our layer in its place."""

import types

import keras
import pytest

from keras_pdattn.layers import PrimalDualAttention

keras_tests = pytest.importorskip("keras.src.layers.attention.multi_head_attention_test")

# A stand-in for the `layers` namespace of that module: all of Keras's, but for ours.
keras_tests.layers = types.SimpleNamespace(
    **{**vars(keras.layers), "MultiHeadAttention": PrimalDualAttention}
)


class TestInPlaceOfMultiHeadAttention(keras_tests.MultiHeadAttentionTest):
    """Every test of the parent class, our layer being what it tests."""


del keras_tests
