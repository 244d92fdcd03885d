"""Attention-BN+SH."""

import keras

from keras_pdattn import descriptions
from keras_pdattn.layers.fixed_primal_attention import FixedPrimalAttention
from keras_pdattn.primals import Primal
from keras_pdattn.training_sets import ScaledHeads
from keras_pdattn.transforms import BatchNorm


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class BatchNormScaledHeadAttention(FixedPrimalAttention):
    r"""Attention-BN+SH: every head normalises its own down-sampled keys.

    A head of scale \(s\) averages keys and values in windows of \(s\), to
    \(\bar k_m\) and \(\bar v_m\). Mean \(\mu\) and deviation \(s\) are those of the
    pooled keys, what the head is fitted on:

    \[ h_i = \sum_m \operatorname{softmax}_m\left(
       \frac{((q_i - \mu)\odot s^{-1})^\top ((\bar k_m - \mu)\odot s^{-1})}{\sqrt{D}}
       \right) \bar v_m \]

    Masking: padded keys are in no mean and no statistics. Causal use: a query
    sees the windows complete at its position, the mean of the current one so
    far, and the statistics of these.

    Cost: that of `ScaledHeadAttention` and one pass over the pooled keys.

    Args:
        num_heads: number of heads.
        key_dim: depth of each head's queries and keys.
        value_dim: depth of each head's values; `key_dim` if `None`.
        epsilon: positive float, added to the variance.
        center: whether to subtract the mean.
        scale: whether to divide by the deviation.
        beta: factor on the mean.
        learn_beta: whether `beta` is the start of a weight.
        scales: sequence of positive integers; the heads fall into contiguous
            groups, as even as possible and in order, one per scale.
        reduction: `"mean"`, or `"first"` to take the first of each window.
        **kwargs: the other arguments of `PrimalDualAttention`, but `primal`.

    Call arguments:
        As for `PrimalDualAttention`.

    Raises:
        ValueError: as `PrimalDualAttention`, `transforms.BatchNorm` and
            `training_sets.ScaledHeads`.

    Example:

    ```python
    import keras
    import keras_pdattn

    x = keras.random.normal((2, 10, 32))
    layer = keras_pdattn.layers.BatchNormScaledHeadAttention(num_heads=4, key_dim=8)
    layer(x, x).shape  # (2, 10, 32)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), Attention-BN+SH.
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
        scales=(1, 2, 4, 8),
        reduction="mean",
        **kwargs,
    ):
        primal = Primal(
            transform=BatchNorm(epsilon, center, scale, beta, learn_beta),
            training_set=ScaledHeads(scales, reduction),
        )
        super().__init__(num_heads, key_dim, value_dim, primal=primal, **kwargs)
