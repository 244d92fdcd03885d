"""Transforms: the choice of T, which queries and keys go through before the feature map."""

import dataclasses

import keras
from keras import ops

from keras_pdattn import descriptions, validation
from keras_pdattn.ops import statistics
from keras_pdattn.ops.dtypes import widen


class Transform(descriptions.Description):
    r"""A transform \(T\) of queries and keys, fitted to the training set of a head.

    A subclass gives `apply`; if that needs statistics of the training set, also
    `fit`; if it has weights, also `build`. A transform without statistics works
    causally as it is. One with statistics says how by overriding `__call__`;
    until it does, a causal call raises an error.

    Masking: padded keys read as zero and are False in the mask that `fit` gets.

    Example:

    ```python
    import keras
    from keras_pdattn import Primal
    from keras_pdattn.transforms import Transform

    @keras.saving.register_keras_serializable(package="my_package")
    class Gain(Transform):
        def build(self, add_weight, num_heads, depth):
            gain = add_weight(name="gain", shape=(num_heads, depth), initializer="ones")
            return {"gain": gain}

        def apply(self, x, statistics, weights):
            return x * weights["gain"]

    Primal(transform=Gain())
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """

    def build(self, add_weight, num_heads, depth):
        """Creates the weights of one layer.

        Args:
            add_weight: function with the arguments of `keras.layers.Layer.add_weight`.
            num_heads: number of heads.
            depth: depth of a key.

        Returns:
            Dict from a name to a weight: a scalar, or of shape
            `(..., num_heads, depth)`.
        """
        return {}

    def initial_weights(self, num_heads, depth):
        """What `build` would start from, as plain tensors."""

        def initial_value(name=None, shape=(), initializer=None, dtype=None, **kwargs):
            return keras.initializers.get(initializer)(shape, dtype=dtype)

        return self.build(initial_value, num_heads, depth)

    def fit(self, key, mask):
        """Returns statistics of the training set, `None` if there are none to take.

        Args:
            key: tensor of shape `(batch, examples, heads, depth)`.
            mask: boolean `(batch, examples)`, False for padding; or `None`.
        """
        return None

    def apply(self, x, statistics, weights):
        r"""Returns \(T(x)\) for queries or keys `x`, `(batch, time, heads, depth)`."""
        raise NotImplementedError(f"{type(self).__name__} must implement `apply`.")

    def __call__(self, query, examples, feature_map, weights):
        """Transforms queries and keys.

        Args:
            query: tensor of shape `(batch, queries, heads, depth)`.
            examples: `ops.examples.Examples`, the training set.
            feature_map: the feature map that comes after.
            weights: what `build` returned, for these heads.

        Returns:
            The queries, and the examples with their keys replaced. Products of
            the two may differ from those of \\(T(q_i)\\) and \\(T(k_j)\\) by what
            `feature_map` does not notice.
        """
        if examples.is_causal and type(self).fit is not Transform.fit:
            raise ValueError(
                f"{type(self).__name__} has statistics and does not say how to take them causally, "
                "so it can't be used with a causal mask: override `__call__`. "
                f"Received: transform={self!r}"
            )
        statistics = self.fit(examples.key, examples.mask)
        query = self.apply(query, statistics, weights)
        return query, examples.with_keys(lambda key: self.apply(key, statistics, weights))


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
@dataclasses.dataclass(frozen=True)
class BatchNorm(Transform):
    r"""Batch normalisation over the training set, the transform of Attention-BN.

    \[ T(x) = (x - \beta\mu) \odot s^{-1}, \qquad
       \mu = \frac{1}{N}\sum_{j=1}^N k_j, \qquad
       s_d = \sqrt{\frac{1}{N}\sum_{j=1}^N (k_j(d) - \mu(d))^2 + \epsilon} \]

    The statistics are those of this sequence's keys, per head and feature, and
    normalise queries and keys alike. There are no running averages, and training
    and inference do not differ. With `ScaledHeads` they are those of the pooled
    keys.

    Masking: padded keys are left out of the statistics; attention masks and
    sliding windows do not touch them. Causal use: query `i`, and for
    it the keys, are normalised with the statistics of keys `0` to `i`.

    Cost: one pass over the keys, in float32 or wider; nothing else grows with
    the length.

    Args:
        epsilon: positive float, added to the variance.
        center: whether to subtract the mean.
        scale: whether to divide by the deviation.
        beta: float, the factor on the mean; 1 is batch normalisation.
        learn_beta: whether `beta` is the start of a weight, one per layer.

    Raises:
        ValueError: if `epsilon` is not positive, if neither `center` nor `scale`
            is on, or if `learn_beta` is on and `center` is not.

    Example:

    ```python
    from keras_pdattn import Primal, transforms

    Primal(transform=transforms.BatchNorm(epsilon=1e-3))
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), Attention-BN.
    """

    epsilon: float = 1e-5
    center: bool = True
    scale: bool = True
    beta: float = 1.0
    learn_beta: bool = False

    def __post_init__(self):
        epsilon = validation.real(
            "epsilon", self.epsilon, "a positive number", lambda value: 0 < value < float("inf")
        )
        beta = validation.real(
            "beta", self.beta, "a finite number", lambda value: abs(value) < float("inf")
        )
        object.__setattr__(self, "epsilon", epsilon)
        object.__setattr__(self, "beta", beta)
        for name in ("center", "scale", "learn_beta"):
            validation.boolean(name, getattr(self, name))
        if not (self.center or self.scale):
            raise ValueError("BatchNorm must center or scale. Received: center=False, scale=False")
        if self.learn_beta and not self.center:
            raise ValueError(
                "`learn_beta` learns the factor on the mean, which `center=False` leaves out. "
                "Received: learn_beta=True, center=False"
            )

    def build(self, add_weight, num_heads, depth):
        if not self.learn_beta:
            return {}
        start = keras.initializers.Constant(self.beta)
        return {"beta": add_weight(name="beta", shape=(), initializer=start, autocast=False)}

    def __call__(self, query, examples, feature_map, weights):
        if examples.is_causal:
            return self._fit_prefixes(query, examples, feature_map, weights)
        dtype = query.dtype
        mean, variance = statistics.moments(examples.key, examples.mask)
        inverse = self._inverse_deviation(variance)
        beta = self._factor_on_mean(weights, mean.dtype)
        # A kernel that does not notice a shift of all keys gets centred ones
        # whatever beta is: a common offset would eat the mantissa.
        key_beta = 1.0 if feature_map.shift_invariant else beta
        key_mean = ops.stop_gradient(mean) if feature_map.shift_invariant else mean

        def normalize_key(key):
            return ops.cast((widen(key) - key_beta * key_mean) * inverse, dtype)

        query = ops.cast((widen(query) - beta * mean) * inverse, dtype)
        return query, examples.with_keys(normalize_key)

    def _fit_prefixes(self, query, examples, feature_map, weights):
        """Normalises query i, and for it all keys, with the statistics of its prefix.

        The keys can't be normalised anew for each query, but with a kernel that
        does not notice a shift, neither need they be: T of the keys scales them
        by the deviation and shifts them, and the scale can go to the query.
        """
        if not feature_map.shift_invariant:
            raise ValueError(
                "Causal batch normalisation needs a feature map that does not notice a shift of "
                f"all keys, such as softmax. Received: feature_map={feature_map!r}"
            )
        origin = statistics.origin(examples.key, examples.mask)
        centred = examples.with_keys(lambda key: widen(key) - origin)
        centred = dataclasses.replace(centred, is_folded=True)
        moments = statistics.prefix_moments(centred.key, examples.limit, examples.mask)
        if centred.own is not None:
            moments = statistics.append_example(moments, centred.own.key, centred.own.mask)
        count, mean, squares = moments
        inverse = self._inverse_deviation(squares / ops.maximum(count, 1))
        beta = self._factor_on_mean(weights, mean.dtype)
        normalized = (widen(query) - beta * origin - beta * mean) * inverse
        dtype = query.dtype
        if keras.backend.standardize_dtype(dtype) == "float16":
            # Where a prefix has no spread, 1 / epsilon is beyond float16.
            return normalized * inverse, centred
        narrow = centred.with_keys(lambda key: ops.cast(key, dtype))
        return ops.cast(normalized * inverse, dtype), narrow

    def _inverse_deviation(self, variance):
        return ops.rsqrt(variance + self.epsilon) if self.scale else ops.ones_like(variance)

    def _factor_on_mean(self, weights, dtype):
        if not self.center:
            return 0.0
        return ops.cast(weights["beta"], dtype) if self.learn_beta else self.beta


_registry = descriptions.Registry("transform", Transform, {"batch_norm": BatchNorm()})


def get(identifier):
    """Returns the transform that a name, config dict, class or instance stands for.

    Args:
        identifier: `"batch_norm"`, the registered name of a class, a config
            dict, a `Transform` or a subclass of it.

    Raises:
        ValueError: if it stands for none; lists the names.
    """
    return _registry.get(identifier)


def serialize(transform):
    """Returns the config dict of a transform; see `get`."""
    return descriptions.serialize(transform)
