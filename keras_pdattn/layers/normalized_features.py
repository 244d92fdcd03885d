"""The primal layer: features of queries, normalised over a training set."""

import keras
from keras import ops, tree

from keras_pdattn import descriptions, primals
from keras_pdattn.layers.primal_weights import PrimalWeights
from keras_pdattn.ops.dtypes import widen
from keras_pdattn.ops.kernels import share


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class NormalizedFeatures(keras.layers.Layer):
    r"""Features of a primal problem, normalised over the training set it was given.

    \[ x \mapsto \frac{\Phi(T(x))}{h(T(x))}, \qquad h(x) = \Phi(x)^\top z, \qquad
       z = \sum_{j \in S} \Phi(T(k_j)) \]

    A dense layer on top of it is the primal layer of the theory, whose dual form is
    attention; `duality.fit(...).to_primal_layer()` makes the two. The statistics of
    \(T\) and the vector \(z\) are weights that do not train. A fresh layer has
    those of a training set at zero.

    Masking: none; each position stands for itself, but for a convolution, which runs
    along the sequence. Causal use: none.

    Cost: features times the length.

    Args:
        primal: a `Primal` with a finite feature map, its name or its config.
        **kwargs: `name`, `dtype` and `trainable`, as for any layer.

    Call arguments:
        inputs: tensor of shape `(batch, time, depth)`.

    Returns:
        Tensor of shape `(batch, time, features)`; zero where a normaliser is.

    Raises:
        ValueError: if the feature map has no end.

    Example:

    ```python
    import keras
    import keras_pdattn

    layer = keras_pdattn.layers.NormalizedFeatures("linear")
    layer(keras.random.normal((2, 7, 3))).shape  # (2, 7, 3)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), equation 1.
    """

    def __init__(self, primal, **kwargs):
        super().__init__(**kwargs)
        self.primal = primals.get(primal)
        if not self.primal.feature_map.is_finite:
            raise ValueError(
                f"The feature map has no end. Received: feature_map={self.primal.feature_map!r}"
            )

    def get_config(self):
        return {**super().get_config(), "primal": primals.serialize(self.primal)}

    def build(self, input_shape):
        depth = input_shape[-1]
        self._primal_weights = PrimalWeights(
            self.primal.weighted_members, dtype=self.dtype_policy, name="primal"
        )
        self._primal_weights.build((1, depth))
        # What statistics look like, transforms show on any keys.
        keys = ops.zeros((1, 2, 1, depth), dtype=self.variable_dtype)
        weights = [member.initial_weights(1, depth) for member in self.primal.weighted_members]
        keys, statistics = self._fit(keys, weights)
        self.statistics = [
            tree.map_structure(self._fixed_weight(f"{type(transform).__name__}_{index}"), found)
            for index, (transform, found) in enumerate(zip(self.primal.transform, statistics))
        ]
        num_features = self.primal.feature_map.features(widen(keys), weights[-1]).shape[-1]
        self.normalizer = self._fixed_weight("normalizer")(ops.ones((num_features,)))

    def _fixed_weight(self, name):
        def add(value):
            if value is None:
                return None
            return self.add_weight(
                name=name,
                shape=value.shape,
                initializer=lambda shape, dtype=None: ops.cast(value, dtype),
                trainable=False,
                autocast=False,
            )

        return add

    def _fit(self, keys, weights):
        """The keys `(1, M, 1, D)` transformed, and the statistics of each transform."""
        statistics = []
        for transform, its_weights in zip(self.primal.transform, weights):
            statistics.append(transform.fit(keys, None))
            keys = transform.apply(keys, statistics[-1], its_weights)
        return keys, statistics

    def assign(self, examples, normalizer, weights):
        """Takes over a training set.

        Args:
            examples: tensor `(1, M, 1, depth)`, not transformed.
            normalizer: array `(features,)`, z, or a multiple of it.
            weights: list with a dict for each transform and the feature map.
        """
        self._primal_weights.assign(weights)
        _, statistics = self._fit(examples, weights)
        for variables, found in zip(self.statistics, statistics):
            for variable, value in zip(tree.flatten(variables), tree.flatten(found)):
                if variable is not None:
                    variable.assign(value)
        self.normalizer.assign(normalizer)

    def call(self, inputs):
        x = ops.expand_dims(widen(inputs), axis=2)
        *transform_weights, map_weights = self._primal_weights.by_member
        for transform, statistics, weights in zip(
            self.primal.transform, self.statistics, transform_weights
        ):
            x = transform.apply(x, statistics, weights)
        features = ops.squeeze(self.primal.feature_map.query_features(x, map_weights), axis=2)
        total = ops.sum(features * ops.cast(self.normalizer, features.dtype), -1, keepdims=True)
        return ops.cast(share(features, total), self.compute_dtype)
