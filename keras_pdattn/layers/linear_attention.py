"""Linear attention."""

import keras

from keras_pdattn import descriptions, feature_maps
from keras_pdattn.layers.fixed_primal_attention import FixedPrimalAttention
from keras_pdattn.primals import Primal


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class LinearAttention(FixedPrimalAttention):
    r"""Linear attention: a finite feature map, and time linear in the length.

    \[ h_i = \frac{\Phi(q_i)^\top \sum_j \Phi(k_j)\, v_j^\top}
       {\Phi(q_i)^\top \sum_j \Phi(k_j)} \]

    The sums are the weight matrix of the primal problem, one for all queries. Short
    sequences take the dual form, which gives the same numbers, where it has fewer
    multiplications.

    Masking: after the feature map, on the kernel. Causal use: by chunks with a
    carried state. Dropout: on the output of each head, as there are no weights to
    drop.

    Cost: (queries + keys) times features times value depth per head. Attention
    masks and scores have an entry for each query and key, and with them, so has
    this.

    Args:
        num_heads: number of heads.
        key_dim: depth of each head's queries and keys.
        value_dim: depth of each head's values; `key_dim` if `None`.
        feature_map: a finite `FeatureMap`, its name (`"elu"`, `"relu"`, `"taylor"`,
            `"positive_random"`) or its config.
        **kwargs: the other arguments of `PrimalDualAttention`, but `primal`.

    Call arguments:
        As for `PrimalDualAttention`.

    Raises:
        ValueError: as `PrimalDualAttention` and `feature_maps.get`.

    Example:

    ```python
    import keras
    import keras_pdattn

    x = keras.random.normal((2, 10, 32))
    layer = keras_pdattn.layers.LinearAttention(num_heads=4, key_dim=8)
    layer(x, x).shape  # (2, 10, 32)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), linear attention.
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        *,
        feature_map="elu",
        **kwargs,
    ):
        primal = Primal(feature_map=feature_map)
        if not primal.feature_map.is_finite:
            raise ValueError(
                "Linear attention needs a finite feature map. Received: "
                f"feature_map={feature_map!r}"
            )
        super().__init__(num_heads, key_dim, value_dim, primal=primal, **kwargs)

    def get_config(self):
        feature_map = feature_maps.serialize(self.primal.feature_map)
        return {**super().get_config(), "feature_map": feature_map}
