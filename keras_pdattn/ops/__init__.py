"""Stateless maths on `(batch, time, heads, depth)`.

That is the layout of `keras.ops.dot_product_attention`.
"""

from keras_pdattn.ops.attention import attention

__all__ = ["attention"]
