"""Feature maps: the choice of Φ, or of the kernel κ(x, y) = Φ(x)ᵀΦ(y)."""

import dataclasses
import functools

import keras
import numpy as np
from keras import ops

from keras_pdattn import descriptions, validation
from keras_pdattn.ops import fused, kernels, native, states
from keras_pdattn.ops.dtypes import widen
from keras_pdattn.ops.dual import dual_attention
from keras_pdattn.ops.indexing import append_axes
from keras_pdattn.ops.windows import banded_attention


class FeatureMap(descriptions.WeightedMember):
    r"""A feature map \(\Phi\), non-negative and finite unless a subclass says otherwise.

    A subclass gives `features`; attention, its normaliser
    \(h(x) = \sum_j \Phi(x)^\top \Phi(k_j)\), masks, causal use and scores follow
    from that. It works by name or in a file once it is registered with Keras.

    With finite features the layer has two forms that give the same numbers, and
    takes the one with fewer multiplications. The dual form weighs values by
    kernels, as softmax attention does. The primal form keeps the weight matrix
    \(W = \sum_j v_j \Phi(k_j)^\top\) of a head as a state, causally one for each
    chunk of keys. Sums are in float32 or wider. A query whose kernels, factors
    that cancel left out, add up to less than \(2^{-90}\) outputs zero, as if it saw nothing.

    Masking: after the feature map, on the kernel. Causal use: yes. Dropout: on the
    output, as the primal form has no weights to drop.

    Cost: (queries + keys) times features times value depth; with attention masks,
    scores or windows that of their entries, as wide as the features.

    Example:

    ```python
    import keras
    from keras import ops
    from keras_pdattn import Primal
    from keras_pdattn.feature_maps import FeatureMap

    @keras.saving.register_keras_serializable(package="my_package")
    class Squares(FeatureMap):
        def features(self, x, weights):
            return ops.square(x)

    Primal(feature_map=Squares())
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """

    #: Whether adding one constant to all products of a query changes nothing.
    shift_invariant = False

    #: Whether there are `features` to work with.
    is_finite = True

    #: Whether `attend_to_groups` may be faster here than `attend` for each group of heads.
    attends_to_groups = False

    def features(self, x, weights):
        r"""Returns \(\Phi(x)\).

        Args:
            x: tensor of shape `(batch, time, heads, depth)`, float32 or wider.
            weights: what `build` returned, for these heads.

        Returns:
            Non-negative tensor of shape `(batch, time, heads, features)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `features`.")

    def query_features(self, x, weights):
        r"""Returns \(\Phi(x)\) times any positive factor of each query, since that cancels.

        For features whose largest may be beyond the range of floats.
        """
        return self.features(x, weights)

    def key_features(self, x, weights):
        r"""Returns \(\Phi(x) = e^c \phi\) as the pair \(\phi, c\).

        The logarithm \(c\), of shape `(batch, time, heads)`, is what features of a
        key are too large or small by for floats; `None` if that is nothing.
        """
        return self.features(x, weights), None

    def log_kernel(self, x, y, weights):
        r"""Returns \(\log \kappa(x, y)\), which itself may be beyond the range of floats.

        Args:
            x: tensor of shape `(batch, queries, heads, depth)`, float32 or wider.
            y: tensor of shape `(batch, examples, heads, depth)`, likewise.
            weights: what `build` returned, for these heads.

        Returns:
            Tensor of shape `(batch, heads, queries, examples)`.
        """
        (phi_x, scale_x), (phi_y, scale_y) = (self.key_features(z, weights) for z in (x, y))
        log_kernel = ops.log(ops.einsum("bthf,bmhf->bhtm", phi_x, phi_y))
        if scale_x is None:
            return log_kernel
        scale_x, scale_y = (ops.transpose(scale, (0, 2, 1)) for scale in (scale_x, scale_y))
        return log_kernel + append_axes(scale_x, 1) + ops.expand_dims(scale_y, axis=2)

    def dual_query(self, x, weights):
        """Vectors whose products with `dual_key` are what `weigh` takes.

        For a kernel that has a shorter way than the product of features.
        """
        return self.query_features(x, weights)

    def dual_key(self, x, weights):
        """Vectors for keys and their logarithms; see `dual_query` and `key_features`."""
        return self.key_features(x, weights)

    def weigh(self, parts):
        """The kernel of what each query sees, from products of `dual_query` and `dual_key`.

        Args:
            parts: for each part of the examples `(products, log_scale, visible)`: a tensor
                `(..., queries, examples)`, the logarithms of factors of the examples,
                broadcastable to that, or `None`, and a boolean likewise.

        Returns:
            A list of the kernels of each part, zero where `visible` is False, and their
            sum over all examples; both may be off by one positive factor for each query.
            A sum of `None` is one.
        """
        return kernels.masked_kernel(parts)

    def attend(self, query, examples, weights, dropout, return_weights, flash_attention, form):
        """Values weighted by the kernel, normalised over what each query sees.

        Args:
            query: transformed queries, `(batch, queries, heads, depth)`.
            examples: `ops.examples.Examples` with transformed keys.
            weights: what `build` returned, for these heads.
            dropout: `ops.dropout.Dropout`, or `None`.
            return_weights: whether the weights are wanted.
            flash_attention: as in `keras.ops.dot_product_attention`.
            form: as in `ops.attention`.

        Returns:
            `(output, weights, own_weights)`; weights are `None` where they are
            not wanted and were not needed.
        """
        if flash_attention or form == "fused":
            raise ValueError(
                "`flash_attention=True` and `form='fused'` need the softmax feature map. "
                f"Received: feature_map={self!r}, flash_attention={flash_attention}, form={form!r}"
            )
        query = native.heads_apart(widen(query))
        uses_primal_form = form is None and self.uses_primal_form(
            query, examples, weights, return_weights
        )
        if not (uses_primal_form and self.sums_come_first(query, examples, weights)):
            examples = examples.projected().with_keys(native.heads_apart)
        examples = examples.with_keys(widen)
        if uses_primal_form:
            query = self.query_features(query, weights)
            examples = examples.with_scaled_keys(lambda key: self.key_features(key, weights))
            result = states.primal_attention(query, examples), None, None
        else:
            query = self.dual_query(query, weights)
            examples = examples.with_scaled_keys(lambda key: self.dual_key(key, weights))
            result = dual_attention(query, examples, self.weigh, None, return_weights, form)
        output, *attention_weights = result
        return output if dropout is None else dropout(output), *attention_weights

    def uses_primal_form(self, query, examples, weights, return_weights):
        """Whether `attend` works with states, and not with the kernel of all pairs."""
        restrictions = examples.visible, examples.window, examples.query_start
        is_restricted = any(one is not None for one in restrictions)
        if return_weights or is_restricted or not self.is_finite:
            return False
        widths = self.widths(query, weights)
        lengths = query.shape[1], examples.key.shape[1]
        sizes = (*lengths, *widths, examples.value_depth)
        return states.is_cheaper(*sizes, examples.is_causal, examples.stride)

    def sums_come_first(self, query, examples, weights):
        """Whether the state is better made of inputs, and projected, than of projected values."""
        if examples.projections is None:
            return False
        num_features, _ = self.widths(query, weights)
        sizes = examples.value.shape[-1], examples.value_depth
        return states.sums_come_first(examples.key.shape[1], num_features, *sizes)

    @property
    def has_states(self):
        """Whether `attend` may work with states, as above."""
        # An `attend` of a subclass may do otherwise.
        return self.is_finite and type(self).attend is FeatureMap.attend

    def widths(self, x, weights):
        """How wide the features of `x` are, and the vectors for the dual form.

        Found out on one position; a subclass may know.
        """
        return [
            function(x[:, :1], weights).shape[-1]
            for function in (self.query_features, self.dual_query)
        ]


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
@dataclasses.dataclass(frozen=True)
class Softmax(FeatureMap):
    r"""The kernel of softmax attention, whose feature map has no end.

    \[ \kappa(x, y) = \exp\left(x^\top y / \sqrt{D}\right) \]

    \(\Phi\) holds the scaled monomials of the Taylor series of exp, so the layer
    works in the dual form: with the fused kernel of the backend where there is one and
    scores, dropout or (but on PyTorch) a masked causal scaled head do not need the weights
    themselves; else in blocks of queries, so that memory grows with the keys and not with
    the pairs.

    Masking: any. Causal use: yes.

    Cost: queries times keys products of depth \(D\).

    Example:

    ```python
    from keras_pdattn import Primal, feature_maps

    Primal(feature_map=feature_maps.Softmax()) == Primal("softmax")  # True
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), softmax attention as support
        vector regression.
    """

    shift_invariant = True
    is_finite = False

    def log_kernel(self, x, y, weights):
        return ops.einsum("bthd,bmhd->bhtm", x, y) * x.shape[-1] ** -0.5

    def weigh(self, parts):
        return kernels.masked_softmax(parts)

    def attend(self, query, examples, weights, dropout, return_weights, flash_attention, form):
        scale = query.shape[-1] ** -0.5
        can_fuse = not return_weights and dropout is None and fused.can_fuse(examples)
        insists = flash_attention or form == "fused"
        if insists and not (can_fuse and examples.own is None):
            raise ValueError(
                "`flash_attention=True` and `form='fused'` can't be kept: dropout, attention "
                "scores, float64 and, on JAX, values of another depth than keys need the attention "
                "weights themselves, and causal scaled heads more than a kernel. "
                f"Received: flash_attention={flash_attention}, form={form!r}"
            )
        if insists or (form is None and can_fuse and fused.is_fastest(query, examples)):
            attend = functools.partial(
                fused.fused_softmax_attention, scale=scale, flash_attention=flash_attention
            )
            if not insists and examples.has_bands():
                return banded_attention(query, examples, attend), None, None
            return attend(query, examples), None, None
        query = widen(query) * scale
        return dual_attention(query, examples, self.weigh, dropout, return_weights, form)

    @property
    def attends_to_groups(self):
        # An `attend` of a subclass may do otherwise.
        return type(self).attend is Softmax.attend and fused.has_kernel_for_groups()

    def attend_to_groups(self, queries, examples):
        """The outputs of groups of heads, each with examples of its own, by one kernel.

        Args:
            queries: list of tensors `(batch, queries, heads, depth)`.
            examples: list of `ops.examples.Examples`, transformed.

        Returns:
            List of tensors `(batch, queries, heads, value_depth)`, or `None` where no kernel
            takes these together.
        """
        scale = queries[0].shape[-1] ** -0.5
        return fused.fused_attention_of_groups(queries, examples, scale)


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
@dataclasses.dataclass(frozen=True)
class Elu(FeatureMap):
    r"""The feature map of linear attention.

    \[ \Phi(x) = \operatorname{elu}(x) + 1 \]

    As many features as the depth, all positive. Keys with no number above -62
    may count as nothing; see `FeatureMap`.

    Masking: any. Causal use: yes, by chunks with a carried state.

    Cost: linear in the length, times the depth squared; see `FeatureMap`.

    Example:

    ```python
    from keras_pdattn import Primal, feature_maps

    Primal(feature_map=feature_maps.Elu()) == Primal("elu")  # True
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), linear attention; the map is that of
        Katharopoulos et al., "Transformers are RNNs", ICML 2020.
    """

    def widths(self, x, weights):
        return 2 * [x.shape[-1]]

    def features(self, x, weights):
        return native.exp_below_zero(x)

    def query_features(self, x, weights):
        # Of negative numbers alone the largest is taken off, lest nothing is left of any.
        largest = native.largest(ops.stop_gradient(x), axis=-1, keepdims=True)
        return self.features(x - native.at_most(largest, 0), weights)


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
@dataclasses.dataclass(frozen=True)
class Relu(FeatureMap):
    r"""Rectified features.

    \[ \Phi(x) = \max(x, 0) \]

    As many features as the depth. A query whose kernel with all keys is zero sees
    nothing, and outputs zero.

    Masking: any. Causal use: yes, by chunks with a carried state.

    Cost: linear in the length, times the depth squared; see `FeatureMap`.

    Example:

    ```python
    from keras_pdattn import Primal, feature_maps

    Primal(feature_map=feature_maps.Relu()) == Primal("relu")  # True
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), linear attention.
    """

    def widths(self, x, weights):
        return 2 * [x.shape[-1]]

    def features(self, x, weights):
        return ops.relu(x)


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
@dataclasses.dataclass(frozen=True)
class Taylor(FeatureMap):
    r"""The exp kernel to second order.

    \[ \kappa(x, y) = 1 + z + \tfrac12 z^2, \quad z = \frac{x^\top y}{\sqrt D},
       \qquad \Phi(x) = \left(1,\; \hat x,\; \tfrac{1}{\sqrt2}\hat x_i \hat x_j\right),
       \quad \hat x = x / D^{1/4} \]

    \(1 + D + D(D+1)/2\) features, as those of \(i < j\) and \(j < i\) are one
    and weigh double. The kernel is at least one half.

    Masking: any. Causal use: yes, by chunks with a carried state.

    Cost: linear in the length, times the depth cubed; short sequences take the
    dual form, which is that of softmax attention; see `FeatureMap`.

    Example:

    ```python
    from keras_pdattn import Primal, feature_maps

    Primal(feature_map=feature_maps.Taylor()) == Primal("taylor")  # True
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781): the monomials of the exp kernel's
        feature map, cut off after the second degree.
    """

    def widths(self, x, weights):
        depth = x.shape[-1]
        return [1 + depth + depth * (depth + 1) // 2, depth]

    def features(self, x, weights):
        x, depth = x * x.shape[-1] ** -0.25, x.shape[-1]
        rows, columns = np.triu_indices(depth)
        factor = np.where(rows == columns, 0.5**0.5, 1.0)
        products = ops.take(x, rows.astype("int32"), axis=-1) * ops.take(
            x, columns.astype("int32"), axis=-1
        )
        factor = ops.convert_to_tensor(factor, dtype=x.dtype)
        return ops.concatenate([ops.ones_like(x[..., :1]), x, factor * products], axis=-1)

    def dual_query(self, x, weights):
        return x * x.shape[-1] ** -0.25

    def dual_key(self, x, weights):
        return self.dual_query(x, weights), None

    def weigh(self, parts):
        def kernel(products, *rest):
            return 1.0 + products + 0.5 * ops.square(products), *rest

        return super().weigh([kernel(*part) for part in parts])


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
@dataclasses.dataclass(frozen=True)
class PositiveRandom(FeatureMap):
    r"""Positive orthogonal random features, which stand for the exp kernel.

    \[ \Phi(x) = \frac{1}{\sqrt m}\left(e^{\omega_f^\top \hat x
       - \|\hat x\|^2/2}\right)_{f=1}^{m}, \qquad \hat x = x / D^{1/4} \]

    with Gaussian \(\omega_f\), orthogonal within each block of \(D\). The
    expectation of \(\Phi(x)^\top\Phi(y)\) is \(\exp(x^\top y/\sqrt D)\). Each
    head draws its own, from the seed; the draw is a weight of the layer, not
    trained, saved with it, and drawn anew by the layer's `redraw`. What exponents
    are too large or small by is kept apart, and cancels in the normalisation. A query
    of numbers of 20 and more may share no feature with any key; see `FeatureMap`.

    Masking: any. Causal use: yes, by chunks with a carried state.

    Cost: linear in the length, times features times value depth; see
    `FeatureMap`.

    Args:
        num_features: positive integer, \(m\).
        seed: non-negative integer.

    Raises:
        ValueError: if `num_features` is not a positive integer, or `seed` not a
            non-negative one.

    Example:

    ```python
    from keras_pdattn import Primal, feature_maps

    Primal(feature_map=feature_maps.PositiveRandom(num_features=256, seed=1))
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), linear attention; the features are
        those of Choromanski et al., "Rethinking Attention with Performers", ICLR 2021.
    """

    num_features: int = 128
    seed: int = 0

    def __post_init__(self):
        validation.positive_int("num_features", self.num_features)
        validation.natural("seed", self.seed)

    def build(self, add_weight, num_heads, depth):
        omega = add_weight(
            name="omega",
            shape=(self.num_features, num_heads, depth),
            initializer=lambda shape, dtype=None: ops.convert_to_tensor(
                self.draw(num_heads, depth, self.seed), dtype=dtype
            ),
            trainable=False,
            autocast=False,
        )
        return {"omega": omega}

    def multiply_adds(self, num_queries, examples, depth):
        num_own = 0 if examples.own is None else num_queries
        return (num_queries + examples.key.shape[1] + num_own) * self.num_features * depth

    def redraw(self, weights, seed):
        """Draws the weights of a layer anew."""
        _, num_heads, depth = weights["omega"].shape
        weights["omega"].assign(self.draw(num_heads, depth, seed))

    def draw(self, num_heads, depth, seed):
        """Returns orthogonal Gaussian vectors, an array `(num_features, num_heads, depth)`."""
        rng = np.random.default_rng(seed)
        num_blocks = -(-self.num_features // depth)
        gaussian = rng.normal(size=(num_heads, num_blocks, depth, depth))
        directions, triangular = np.linalg.qr(gaussian)
        # With the signs of the diagonal, directions are uniform.
        signs = np.sign(np.diagonal(triangular, axis1=-2, axis2=-1))
        directions = np.swapaxes(directions * signs[..., np.newaxis, :], -1, -2)
        lengths = np.linalg.norm(rng.normal(size=gaussian.shape), axis=-1, keepdims=True)
        omega = (directions * lengths).reshape(num_heads, num_blocks * depth, depth)
        return np.swapaxes(omega[:, : self.num_features], 0, 1).astype("float32")

    def widths(self, x, weights):
        return 2 * [self.num_features]

    def features(self, x, weights):
        phi, log_scale = self.key_features(x, weights)
        return phi * append_axes(ops.exp(log_scale), 1)

    def query_features(self, x, weights):
        phi, _ = self.key_features(x, weights)
        return phi

    def key_features(self, x, weights):
        x = x * x.shape[-1] ** -0.25
        omega = ops.cast(weights["omega"], x.dtype)
        exponent = ops.einsum("bthd,mhd->bthm", x, omega)
        exponent = exponent - 0.5 * ops.sum(ops.square(x), axis=-1, keepdims=True)
        largest = ops.stop_gradient(native.largest(exponent, axis=-1))
        phi = ops.exp(exponent - append_axes(largest, 1)) * self.num_features**-0.5
        return phi, largest


_registry = descriptions.Registry(
    "feature map",
    FeatureMap,
    {
        "softmax": Softmax(),
        "elu": Elu(),
        "relu": Relu(),
        "taylor": Taylor(),
        "positive_random": PositiveRandom(),
    },
)


def get(identifier):
    """Returns the feature map that a name, config dict, class or instance stands for.

    Args:
        identifier: `"softmax"`, `"elu"`, `"relu"`, `"taylor"`, `"positive_random"`, the
            registered name of a class, a config dict, a `FeatureMap` or a subclass
            of it.

    Raises:
        ValueError: if it stands for none; lists the names.
    """
    return _registry.get(identifier)


def serialize(feature_map):
    """Returns the config dict of a feature map; see `get`."""
    return descriptions.serialize(feature_map)
