"""The weights of a layer's transforms."""

import keras


class TransformWeights(keras.layers.Layer):
    """Holds what the transforms of a primal problem learn, apart from the projections.

    A sublayer of its own, made last: the projections keep the positions and
    paths they have in `keras.layers.MultiHeadAttention`.
    """

    def __init__(self, transforms, **kwargs):
        super().__init__(**kwargs)
        self.transforms = transforms

    def build(self, heads_and_depth):
        self.by_transform = [
            transform.build(self._adder(f"{type(transform).__name__}_{index}"), *heads_and_depth)
            for index, transform in enumerate(self.transforms)
        ]

    def _adder(self, prefix):
        def add_weight(name, **kwargs):
            return self.add_weight(name=f"{prefix}_{name}", **kwargs)

        return add_weight
