"""Members as a user would write them, outside the package."""

import dataclasses

import keras
from keras import ops

from keras_pdattn.feature_maps import FeatureMap
from keras_pdattn.training_sets import TrainingSet
from keras_pdattn.transforms import Transform


@keras.saving.register_keras_serializable(package="tests")
class Squares(FeatureMap):
    def features(self, x, weights):
        return ops.square(x)


class Unregistered(Squares):
    pass


@keras.saving.register_keras_serializable(package="tests")
class Gain(Transform):
    def build(self, add_weight, num_heads, depth):
        gain = add_weight(name="gain", shape=(num_heads, depth), initializer="ones")
        return {"gain": gain}

    def apply(self, x, statistics, weights):
        return x * weights["gain"]


@keras.saving.register_keras_serializable(package="tests")
class Mixing(Transform):
    """Asks for its weight by position, with Keras's initialiser and name."""

    def build(self, add_weight, num_heads, depth):
        return {"mixing": add_weight((num_heads, depth), None, "float32")}

    def apply(self, x, statistics, weights):
        return x * weights["mixing"]


@keras.saving.register_keras_serializable(package="tests")
class Scale(Transform):
    """Written without a dataclass."""

    def __init__(self, factor):
        self.factor = factor

    def get_config(self):
        return {"factor": self.factor}

    def apply(self, x, statistics, weights):
        return x * self.factor


class Centered(Scale):
    """Has statistics, and no word on how to take them causally."""

    def fit(self, key, mask):
        if mask is None:
            return ops.mean(key, axis=1, keepdims=True)
        weight = ops.cast(ops.expand_dims(mask, axis=(2, 3)), key.dtype)
        count = ops.sum(weight, axis=1, keepdims=True)
        return ops.sum(key * weight, axis=1, keepdims=True) / count

    def apply(self, x, statistics, weights):
        return x - self.factor * statistics


class NotCausal(Scale):
    supports_causal = False


@keras.saving.register_keras_serializable(package="tests")
class EvenKeys(TrainingSet):
    def select(self, keys, queries):
        even = ops.expand_dims(ops.arange(ops.shape(keys.key)[1]) % 2 == 0, axis=0)
        mask = even if keys.mask is None else ops.logical_and(keys.mask, even)
        mask = ops.broadcast_to(mask, ops.shape(keys.key)[:2])
        return dataclasses.replace(keys, mask=mask)
