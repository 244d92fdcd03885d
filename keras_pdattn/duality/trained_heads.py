"""What a trained attention layer says as a support vector regression."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_pdattn import validation
from keras_pdattn.duality.problem import NoRegressionError, Problem, log_sum, to_float64
from keras_pdattn.layers import input_checks
from keras_pdattn.layers.masking import detached_masks, get_keras_mask
from keras_pdattn.layers.primal_dual_attention import PrimalDualAttention
from keras_pdattn.layers.support_vector_attention import SupportVectorAttention
from keras_pdattn.ops import checks, masks
from keras_pdattn.ops.attention import head_counts
from keras_pdattn.ops.examples import Examples


def dual_coefficients(layer, inputs):
    r"""The dual coefficients of the regressions that a layer's heads have solved.

    A value of a head holds the scaled dual variables of its key, so that

    \[ \alpha_j - \tilde\alpha_j = v_j\, h(T(k_j)), \qquad
       h(x) = \sum_{l \in S} \kappa(x, T(k_l)) \]

    With `ScaledHeads` the examples are windows, and each key carries the coefficient
    of its own. With `SlidingWindow`, whose queries have a regression each, it is that
    of the query at the key's position.

    Masking: padded keys have no coefficient, and are in no normaliser. Causal use and
    attention masks: none, as each query has a training set of its own then.

    Cost: keys squared times the depth, for each head.

    Args:
        layer: a built `PrimalDualAttention`.
        inputs: what it is called on: a tensor `(batch, keys, width)` for
            self-attention, or a dict of its call arguments, of which `value`, `key`,
            `value_mask` and `key_mask` count. Of no account for a
            `SupportVectorAttention`, which has keys of its own.

    Returns:
        Array `(batch, heads, keys, value_dim)`, float64. Numbers are of the size of
        \(\exp(\|k\|^2/\sqrt D)\) for softmax.

    Raises:
        ValueError: if `layer` is not built or no `PrimalDualAttention`, if `inputs` are
            none for it, or if the call is causal or has an attention mask.

    Example:

    ```python
    import keras
    import keras_pdattn

    x = keras.random.normal((2, 10, 32))
    layer = keras_pdattn.layers.BatchNormAttention(num_heads=4, key_dim=8)
    layer(x, x)
    keras_pdattn.duality.dual_coefficients(layer, x).shape  # (2, 4, 10, 8)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), equation 2.
    """
    value, log_normalizer, _ = _values_and_normalizers(layer, inputs)
    return value * np.exp(log_normalizer)[..., np.newaxis]


@dataclasses.dataclass(frozen=True, eq=False)
class SupportVectors:
    """Which keys are support vectors; what `support_vectors` returns.

    Attributes:
        mask: boolean array `(batch, heads, keys)`.
        valid: boolean array `(batch, keys)`, False for padding.
    """

    mask: np.ndarray
    valid: np.ndarray

    @property
    def count(self):
        """The number of support vectors of each head, `(batch, heads)`."""
        return self.mask.sum(axis=-1)

    @property
    def share(self):
        """The same as a share of the keys that are not padding, 0 to 1."""
        return self.count / np.maximum(self.valid.sum(axis=-1, keepdims=True), 1)


def support_vectors(layer, inputs, tolerance=1e-3):
    r"""Finds the keys that a layer's heads rest on.

    Key j is a support vector of a head where its dual coefficients do not vanish
    beside the head's largest:

    \[ \|\alpha_j - \tilde\alpha_j\| > \text{tolerance} \cdot
       \max_l \|\alpha_l - \tilde\alpha_l\| \]

    Compared as logarithms, so that the coefficients of heads with large scores count
    too. Masking, causal use and cost: as `dual_coefficients`.

    Args:
        layer: a built `PrimalDualAttention`.
        inputs: as for `dual_coefficients`.
        tolerance: number in [0, 1).

    Returns:
        `SupportVectors`, with a mask `(batch, heads, keys)`, `count` and `share`.

    Raises:
        ValueError: as `dual_coefficients`; if `tolerance` is out of its range.

    Example:

    ```python
    import keras
    import keras_pdattn

    x = keras.random.normal((2, 10, 32))
    layer = keras_pdattn.layers.PrimalDualAttention(num_heads=4, key_dim=8)
    layer(x, x)
    keras_pdattn.duality.support_vectors(layer, x).mask.shape  # (2, 4, 10)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), equation 2.
    """
    validation.real("tolerance", tolerance, "a number in [0, 1)", lambda x: 0 <= x < 1)
    value, log_normalizer, valid = _values_and_normalizers(layer, inputs)
    with np.errstate(divide="ignore"):
        size = np.log(np.linalg.norm(value, axis=-1)) + log_normalizer
        largest = size.max(axis=-1, keepdims=True)
        mask = size > np.where(np.isneginf(largest), 0.0, largest) + np.log(tolerance)
    return SupportVectors(mask, valid)


def _values_and_normalizers(layer, inputs):
    """Values `(B, H, N, Dv)`, log h `(B, H, N)` and valid keys `(B, N)`, of all heads by key."""
    keys = _keys(layer, inputs)
    batch, length = keys.key.shape[:2]
    values, log_normalizers = [], []
    weights = layer._primal_weights.by_member
    groups = layer.primal.training_set.groups(layer.num_heads)
    parts = zip(groups, keys.split(head_counts(groups)))
    for (heads, training_set), its_keys in parts:
        if layer._sliding_window is not None:
            training_set = _within(layer._sliding_window, training_set)
        problem = Problem.of_heads(layer.primal, training_set, heads, weights, its_keys)
        key = problem.transformed_keys()
        log_kernel = problem.log_kernel(key, key)
        visible = problem.examples.visibility()
        if visible is not None:
            log_kernel = np.where(ops.convert_to_numpy(visible), log_kernel, -np.inf)
        log_normalizers.append(problem.by_key(np.swapaxes(log_sum(log_kernel), 1, 2)))
        values.append(problem.by_key(to_float64(problem.examples.value)))
    valid = np.ones((batch, length), bool)
    if keys.mask is not None:
        valid = ops.convert_to_numpy(keys.mask)
    value, log_normalizer = (np.concatenate(x, axis=2) for x in (values, log_normalizers))
    return np.swapaxes(value, 1, 2), np.swapaxes(log_normalizer, 1, 2), valid


def _within(sliding_window, training_set):
    near = training_set.within(sliding_window)
    if near is None:
        raise NoRegressionError(
            "Where a window cuts pooled keys, each query has a regression of its own. "
            f"Received: sliding_window={sliding_window}, training_set={training_set!r}"
        )
    return near


def _keys(layer, inputs):
    """The projected keys and values that `layer` is fitted on when called on `inputs`."""
    if not isinstance(layer, PrimalDualAttention) or not layer.built:
        raise ValueError(
            "`layer` must be a built PrimalDualAttention, as only a primal problem has dual "
            f"coefficients. Received: layer={layer!r}"
        )
    call = inputs if isinstance(inputs, dict) else {"value": inputs}
    if isinstance(layer, SupportVectorAttention):
        own = (("value", layer.values), ("key", layer.keys))
        call = {name: ops.expand_dims(weight, axis=0) for name, weight in own}
    for name in ("use_causal_mask", "attention_mask"):
        if call.get(name) is not None and call[name] is not False:
            raise NoRegressionError(
                "Where queries see different keys, each has a training set, and a regression, of "
                f"its own. Received: inputs with `{name}`"
            )
    value = call.get("value")
    key = value if call.get("key") is None else call["key"]
    if any(not hasattr(x, "shape") or keras.backend.is_keras_tensor(x) for x in (value, key)):
        raise ValueError(
            "`inputs` must be an array or a tensor, or a dict of call arguments with `value`. "
            f"Received: inputs={inputs!r}"
        )
    attached = {"value": get_keras_mask(value), "key": get_keras_mask(key)}
    value, key = ops.convert_to_tensor(value), ops.convert_to_tensor(key)
    checks.check_tensors(value=value, key=key)
    shapes = {"value": tuple(value.shape), "key": tuple(key.shape)}
    input_checks.check_shapes(query=shapes["value"], **shapes)
    input_checks.check_rank(layer._rank, query=shapes["value"], **shapes)
    input_checks.check_widths(layer._widths, **shapes)
    key_mask = None
    for name, tensor in (("value", value), ("key", key)):
        mask = call.get(f"{name}_mask")
        mask = attached[name] if mask is None else mask
        if mask is not None:
            mask = layer._axes.padding(f"{name}_mask", mask, tensor)
            key_mask = masks.intersect(key_mask, mask)
    with detached_masks(value, key):
        keys, values = layer.key_dense(key), layer.value_dense(value)
    return Examples.keys(
        layer._axes.to_sequence(keys),
        layer._axes.to_sequence(values),
        None,
        mask=key_mask,
        grid=layer._axes.grid(keys),
    )
