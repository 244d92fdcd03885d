"""Attention-BN."""

import keras

from keras_pdattn import descriptions
from keras_pdattn.layers.fixed_primal_attention import FixedPrimalAttention
from keras_pdattn.primals import Primal
from keras_pdattn.transforms import BatchNorm


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class BatchNormAttention(FixedPrimalAttention):
    r"""Attention-BN: softmax attention on batch-normalised queries and keys.

    \[ h_i = \sum_j \operatorname{softmax}_j\left(
       \frac{((q_i - \mu)\odot s^{-1})^\top ((k_j - \mu)\odot s^{-1})}{\sqrt{D}}
       \right) v_j, \qquad
       \mu = \frac{1}{N}\sum_j k_j, \qquad
       s_d = \sqrt{\frac{1}{N}\sum_j (k_j(d) - \mu(d))^2 + \epsilon} \]

    The statistics are those of each sequence's own keys, per head and feature.
    Nothing is averaged over batches, so training and inference do not differ.

    Masking: padded keys are left out of the statistics. Causal use: query `i` is
    normalised with the statistics of keys `0` to `i`.

    Cost: that of softmax attention and one pass over the keys.

    Args:
        num_heads: number of heads.
        key_dim: depth of each head's queries and keys.
        value_dim: depth of each head's values; `key_dim` if `None`.
        epsilon: positive float, added to the variance.
        center: whether to subtract the mean.
        scale: whether to divide by the deviation.
        beta: factor on the mean.
        learn_beta: whether `beta` is the start of a weight.
        **kwargs: the other arguments of `PrimalDualAttention`, but `primal`.

    Call arguments:
        As for `PrimalDualAttention`.

    Raises:
        ValueError: as `PrimalDualAttention` and `transforms.BatchNorm`.

    Example:

    ```python
    import keras
    import keras_pdattn

    x = keras.random.normal((2, 10, 32))
    layer = keras_pdattn.layers.BatchNormAttention(num_heads=4, key_dim=8)
    layer(x, x, use_causal_mask=True).shape  # (2, 10, 32)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), Attention-BN.
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        *,
        epsilon=1e-5,
        center=True,
        scale=True,
        beta=1.0,
        learn_beta=False,
        **kwargs,
    ):
        transform = BatchNorm(epsilon, center, scale, beta, learn_beta)
        super().__init__(
            num_heads, key_dim, value_dim, primal=Primal(transform=transform), **kwargs
        )
