"""The attention scores of a model."""

import collections

import keras
import numpy as np

from keras_pdattn.analysis.calls import attention_calls


def attention_scores(model, inputs, training=False):
    r"""Runs a model once and returns the scores of all its attention layers.

    The scores of a layer are the weights \(p_{hij}\) with which head \(h\) sums
    values, \(h_i = \sum_j p_{hij} v_j\). For our layers

    \[ p_{hij} = \frac{\Phi(T(q_i))^\top \Phi(T(k_j))}
       {\sum_{l \in S_i} \Phi(T(q_i))^\top \Phi(T(k_l))} \]

    with the feature map, transform and training set of the head. Layers of
    Keras are read too: `MultiHeadAttention` with its subclasses,
    `GroupQueryAttention`, and `Attention` and `AdditiveAttention`, which count
    as one head. They may be anywhere: in nested or subclassed models, in other
    layers, and be called more than once.

    The model is run eagerly and left as it was: its attributes, weights, moving
    statistics, seeds and compiled state. Only the losses that `add_loss` left
    behind go, as with any call. A model that is not built yet is built first.

    Masking: masks that Keras attaches act as in any call. With ours, queries
    that see nothing have rows of zeros.

    Cost: one call that computes all scores, queries times keys for each head,
    sequence and layer, which are all kept.

    Args:
        model: a `keras.Model`, an attention layer, or any layer with some inside.
        inputs: what to call it on. A layer that is not a `keras.Model` takes the
            items of a tuple as its arguments, those of a dict as its keywords.
        training: whether to run it as in training. Scores are those before
            dropout, but for Keras's `Attention` and `AdditiveAttention`.

    Returns:
        Dict from the path of each layer to its scores, a float array of shape
        `(batch, heads, queries, keys)`, in the order of the calls. The second
        call under a path has the key `f"{path}#2"`, and so on. Over several
        attended axes there are several axes of queries and of keys; axes that
        are not attended follow the batch.

    Raises:
        ValueError: if `model` is not a layer or holds no attention layer; if
            `inputs` are symbolic or not the arguments of the layer; if a layer uses
            flash attention or has no `return_attention_scores`, and so can't return
            scores.

    Example:

    ```python
    import keras
    import numpy as np
    from keras_pdattn import analysis, layers

    inputs = keras.Input((10, 32))
    x = layers.BatchNormAttention(num_heads=4, key_dim=8, name="first")(inputs, inputs)
    x = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="second")(x, x)
    model = keras.Model(inputs, x)
    scores = analysis.attention_scores(model, np.ones((3, 10, 32)))
    scores["first"].shape  # (3, 4, 10, 10)
    scores["second"].shape  # (3, 2, 10, 10)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """
    scores, counts = {}, collections.Counter()
    for call in attention_calls(model, inputs, training):
        path = call.layer.path
        counts[path] += 1
        name = path if counts[path] == 1 else f"{path}#{counts[path]}"
        is_one_head = isinstance(call.layer, keras.layers.Attention)
        scores[name] = np.expand_dims(call.scores, axis=-3) if is_one_head else call.scores
    return scores
