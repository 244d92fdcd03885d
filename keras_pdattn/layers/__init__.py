"""Attention layers, each a `keras.layers.MultiHeadAttention` with another primal problem."""

from keras_pdattn.layers.batch_norm_attention import BatchNormAttention
from keras_pdattn.layers.batch_norm_scaled_head_attention import BatchNormScaledHeadAttention
from keras_pdattn.layers.primal_dual_attention import PrimalDualAttention
from keras_pdattn.layers.scaled_head_attention import ScaledHeadAttention

__all__ = [
    "BatchNormAttention",
    "BatchNormScaledHeadAttention",
    "PrimalDualAttention",
    "ScaledHeadAttention",
]
