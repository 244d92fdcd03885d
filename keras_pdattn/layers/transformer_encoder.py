"""The encoder block of a transformer, with any primal problem."""

import keras

from keras_pdattn import descriptions
from keras_pdattn.layers.masking import detached_masks, get_keras_mask
from keras_pdattn.layers.transformer_block import TransformerBlock, as_tuple


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class TransformerEncoder(TransformerBlock):
    r"""Self-attention defined by a primal problem, and a feed-forward network.

    \[ y = \operatorname{norm}(x + A(x)), \qquad
       z = \operatorname{norm}(y + W_2\, \sigma(W_1 y + b_1) + b_2) \]

    with the attention \(A\) of `primal`; with `normalize_first` the norms act on what
    goes into \(A\) and the network instead. It has the arguments, call arguments, sublayers
    and weights of `keras_hub.layers.TransformerEncoder`, and with `primal="softmax"` its
    numbers; weights go from one to the other by `set_weights`.

    Masking: a token that `padding_mask` (or the mask that Keras attaches to `inputs`)
    leaves out is in no training set; its own output is computed, and means nothing.
    `attention_mask` restricts what each token sums over. The output carries the mask
    of `inputs`.

    Causal use: none; see `TransformerDecoder`.

    Cost: that of `primal`, and of projections, linear in the length.

    Args:
        intermediate_dim: width of the feed-forward network.
        num_heads: number of heads; each has `width // num_heads` features.
        dropout: share of attention weights and of outputs dropped in training, in [0, 1).
        activation: that of the feed-forward network.
        layer_norm_epsilon: positive float, added to the variance by the norms.
        kernel_initializer: initialiser of kernels.
        bias_initializer: initialiser of biases.
        normalize_first: whether to normalise what goes in and not what comes out.
        primal: a `keras_pdattn.Primal`, its name or its config.
        **kwargs: `name`, `dtype` and `trainable`, as for any layer.

    Call arguments:
        inputs: tensor `(batch, time, width)`.
        padding_mask: boolean `(batch, time)`, False for padding.
        attention_mask: boolean `(batch, time, time)`; True lets a token see another.
        training: whether dropout is active.
        return_attention_scores: whether to return scores too.

    Returns:
        The output, `(batch, time, width)`; with `return_attention_scores` also the scores,
        `(batch, heads, time, time)`.

    Raises:
        ValueError: if an argument is out of its range, there are more heads than
            features, or a mask does not fit.

    Example:

    ```python
    import keras
    import keras_pdattn

    inputs = keras.Input((None, 32))
    block = keras_pdattn.layers.TransformerEncoder(64, num_heads=4, primal="batch_norm")
    model = keras.Model(inputs, block(inputs))
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """

    def build(self, inputs_shape):
        shape = tuple(inputs_shape)
        self._self_attention_layer = self._add_attention(
            "self_attention_layer", self.primal, shape, shape
        )
        self._self_attention_layer_norm = self._add_norm("self_attention_layer_norm", shape)
        self._self_attention_dropout = self._add_dropout("self_attention_dropout")
        self._feedforward_layer_norm = self._add_norm("feedforward_layer_norm", shape)
        self._add_feedforward(shape)
        self._feedforward_dropout = self._add_dropout("feedforward_dropout")

    def call(
        self,
        inputs,
        padding_mask=None,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
    ):
        if padding_mask is None:
            padding_mask = get_keras_mask(inputs)

        def attend(x):
            return as_tuple(
                self._self_attention_layer(
                    x,
                    x,
                    **self._masks(self.primal, padding_mask),
                    attention_mask=attention_mask,
                    return_attention_scores=return_attention_scores,
                    training=training,
                )
            )

        # Sublayers would take the mask for that of queries as well.
        with detached_masks(inputs):
            x, scores = self._residual(
                inputs,
                attend,
                self._self_attention_layer_norm,
                self._self_attention_dropout,
                training,
            )
            x = self._feed_forward(x, training)
        return (x, *scores) if scores else x

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def compute_output_spec(
        self,
        inputs,
        padding_mask=None,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
    ):
        output = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        _, *scores = as_tuple(
            self._self_attention_layer.compute_output_spec(
                output,
                output,
                value_mask=padding_mask,
                attention_mask=attention_mask,
                return_attention_scores=return_attention_scores,
            )
        )
        return (output, *scores) if scores else output
