"""Attention layers, each a `keras.layers.MultiHeadAttention` with another primal problem."""

from keras_pdattn.layers.batch_norm_attention import BatchNormAttention
from keras_pdattn.layers.batch_norm_scaled_head_attention import BatchNormScaledHeadAttention
from keras_pdattn.layers.conv1d_attention import Conv1DAttention
from keras_pdattn.layers.conv2d_attention import Conv2DAttention
from keras_pdattn.layers.linear_attention import LinearAttention
from keras_pdattn.layers.normalized_features import NormalizedFeatures
from keras_pdattn.layers.primal_dual_attention import PrimalDualAttention
from keras_pdattn.layers.scaled_head_attention import ScaledHeadAttention
from keras_pdattn.layers.sliding_window_attention import SlidingWindowAttention
from keras_pdattn.layers.support_vector_attention import SupportVectorAttention
from keras_pdattn.layers.transformer_decoder import TransformerDecoder
from keras_pdattn.layers.transformer_encoder import TransformerEncoder

__all__ = [
    "BatchNormAttention",
    "BatchNormScaledHeadAttention",
    "Conv1DAttention",
    "Conv2DAttention",
    "LinearAttention",
    "NormalizedFeatures",
    "PrimalDualAttention",
    "ScaledHeadAttention",
    "SlidingWindowAttention",
    "SupportVectorAttention",
    "TransformerDecoder",
    "TransformerEncoder",
]
