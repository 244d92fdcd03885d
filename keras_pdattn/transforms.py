"""Transforms: the choice of T, which queries and keys go through before the feature map."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_pdattn import descriptions, validation
from keras_pdattn.ops import convolution, native, statistics
from keras_pdattn.ops.dtypes import cast, widen
from keras_pdattn.ops.indexing import take_along_time
from keras_pdattn.ops.records import replace

#: The largest number of float16.
MOST_IN_HALF = 65504.0


class Transform(descriptions.WeightedMember):
    r"""A transform \(T\) of queries and keys, fitted to the training set of a head.

    A subclass gives `apply`; if that needs statistics of the training set, also
    `fit`; if it has weights, also `build`. Masks, causal use, scores and saving
    follow from these.

    Masking: padded keys read as zero and are False in the mask that `fit` gets.
    Causal use: query `i` gets the statistics of keys `0` to `i`. A transform
    without statistics takes one pass for that; one with them is fitted anew for
    each query, queries times keys products of the depth, unless it overrides
    `has_causal_form` and `__call__`.

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

    #: Whether `apply` looks at each position alone.
    is_pointwise = True

    @property
    def look_back(self):
        """How many positions before it a causal `apply` mixes into one; `None` for any number."""
        return 0 if self.is_pointwise else None

    @property
    def keeps_values(self):
        """Whether values are neither read nor changed, as in any `__call__` of this package."""
        return type(self).__call__.__module__ == __name__

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

    def has_causal_form(self, shift_invariant):
        """Whether `__call__` serves all queries of a causal call at once.

        Args:
            shift_invariant: whether what comes after does not notice a shift of all keys.
        """
        return type(self).fit is Transform.fit

    def check_axes(self, num_axes):
        """Raises a `ValueError` if attention over `num_axes` axes has no meaning here."""

    def __call__(self, queries, examples, weights, shift_invariant):
        """Transforms queries and keys.

        Args:
            queries: `ops.examples.Queries`.
            examples: `ops.examples.Examples`, the training set.
            weights: what `build` returned, for these heads.
            shift_invariant: whether what comes after does not notice a shift of all keys.

        Returns:
            The queries and the examples, transformed; if `shift_invariant`, all
            keys of a query may be so but for one shift.
        """
        statistics = self.fit(examples.key, examples.mask)
        queries = queries.with_x(self.apply(queries.x, statistics, weights))
        return queries, examples.with_keys(lambda key: self.apply(key, statistics, weights))


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
    the length. A causal call with a kernel that notices a shift of all keys (all
    but softmax), or with a transform behind this one, normalises the keys anew
    for each query: queries times keys products of the depth.

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
        epsilon = validation.positive("epsilon", self.epsilon)
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

    def fit(self, key, mask):
        mean = statistics.mean(key, mask)
        variance = statistics.variance(widen(key) - mean, mask)
        return mean, ops.sqrt(self._denominator(variance))

    def apply(self, x, statistics, weights):
        mean, deviation = statistics
        return self._normalise(x, deviation, weights, mean)

    def has_causal_form(self, shift_invariant):
        return shift_invariant

    def __call__(self, queries, examples, weights, shift_invariant):
        if examples.is_causal:
            return self._fit_prefixes(queries, examples, weights)
        dtype = queries.x.dtype
        if not shift_invariant:
            queries, examples = super().__call__(queries, examples, weights, shift_invariant)
            return _narrowed(queries, examples, dtype)
        mean = statistics.mean(examples.key, examples.mask)
        # Centred, whatever beta is: a common offset would eat the mantissa.
        centred = examples.with_keys(lambda key: native.widened(key) - mean)
        variance = self._denominator(statistics.variance(centred.key, examples.mask))
        if _is_half(dtype):
            # Where keys have no spread, 1 / epsilon is beyond float16: scale both, once each.
            variance = ops.sqrt(variance)
            centred = centred.with_keys(lambda key: key / variance)
        x = self._normalise(queries.x, variance, weights, mean)
        return _narrowed(queries.with_x(x), centred, dtype)

    def _fit_prefixes(self, queries, examples, weights):
        """Normalises query i, and for it all keys, with the statistics of its prefix.

        The keys can't be normalised anew for each query, but with a kernel that
        does not notice a shift, neither need they be: T of the keys scales them
        by the deviation and shifts them, and the scale can go to the query.
        """
        origin = statistics.origin(examples.key, examples.common_position())
        centred = examples.with_keys(lambda key: native.widened(key) - origin)
        own = centred.own
        if centred.has_running_means:
            moments = statistics.moments_of_running_means(own.key, examples.mask, own.mask)
        else:
            limit = None if examples.has_limit_at_each() else examples.limit
            moments = statistics.prefix_moments(centred.key, limit, examples.mask)
            if own is not None:
                moments = statistics.append_example(moments, own.key, own.mask)
        count, mean, variance = moments
        x = self._normalise(queries.x, self._denominator(variance, count), weights, origin, mean)
        dtype = queries.x.dtype
        # Where a prefix has no spread, 1 / epsilon is beyond float16.
        return _narrowed(queries.with_x(x), centred, x.dtype if _is_half(dtype) else dtype)

    def _denominator(self, variance, count=None):
        """What a product of a query and a key is divided by; `variance` is lost.

        Where there is one example it is infinity: that has all the weight, whatever its score.
        The score's gradient is zero, and what rounding leaves of it, over epsilon, would be large.
        """
        if not self.scale:
            return ops.ones_like(variance)
        epsilon = self.epsilon
        if count is not None:
            epsilon = epsilon / native.at_most(native.at_least(count - 1, 0), 1)
        return native.raised(variance, epsilon)

    def _normalise(self, x, divisor, weights, *means):
        """`x` less beta times the mean, which is the sum of `means`, over `divisor`."""
        if not self.center:
            means = ()
        elif self.learn_beta:
            means = [ops.cast(weights["beta"], mean.dtype) * mean for mean in means]
        elif self.beta != 1:
            means = [self.beta * mean for mean in means]
        return native.ratio(native.widened(x), divisor, *means)


