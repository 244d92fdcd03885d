"""Attention-Conv2D."""

import keras

from keras_pdattn import descriptions
from keras_pdattn.layers.fixed_primal_attention import FixedPrimalAttention
from keras_pdattn.primals import Primal
from keras_pdattn.transforms import Conv2D


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class Conv2DAttention(FixedPrimalAttention):
    r"""Attention-Conv2D: queries and keys on a grid go through a learned convolution first.

    \[ h_i = \sum_j \operatorname{softmax}_j\left(
       \frac{(q * w)_i^\top (k * w)_j}{\sqrt{D}}\right) v_j \]

    The convolution is depthwise: one weight for each tap, head and feature, the same
    for queries and keys. A fresh kernel is the identity. The grid is that of inputs
    `(batch, height, width, channels)`, or `grid` for flattened ones.

    Masking: padded positions read as zero. Causal use: raster order; taps that come
    later are dropped.

    Cost: that of softmax attention and kernel size squared times the length.

    Args:
        num_heads: number of heads.
        key_dim: depth of each head's queries and keys.
        value_dim: depth of each head's values; `key_dim` if `None`.
        kernel_size: positive odd integer, along both axes.
        grid: pair of positive integers, rows and columns of a flattened grid; or
            `None` for inputs with two axes to attend over.
        class_tokens: the number of positions in front of a flattened grid.
        **kwargs: the other arguments of `PrimalDualAttention`, but `primal`.

    Call arguments:
        As for `PrimalDualAttention`, `(batch, height, width, channels)` without `grid`.

    Raises:
        ValueError: as `PrimalDualAttention` and `transforms.Conv2D`.

    Example:

    ```python
    import keras
    import keras_pdattn

    x = keras.random.normal((2, 5, 4, 32))
    layer = keras_pdattn.layers.Conv2DAttention(num_heads=4, key_dim=8, kernel_size=3)
    layer(x, x).shape  # (2, 5, 4, 32)
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
        grid=None,
        class_tokens=0,
        **kwargs,
    ):
        primal = Primal(transform=Conv2D(kernel_size, grid, class_tokens))
        super().__init__(num_heads, key_dim, value_dim, primal=primal, **kwargs)
