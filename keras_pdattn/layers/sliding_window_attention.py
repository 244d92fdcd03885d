"""Sparse attention in a sliding window."""

import keras

from keras_pdattn import descriptions
from keras_pdattn.layers.fixed_primal_attention import FixedPrimalAttention
from keras_pdattn.primals import Primal
from keras_pdattn.training_sets import SlidingWindow


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class SlidingWindowAttention(FixedPrimalAttention):
    r"""Sparse attention: every query sees the keys near it, and global tokens.

    \[ h_i = \sum_{j \in M_i} \operatorname{softmax}_j\left(
       \frac{q_i^\top k_j}{\sqrt{D}}\right) v_j, \qquad
       M_i = \{ j : |i - j| < \text{size} \cdot \text{dilation},\;
       \text{dilation} \mid i - j \} \cup \{\text{global tokens}\} \]

    With several attended axes the window is a box. Global tokens, the first that
    are not padding, see all and are seen by all.

    Masking: padding is left out. Causal use: the keys of the window, and the global
    tokens, up to the query's position.

    Cost: queries times `size` products per head (twice that if not causal), in
    bands: time and memory are linear in the length. Attention masks and scores have
    an entry for each query and key, and with them, so has this.

    Args:
        num_heads: number of heads.
        key_dim: depth of each head's queries and keys.
        value_dim: depth of each head's values; `key_dim` if `None`.
        size: positive integer, steps to either side, its own position counted.
        dilation: positive integer, the stride of these steps.
        global_tokens: the number of global tokens, 0 for none.
        **kwargs: the other arguments of `PrimalDualAttention`, but `primal`.

    Call arguments:
        As for `PrimalDualAttention`.

    Raises:
        ValueError: as `PrimalDualAttention` and `training_sets.SlidingWindow`.

    Example:

    ```python
    import keras
    import keras_pdattn

    x = keras.random.normal((2, 10, 32))
    layer = keras_pdattn.layers.SlidingWindowAttention(num_heads=4, key_dim=8, size=3)
    layer(x, x).shape  # (2, 10, 32)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), sparse attention.
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        *,
        size=64,
        dilation=1,
        global_tokens=0,
        **kwargs,
    ):
        primal = Primal(training_set=SlidingWindow(size, dilation, global_tokens))
        super().__init__(num_heads, key_dim, value_dim, primal=primal, **kwargs)
