"""Feature maps: the choice of Φ, or of the kernel κ(x, y) = Φ(x)ᵀΦ(y)."""

import dataclasses

import keras

from keras_pdattn import descriptions
from keras_pdattn.ops import kernels
from keras_pdattn.ops.dtypes import widen


class FeatureMap(descriptions.Description):
    r"""A feature map \(\Phi\), non-negative and finite unless a subclass says otherwise.

    A subclass gives `features`; attention, its normaliser
    \(h(x) = \sum_j \Phi(x)^\top \Phi(k_j)\), masks and scores follow from that. It
    works by name or in a file once it is registered with Keras.

    Masking: after the feature map, on the kernel. Causal use: yes.

    Cost: queries times keys products, as wide as the features.

    Example:

    ```python
    import keras
    from keras import ops
    from keras_pdattn import Primal
    from keras_pdattn.feature_maps import FeatureMap

    @keras.saving.register_keras_serializable(package="my_package")
    class Squares(FeatureMap):
        def features(self, x):
            return ops.square(x)

    Primal(feature_map=Squares())
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """

    #: Whether adding one constant to all products of a query changes nothing.
    shift_invariant = False

    def features(self, x):
        r"""Returns \(\Phi(x)\).

        Args:
            x: tensor of shape `(batch, time, heads, depth)`, float32 or wider.

        Returns:
            Non-negative tensor of shape `(batch, time, heads, features)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `features`.")

    def attend(self, query, examples, dropout, return_weights, flash_attention):
        """Values weighted by the kernel, normalised over what each query sees.

        Args:
            query: transformed queries, `(batch, queries, heads, depth)`.
            examples: `ops.examples.Examples` with transformed keys.
            dropout: function for the weights, or `None`.
            return_weights: whether the weights are wanted.
            flash_attention: as in `keras.ops.dot_product_attention`.

        Returns:
            `(output, weights, own_weights)`; weights are `None` where they are
            not wanted and were not needed.
        """
        if flash_attention:
            raise ValueError(
                "`flash_attention=True` needs the softmax feature map. "
                f"Received: feature_map={self!r}"
            )
        examples = examples.with_keys(lambda key: self.features(widen(key)))
        query = self.features(widen(query))
        return kernels.dual_attention(query, examples, kernels.masked_share, dropout)


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
@dataclasses.dataclass(frozen=True)
class Softmax(FeatureMap):
    r"""The kernel of softmax attention, whose feature map has no end.

    \[ \kappa(x, y) = \exp\left(x^\top y / \sqrt{D}\right) \]

    \(\Phi\) holds the scaled monomials of the Taylor series of exp, so the layer
    works in the dual form: with the fused kernel of the backend unless scores,
    dropout or a causal scaled head need the weights themselves.

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

    def attend(self, query, examples, dropout, return_weights, flash_attention):
        scale = query.shape[-1] ** -0.5
        needs_weights = return_weights or dropout is not None or examples.own is not None
        if not needs_weights and kernels.has_fused_softmax(examples.key, examples.value):
            output = kernels.fused_softmax_attention(query, examples, scale, flash_attention)
            return output, None, None
        if flash_attention:
            raise ValueError(
                "`flash_attention=True` can't be kept: dropout, attention scores, causal scaled "
                "heads and, on JAX, values of another depth than keys need the attention weights "
                f"themselves. Received: flash_attention={flash_attention}"
            )
        query = widen(query) * scale
        return kernels.dual_attention(query, examples, kernels.masked_softmax, dropout)


_registry = descriptions.Registry("feature map", FeatureMap, {"softmax": Softmax()})


def get(identifier):
    """Returns the feature map that a name, config dict, class or instance stands for.

    Args:
        identifier: `"softmax"`, the registered name of a class, a config dict,
            a `FeatureMap` or a subclass of it.

    Raises:
        ValueError: if it stands for none; lists the names.
    """
    return _registry.get(identifier)


def serialize(feature_map):
    """Returns the config dict of a feature map; see `get`."""
    return descriptions.serialize(feature_map)
