"""Attention as the support vector expansion of a primal problem (theory: equation 2)."""

import dataclasses
import functools

from keras import ops

from keras_pdattn import validation
from keras_pdattn.ops import masks
from keras_pdattn.ops.examples import Examples
from keras_pdattn.ops.kernels import in_output_layout


def attention(
    query,
    key,
    value,
    primal,
    mask=None,
    key_mask=None,
    is_causal=False,
    query_mask=None,
    sliding_window=None,
    weights=None,
    dropout=None,
    return_scores=False,
    flash_attention=None,
):
    r"""Solves a primal problem for queries, given keys and values.

    For each head, with the training set \(S_i\) of query \(i\), the feature map
    \(\Phi\) and the transform \(T\) that `primal` names:

    \[ o_i = \sum_{j \in S_i} \frac{\kappa(T(q_i), T(k_j))}{h_i} v_j, \qquad
       \kappa(x, y) = \Phi(x)^\top \Phi(y), \qquad
       h_i = \sum_{j \in S_i} \kappa(T(q_i), T(k_j)) \]

    A key that `key_mask` leaves out is in no training set: not in the
    statistics of a transform, not in the mean of a window. A causal query is
    fitted on the keys up to its own position, so that its output is that of
    the last query of a non-causal call on the prefix. `mask` and
    `sliding_window` restrict the sum of each query, and no statistics. A query
    that sees nothing gets zero, with zero gradient.

    Args:
        query: tensor of shape `(batch, queries, heads, depth)`.
        key: tensor of shape `(batch, keys, heads, depth)`.
        value: tensor of shape `(batch, keys, heads, value_depth)`.
        primal: a `Primal`, its name or its config.
        mask: boolean, or integer 0 and 1, broadcastable to
            `(batch, heads, queries, keys)`; True lets a query see a key.
        key_mask: the same, of shape `(batch, keys)`; False marks padding.
        is_causal: whether query `i` sees keys `0` to `i` only (counted from
            the start of both, also where there are more of one than the other).
        query_mask: as `key_mask`, of shape `(batch, queries)`; a query marked
            False sees nothing.
        sliding_window: positive integer, or `None`; query `i` sees key `j` only
            where `|i - j| < sliding_window`.
        weights: list with a dict of tensors for each transform of `primal`, as
            `Transform.build` returns them, or `None` for their initial values.
        dropout: function that is applied to the attention weights, or `None`.
        return_scores: whether to return the weights of the keys too.
        flash_attention: as in `keras.ops.dot_product_attention`.

    Returns:
        The output, `(batch, queries, heads, value_depth)`, in the dtype of
        `value`; if `return_scores`, also the scores
        `(batch, heads, queries, keys)`. Each row of them sums to 1 (0 where a
        query sees nothing), and scores times values is the output.

    Raises:
        ValueError: if shapes do not fit each other, or a mask is neither
            boolean nor made of 0 and 1.

    Cost:
        `queries * keys` products per head; a head of scale `s` has `1 / s` of
        them.

    Example:

    ```python
    import keras
    import keras_pdattn

    x = keras.random.normal((2, 10, 4, 8))
    y = keras_pdattn.ops.attention(x, x, x, "batch_norm", is_causal=True)
    y.shape  # (2, 10, 4, 8)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """
    # Names of primals are resolved one level above the ops.
    from keras_pdattn import primals

    primal = primals.get(primal)
    query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
    masks.check_shapes(query, key, value)
    num_heads, query_length, key_length = query.shape[2], ops.shape(query)[1], ops.shape(key)[1]
    if key.shape[1] == 0:
        return _nothing_to_see(query, value, return_scores)
    groups = primal.training_set.groups(num_heads)
    if query_mask is not None:
        query_mask = masks.padding("query_mask", query_mask, query)
        query = _zero_padding(query, query_mask)
    if key_mask is not None:
        key_mask = masks.padding("key_mask", key_mask, key)
        key, value = _zero_padding(key, key_mask), _zero_padding(value, key_mask)
    if mask is not None:
        target = (query.shape[0], num_heads, query.shape[1], key.shape[1])
        mask = masks.broadcastable("mask", mask, target)
    if sliding_window is not None:
        validation.positive_int("sliding_window", sliding_window)
        mask = masks.intersect(mask, masks.band(query_length, key_length, sliding_window))
    if weights is None:
        shape = (num_heads, key.shape[3])
        weights = [transform.initial_weights(*shape) for transform in primal.transform]

    keys = Examples.keys(key, value, query_length, key_mask, mask, is_causal)
    outputs, scores = [], []
    for heads, training_set in groups:
        examples = training_set.select(_heads(keys, heads), query_length)
        queries, transformed = query[:, :, heads], examples
        for transform, its_weights in zip(primal.transform, weights):
            if transformed.is_folded:
                raise ValueError(
                    "In a causal call, a transform with statistics must be the last. "
                    f"Received: transform={primal.transform}"
                )
            queries, transformed = transform(
                queries, transformed, primal.feature_map, _of_heads(its_weights, heads)
            )
        dtype = queries.dtype
        transformed = transformed.with_keys(functools.partial(ops.cast, dtype=dtype))
        output, group_weights, own_weights = primal.feature_map.attend(
            queries, transformed, dropout, return_scores, flash_attention
        )
        outputs.append(output)
        if return_scores:
            scores.append(examples.spread(group_weights, own_weights))
    output = outputs[0] if len(outputs) == 1 else ops.concatenate(outputs, axis=2)
    if query_mask is not None:
        rows = ops.expand_dims(query_mask, axis=1)
        output = ops.where(in_output_layout(rows), output, ops.zeros_like(output))
    if not return_scores:
        return output
    scores = scores[0] if len(scores) == 1 else ops.concatenate(scores, axis=1)
    if query_mask is not None:
        scores = ops.where(ops.expand_dims(rows, axis=-1), scores, 0.0)
    return output, ops.cast(scores, value.dtype)


def _nothing_to_see(query, value, return_scores):
    """The output, and scores, of queries without a single key."""
    batch, length, num_heads, _ = ops.shape(query)
    output = ops.zeros((batch, length, num_heads, value.shape[3]), dtype=value.dtype)
    scores = ops.zeros((batch, num_heads, length, 0), dtype=value.dtype)
    return (output, scores) if return_scores else output


def _zero_padding(x, mask):
    """Replaces what padded positions of `x` hold, however large, by zero."""
    return ops.where(ops.expand_dims(mask, axis=(2, 3)), x, ops.zeros_like(x))


def _of_heads(weights, heads):
    """The weights of some heads: all but scalars have the layout `(..., heads, depth)`."""
    return {
        name: weight[..., heads, :] if len(weight.shape) > 1 else weight
        for name, weight in weights.items()
    }


def _heads(keys, heads):
    """`Examples` of some of the heads."""
    visible = keys.visible
    if visible is not None and visible.shape[1] != 1:
        visible = visible[:, heads]
    return dataclasses.replace(
        keys, key=keys.key[:, :, heads], value=keys.value[:, :, heads], visible=visible
    )
