"""The regression problem of some heads: its examples, their kernel and normaliser."""

import dataclasses

import numpy as np
from keras import ops

from keras_pdattn.ops.attention import transform, weights_of_heads
from keras_pdattn.ops.dtypes import widen
from keras_pdattn.ops.examples import Examples, Queries
from keras_pdattn.primals import Primal


class NoRegressionError(ValueError):
    """Queries see different keys, so that each solves a regression of its own."""


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What a group of heads is fitted on, without causality.

    Attributes:
        primal: the `Primal`.
        weights: the weights of these heads, a dict for each transform and the
            feature map.
        keys: `Examples` that are the keys themselves.
        examples: `Examples` that the training set makes of them.
    """

    primal: Primal
    weights: list
    keys: Examples
    examples: Examples

    @classmethod
    def of_heads(cls, primal, training_set, heads, weights, keys):
        """The problem of some heads, of which `keys` are; `weights` are those of all."""
        keys = keys.zero_padding()
        examples = training_set.select(keys, Queries(keys.key, keys.mask, keys.grid))
        return cls(primal, weights_of_heads(weights, heads), keys, examples)

    def transformed_keys(self):
        """T of the examples, `(B, M, H, D)`."""
        _, examples = self._transform(Queries(self.keys.key, self.keys.mask, self.keys.grid))
        return examples.key

    def log_kernel(self, x, y):
        """Logarithms of the kernel of transformed vectors, a float64 array `(B, H, T, M)`."""
        log_kernel = self.primal.feature_map.log_kernel(widen(x), widen(y), self.weights[-1])
        return to_float64(log_kernel)

    def log_kernel_of(self, queries):
        """The same of `Queries` and the examples, both yet to be transformed."""
        queries, examples = self._transform(queries)
        return self.log_kernel(queries.x, examples.key)

    def _transform(self, queries):
        return transform(self.primal, queries, self.examples, self.weights, exactly=True)

    def is_valid(self):
        """Boolean `(B, M)`: which examples are none of padding."""
        if self.examples.mask is None:
            return np.ones(self.examples.key.shape[:2], bool)
        return ops.convert_to_numpy(self.examples.mask)

    def by_key(self, x):
        """Reads an array `(B, M, ...)` of the examples by key, `(B, S, ...)`.

        A pooled key is in the example of its window; one that no example takes in
        reads as zero.
        """
        num_examples = self.examples.key.shape[1]
        weights = ops.eye(num_examples, dtype=self.examples.key.dtype)
        weights = ops.broadcast_to(weights, (len(x), 1, num_examples, num_examples))
        shares = ops.convert_to_numpy(self.examples.spread(weights, None))[:, 0]
        example, trailing = np.argmax(shares, axis=1), (1,) * (x.ndim - 2)
        is_member = np.any(shares > 0, axis=1) & np.take_along_axis(self.is_valid(), example, 1)
        x = np.take_along_axis(x, example.reshape(*example.shape, *trailing), axis=1)
        return np.where(is_member.reshape(*is_member.shape, *trailing), x, 0.0)


def to_float64(x):
    """A tensor as a float64 array."""
    return ops.convert_to_numpy(widen(x)).astype("float64")


def widest(x):
    """An array as a tensor, in float64 where the backend computes in it."""
    return ops.convert_to_tensor(np.asarray(x, "float64"))


def log_sum(log_terms):
    """`log(sum(exp(log_terms)))` along the last axis; minus infinity for no terms."""
    largest = np.max(log_terms, axis=-1, keepdims=True)
    largest = np.where(np.isneginf(largest), 0.0, largest)
    with np.errstate(divide="ignore"):
        return np.log(np.sum(np.exp(log_terms - largest), axis=-1)) + largest[..., 0]


def log_divided(log_part, log_total):
    """The logarithm of part over total; minus infinity where the total is zero."""
    is_zero = np.isneginf(log_total)
    return np.where(is_zero, -np.inf, log_part - np.where(is_zero, 0.0, log_total))
