"""Attention-SH."""

import keras

from keras_pdattn import descriptions
from keras_pdattn.layers.fixed_primal_attention import FixedPrimalAttention
from keras_pdattn.primals import Primal
from keras_pdattn.training_sets import ScaledHeads


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class ScaledHeadAttention(FixedPrimalAttention):
    r"""Attention-SH: every head attends to its own down-sampled keys and values.

    A head of scale \(s\) averages keys and values in windows of \(s\), to
    \(\bar k_m\) and \(\bar v_m\), and is fitted on these
    \(N_s = \lceil N/s \rceil\) examples:

    \[ h_i = \sum_{m=1}^{N_s} \operatorname{softmax}_m\left(
       \frac{q_i^\top \bar k_m}{\sqrt{D}}\right) \bar v_m \]

    Scores are those of the keys: a window's weight is shared evenly among its
    members.

    Masking: padded keys are in no mean. Causal use: a query sees the windows
    that are complete at its position, and the mean of the current one so far.

    Cost: \(1/s\) of the products of softmax attention for a head of scale
    \(s\); 0.469 of them for scales 1, 2, 4 and 8 in equal shares.

    Args:
        num_heads: number of heads.
        key_dim: depth of each head's queries and keys.
        value_dim: depth of each head's values; `key_dim` if `None`.
        scales: sequence of positive integers; the heads fall into contiguous
            groups, as even as possible and in order, one per scale.
        reduction: `"mean"`, or `"first"` to take the first of each window.
        **kwargs: the other arguments of `PrimalDualAttention`, but `primal`.

    Call arguments:
        As for `PrimalDualAttention`.

    Raises:
        ValueError: as `PrimalDualAttention` and `training_sets.ScaledHeads`.

    Example:

    ```python
    import keras
    import keras_pdattn

    x = keras.random.normal((2, 10, 32))
    layer = keras_pdattn.layers.ScaledHeadAttention(num_heads=4, key_dim=8, scales=(1, 2))
    layer(x, x).shape  # (2, 10, 32)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), Attention-SH.
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        *,
        scales=(1, 2, 4, 8),
        reduction="mean",
        **kwargs,
    ):
        training_set = ScaledHeads(scales, reduction)
        super().__init__(
            num_heads, key_dim, value_dim, primal=Primal(training_set=training_set), **kwargs
        )