def _is_half(dtype):
    return keras.backend.standardize_dtype(dtype) == "float16"


def _narrowed(queries, examples, dtype):
    """Queries and keys back in `dtype`, once what is summed and subtracted is."""

    def narrow(x):
        if _is_half(dtype):
            # Over the root of epsilon, what is far from keys with no spread is beyond float16.
            within = ops.clip(x, -MOST_IN_HALF, MOST_IN_HALF)
            x = ops.where(ops.isfinite(x), within, x)
        return cast(x, dtype)

    return queries.with_x(narrow(queries.x)), examples.with_keys(narrow)


class _Convolution(Transform):
    """What `Conv1D` and `Conv2D` share."""

    is_pointwise = False

    #: The number of axes of the kernel.
    rank = None

    #: The number of positions that are not convolved.
    class_tokens = 0

    def build(self, add_weight, num_heads, depth):
        size = self.kernel_size
        identity = np.zeros((size,) * self.rank + (num_heads, depth), "float32")
        identity[(size // 2,) * self.rank] = 1.0

        def centred_delta(shape, dtype=None):
            return ops.convert_to_tensor(identity, dtype=dtype)

        kernel = add_weight(
            name="kernel", shape=identity.shape, initializer=centred_delta, autocast=False
        )
        return {"kernel": kernel}

    def apply(self, x, statistics, weights):
        return self._convolve(x, weights["kernel"])

    def multiply_adds(self, num_queries, examples, depth):
        taps, num_examples = self.kernel_size**self.rank, examples.key.shape[1]
        if examples.looks_back_only:
            taps = taps // 2 + 1
        products = (num_queries + num_examples - 2 * self.class_tokens) * taps
        if examples.own is not None:
            products += num_examples * (taps - 1) + num_queries
        return products * depth

    def __call__(self, queries, examples, weights, shift_invariant):
        kernel, dtype = weights["kernel"], queries.x.dtype
        looks_back = examples.looks_back_only
        taps = {"taps": convolution.past_or_present} if looks_back else {}
        x = self._convolve(queries.x, kernel, queries.grid, **taps)
        key = self._convolve(examples.key, kernel, examples.grid, **taps)
        own = examples.own
        if own is not None:
            before = self._convolve(examples.key, kernel, taps=convolution.past)
            before = take_along_time(before, ops.minimum(examples.limit, ops.shape(key)[1] - 1))
            centre = ops.cast(kernel[self.kernel_size // 2], before.dtype)
            own = replace(own, key=centre * widen(own.key) + before)
        return queries.with_x(cast(x, dtype)), replace(examples, key=key, own=own)


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
@dataclasses.dataclass(frozen=True)
class Conv1D(_Convolution):
    r"""A depthwise convolution along the sequence, the transform of Attention-Conv1D.

    \[ T(x)_i = \sum_{o=-r}^{r} w_o \odot x_{i+o}, \qquad 2r + 1 = \text{kernel size} \]

    One weight for each tap, head and feature, the same for queries and keys; zeros
    lie beyond the ends. A fresh kernel is the identity, so a fresh layer equals one
    without this transform. With `ScaledHeads` the keys are the pooled ones.

    Masking: padded positions read as zero. Causal use: taps that look ahead are
    dropped, for every key alike.

    Cost: kernel size times the length.

    Args:
        kernel_size: positive odd integer.

    Raises:
        ValueError: if `kernel_size` is not a positive odd integer.

    Example:

    ```python
    from keras_pdattn import Primal, transforms

    Primal(transform=transforms.Conv1D(kernel_size=3))
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), convolutional attention.
    """

    kernel_size: int = 3

    rank = 1

    def __post_init__(self):
        validation.positive_odd_int("kernel_size", self.kernel_size)

    @property
    def look_back(self):
        return self.kernel_size // 2

    def _convolve(self, x, kernel, grid=None, **taps):
        return convolution.depthwise(x, kernel, **taps)


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
@dataclasses.dataclass(frozen=True)
class Conv2D(_Convolution):
    r"""A depthwise convolution over a grid, the transform of Attention-Conv2D.

    \[ T(x)_{i,j} = \sum_{o=-r}^{r} \sum_{p=-r}^{r} w_{o,p} \odot x_{i+o,\,j+p} \]

    One weight for each tap, head and feature, the same for queries and keys; zeros
    lie beyond the edges. A fresh kernel is the identity. The grid is that of the
    layer's inputs, `(batch, height, width, channels)`, or `grid` where these are
    flattened, behind `class_tokens` that are passed on as they are.

    Masking: padded positions read as zero. Causal use: taps that come later in
    raster order are dropped, for every key alike.

    Cost: kernel size squared times the length.

    Args:
        kernel_size: positive odd integer, along both axes.
        grid: pair of positive integers, rows and columns of a flattened grid; or
            `None` for inputs with two axes to attend over.
        class_tokens: the number of positions in front of a flattened grid.

    Raises:
        ValueError: if `kernel_size` is not a positive odd integer, `grid` no pair
            of positive integers, or `class_tokens` negative or without `grid`; if
            inputs have no such grid.

    Example:

    ```python
    from keras_pdattn import Primal, transforms

    Primal(transform=transforms.Conv2D(kernel_size=3, grid=(14, 14), class_tokens=1))
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), convolutional attention.
    """

    kernel_size: int = 3
    grid: tuple = None
    class_tokens: int = 0

    rank = 2

    def __post_init__(self):
        validation.positive_odd_int("kernel_size", self.kernel_size)
        validation.natural("class_tokens", self.class_tokens)
        if self.grid is None:
            if self.class_tokens:
                raise ValueError(
                    "`class_tokens` come before a flattened grid, which `grid` describes. "
                    f"Received: class_tokens={self.class_tokens}, grid=None"
                )
            return
        if not isinstance(self.grid, (tuple, list)) or len(self.grid) != 2:
            raise ValueError(
                "`grid` must be a pair of positive integers, rows and columns. "
                f"Received: grid={self.grid!r}"
            )
        grid = tuple(validation.positive_int("grid", size) for size in self.grid)
        object.__setattr__(self, "grid", grid)

    def check_axes(self, num_axes):
        if self.grid is None and num_axes != 2:
            raise ValueError(
                "Conv2D without `grid` takes its grid from inputs with two axes to attend over, "
                "such as (batch, height, width, channels). For a flattened grid give "
                f"`grid=(height, width)`. Received: grid=None with {num_axes} attended axes"
            )
        if self.grid is not None and num_axes != 1:
            raise ValueError(
                "`grid` describes a flattened grid; inputs with several axes to attend over have "
                f"their own. Received: grid={self.grid} with {num_axes} attended axes"
            )

    def _convolve(self, x, kernel, grid=None, **taps):
        if self.grid is None:
            return convolution.depthwise(x, kernel, grid, **taps)
        tokens, length = self.class_tokens, x.shape[1]
        expected = tokens + self.grid[0] * self.grid[1]
        if isinstance(length, int) and length != expected:
            raise ValueError(
                f"Queries and keys must have the {expected} positions of {tokens} class tokens and "
                f"a grid of {self.grid}. Received: a length of {length}"
            )
        convolved = convolution.depthwise(x[:, tokens:], kernel, self.grid, **taps)
        return ops.concatenate([widen(x[:, :tokens]), convolved], axis=1) if tokens else convolved


_registry = descriptions.Registry(
    "transform", Transform, {"batch_norm": BatchNorm(), "conv1d": Conv1D(), "conv2d": Conv2D()}
)


def get(identifier):
    """Returns the transform that a name, config dict, class or instance stands for.

    Args:
        identifier: `"batch_norm"`, `"conv1d"`, `"conv2d"`, the registered name of a
            class, a config dict, a `Transform` or a subclass of it.

    Raises:
        ValueError: if it stands for none; lists the names.
    """
    return _registry.get(identifier)


def serialize(transform):
    """Returns the config dict of a transform; see `get`."""
    return descriptions.serialize(transform)
