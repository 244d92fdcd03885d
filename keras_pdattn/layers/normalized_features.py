"""The primal layer: features of queries, normalised over a training set."""

import keras
from keras import ops, tree

from keras_pdattn import descriptions, primals
from keras_pdattn.layers.primal_weights import PrimalWeights
from keras_pdattn.ops.dtypes import widen


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class NormalizedFeatures(keras.layers.Layer):
    r"""Features of a primal problem, normalised over the training set it was given.

    \[ x \mapsto \frac{\Phi(T(x))}{h(T(x))}, \qquad h(x) = \Phi(x)^\top z, \qquad
       z = \sum_{j \in S} \Phi(T(k_j)) \]

    A dense layer on top of it is the primal layer of the theory, whose dual form is
    attention; `duality.fit(...).to_primal_layer()` makes the two. The statistics of
    \(T\) and the vector \(z\) are weights that do not train, nor follow where weights
    of \(T\) do. In a fresh layer \(z\) is 1. The training set of `primal` has done its
    part when these are given.

    Masking: the mask is passed on; each position stands for itself, but for a
    convolution, which runs along the sequence. Causal use: none.

    Cost: features times the length.

    Args:
        primal: a `Primal` with a finite feature map, its name or its config.
        **kwargs: `name`, `dtype` and `trainable`, as for any layer.

    Call arguments:
        inputs: tensor of shape `(batch, time, depth)`.

    Returns:
        Tensor of shape `(batch, time, features)`; zero where a normaliser is.

    Raises:
        ValueError: if the feature map has no end, or a transform needs a grid.

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
        self.supports_masking = True
        self.primal = primals.get(primal)
        self.primal.check_call(num_axes=1)
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
        self.statistics = [
            tree.map_structure(
                self._fixed_weight(f"{type(transform).__name__}_{index}"), transform.fit(keys, None)
            )
            for index, transform in enumerate(self.primal.transform)
        ]
        feature_map = self.primal.feature_map
        features = feature_map.features(widen(keys), feature_map.initial_weights(1, depth))
        self.normalizer = self._fixed_weight("normalizer")(ops.ones((features.shape[-1],)))

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

    def assign(self, examples, normalizer, weights):
        """Takes over a training set.

        Args:
            examples: `ops.examples.Examples` of one head, not transformed.
            normalizer: array `(features,)`, z, or a multiple of it.
            weights: list with a dict for each transform and the feature map.
        """
        self._primal_weights.assign(weights)
        for transform, variables, its_weights in zip(
            self.primal.transform, self.statistics, weights
        ):
            examples = examples.zero_padding()
            found = transform.fit(examples.key, examples.mask)
            for variable, value in zip(tree.flatten(variables), tree.flatten(found)):
                if variable is not None:
                    variable.assign(value)
            examples = examples.with_keys(
                lambda key, transform=transform, found=found, its_weights=its_weights: (
                    transform.apply(key, found, its_weights)
                )
            )
        self.normalizer.assign(normalizer)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.normalizer.shape[0])

    def call(self, inputs):
        x = ops.expand_dims(widen(inputs), axis=2)
        *transform_weights, map_weights = self._primal_weights.by_member
        for transform, statistics, weights in zip(
            self.primal.transform, self.statistics, transform_weights
        ):
            x = transform.apply(x, tree.map_structure(_tensor, statistics), weights)
        features = ops.squeeze(self.primal.feature_map.query_features(x, map_weights), axis=2)
        total = ops.sum(features * ops.cast(self.normalizer, features.dtype), -1, keepdims=True)
        # Features that meet no key's are no example's.
        total = ops.where(total == 0, float("inf"), total)
        return ops.cast(features / total, self.compute_dtype)


def _tensor(weight):
    return weight if weight is None else ops.convert_to_tensor(weight)
