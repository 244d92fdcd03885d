"""Attention-Conv1D."""

import keras

from keras_pdattn import descriptions
from keras_pdattn.layers.fixed_primal_attention import FixedPrimalAttention
from keras_pdattn.primals import Primal
from keras_pdattn.transforms import Conv1D


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class Conv1DAttention(FixedPrimalAttention):
    r"""Attention-Conv1D: queries and keys go through a learned convolution first.

    \[ h_i = \sum_j \operatorname{softmax}_j\left(
       \frac{(q * w)_i^\top (k * w)_j}{\sqrt{D}}\right) v_j \]

    The convolution is depthwise: one weight for each tap, head and feature, the same
    for queries and keys. A fresh kernel is the identity, so a fresh layer equals
    softmax attention.

    Masking: padded positions read as zero. Causal use: taps that look ahead are
    dropped.

    Cost: that of softmax attention and kernel size times the length.

    Args:
        num_heads: number of heads.
        key_dim: depth of each head's queries and keys.
        value_dim: depth of each head's values; `key_dim` if `None`.
        kernel_size: positive odd integer.
        **kwargs: the other arguments of `PrimalDualAttention`, but `primal`.

    Call arguments:
        As for `PrimalDualAttention`.

    Raises:
        ValueError: as `PrimalDualAttention` and `transforms.Conv1D`.

    Example:

    ```python
    import keras
    import keras_pdattn

    x = keras.random.normal((2, 10, 32))
    layer = keras_pdattn.layers.Conv1DAttention(num_heads=4, key_dim=8, kernel_size=5)
    layer(x, x).shape  # (2, 10, 32)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), convolutional attention.
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        *,
        kernel_size=3,
        **kwargs,
    ):
        primal = Primal(transform=Conv1D(kernel_size))
        super().__init__(num_heads, key_dim, value_dim, primal=primal, **kwargs)
