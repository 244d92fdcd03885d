"""A support vector regression as a layer."""

import keras
from keras import ops

from keras_pdattn import descriptions, validation
from keras_pdattn.layers.primal_dual_attention import PrimalDualAttention
from keras_pdattn.training_sets import SlidingWindow


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class SupportVectorAttention(PrimalDualAttention):
    r"""Attention to keys and values that the layer holds: a support vector regression.

    \[ f(x) = \sum_j v_j \frac{\kappa(T(x), T(k_j))}{h(T(x))} + b \]

    `duality.fit(...).to_layer()` makes one that computes a fitted regression. Keys and
    values are weights, so it saves, loads and trains like any layer; it has one head,
    and its projections start as the identity.

    Masking: `query_mask` as for `PrimalDualAttention`. Causal use: none, as queries
    and training set are no one sequence.

    Cost: queries times `num_examples` products.

    Args:
        num_examples: positive integer, the number of keys.
        key_dim: positive integer, depth of queries and keys.
        value_dim: positive integer, the number of outputs.
        primal: a `Primal` for one head, its name or its config.
        name: name of the layer.
        dtype: dtype or dtype policy.
        trainable: whether its weights train.

    Call arguments:
        query: tensor of shape `(batch, queries, key_dim)`.
        query_mask: boolean `(batch, queries)`, False for padding.
        return_attention_scores: whether to return the scores too.
        training: whether in training; nothing depends on it.

    Returns:
        The output, `(batch, queries, value_dim)`; with `return_attention_scores` also
        the scores, `(batch, 1, queries, num_examples)`.

    Raises:
        ValueError: as `PrimalDualAttention`; if `num_examples` is not a positive
            integer, or the training set is a sliding window.

    Example:

    ```python
    import keras
    import keras_pdattn

    layer = keras_pdattn.layers.SupportVectorAttention(20, key_dim=3, value_dim=2)
    layer(keras.random.normal((4, 7, 3))).shape  # (4, 7, 2)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), equation 2.
    """

    def __init__(
        self,
        num_examples,
        key_dim,
        value_dim,
        primal="softmax",
        name=None,
        dtype=None,
        trainable=True,
    ):
        validation.positive_int("num_examples", num_examples)
        validation.positive_int("value_dim", value_dim)
        super().__init__(
            1,
            key_dim,
            value_dim,
            output_shape=value_dim,
            primal=primal,
            name=name,
            dtype=dtype,
            trainable=trainable,
        )
        self.num_examples = num_examples
        if isinstance(self.primal.training_set, SlidingWindow):
            raise ValueError(
                "Queries have no place among keys that the layer holds: a window has no meaning. "
                f"Received: training_set={self.primal.training_set!r}"
            )

    def get_config(self):
        config = {**super().get_config(), "num_examples": self.num_examples}
        arguments = ("num_examples", "key_dim", "value_dim", "primal", "name", "trainable", "dtype")
        return {name: config[name] for name in arguments}

    def build(self, query_shape):
        if query_shape[-1] != self._key_dim:
            raise ValueError(
                f"`query` must have the depth of the keys, {self._key_dim}. "
                f"Received: query.shape={tuple(query_shape)}"
            )
        key_shape = (query_shape[0], self.num_examples, self._key_dim)
        value_shape = (query_shape[0], self.num_examples, self._value_dim)
        super().build(query_shape, value_shape, key_shape)
        self.keys = self.add_weight(name="keys", shape=key_shape[1:])
        self.values = self.add_weight(name="values", shape=value_shape[1:])
        for dense in (self.query_dense, self.key_dense, self.value_dense, self.output_dense):
            size = max(dense.kernel.shape)
            dense.kernel.assign(ops.reshape(ops.eye(size), dense.kernel.shape))

    def assign(self, keys, values, intercept, weights):
        """Takes over a regression.

        Args:
            keys: array `(num_examples, key_dim)`.
            values: array `(num_examples, value_dim)`.
            intercept: array `(value_dim,)`.
            weights: list with a dict for each transform and the feature map.
        """
        self.keys.assign(keys)
        self.values.assign(values)
        self.output_dense.bias.assign(intercept)
        self._primal_weights.assign(weights)

    def call(self, query, query_mask=None, return_attention_scores=False, training=None):
        key, value = self._training_set(query)
        return super().call(
            query,
            value,
            key,
            query_mask=query_mask,
            return_attention_scores=return_attention_scores,
            training=training,
        )

    def _training_set(self, query):
        """Keys and values, one copy for each of the batch."""
        batch = ops.shape(query)[0]
        return [
            ops.broadcast_to(ops.cast(x, query.dtype), (batch, *x.shape))
            for x in (self.keys, self.values)
        ]

    def compute_output_shape(self, query_shape, value_shape=None, key_shape=None):
        return (*query_shape[:-1], self._value_dim)

    def compute_output_spec(
        self, query, query_mask=None, return_attention_scores=False, training=None
    ):
        key, value = (
            keras.KerasTensor((query.shape[0], *x.shape), dtype=query.dtype)
            for x in (self.keys, self.values)
        )
        return super().compute_output_spec(
            query, value, key, return_attention_scores=return_attention_scores
        )
