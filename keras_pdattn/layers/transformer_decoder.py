"""The decoder block of a transformer, with any primal problem."""

import dataclasses

import keras

from keras_pdattn import descriptions, primals
from keras_pdattn.layers import caches
from keras_pdattn.layers.masking import detached_masks, get_keras_mask
from keras_pdattn.layers.transformer_block import TransformerBlock, as_tuple
from keras_pdattn.training_sets import AllKeys, SlidingWindow


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class TransformerDecoder(caches.KeepsCaches, TransformerBlock):
    r"""Causal self-attention defined by a primal problem, cross-attention if wanted, a network.

    \[ y = \operatorname{norm}(x + A(x)), \qquad
       u = \operatorname{norm}(y + C(y, e)), \qquad
       z = \operatorname{norm}(u + W_2\, \sigma(W_1 u + b_1) + b_2) \]

    with the attention \(A\) of `primal` and, where the block is called on the sequence
    \(e\) of an encoder, the attention \(C\) of `cross_attention_primal` to it; with
    `normalize_first` the norms act on what goes in instead. It has the arguments, call
    arguments, sublayers and weights of `keras_hub.layers.TransformerDecoder`, and with
    `primal="softmax"` its numbers; weights go from one to the other by `set_weights`.

    Masking: a token that a padding mask (or the mask that Keras attaches to a sequence)
    leaves out is in no training set; its own output is computed, and means nothing. An
    attention mask restricts what each token sums over. The output carries the mask of
    `decoder_sequence`.

    Causal use: by default; a token's output is that of the last one of a call on the
    tokens up to it.

    Cost: that of the primal problems, and of projections, linear in the length. With a cache
    a token costs what its queries alone do.

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
        cross_attention_primal: the same for cross-attention. `None` for that of `primal`,
            less what has no meaning between two sequences: windows around a position,
            and transforms that mix neighbouring queries, which would look ahead.
        **kwargs: `name`, `dtype` and `trainable`, as for any layer.

    Call arguments:
        decoder_sequence: tensor `(batch, time, width)`.
        encoder_sequence: tensor `(batch, encoder_time, encoder_width)`, in every call or
            in none.
        decoder_padding_mask: boolean `(batch, time)`, False for padding; with a cache
            `(batch, length)` where tokens before these were padding.
        decoder_attention_mask: boolean `(batch, time, time)`, with a cache
            `(batch, time, length)`; True lets a token see another.
        encoder_padding_mask: boolean `(batch, encoder_time)`, False for padding.
        encoder_attention_mask: boolean `(batch, time, encoder_time)`.
        self_attention_cache: what `init_cache` made or the call before returned, or
            KerasHub's `(batch, 2, length, heads, key_dim)`.
        self_attention_cache_update_index: the position of the first of these tokens.
        cross_attention_cache: `(batch, 2, encoder_time, heads, key_dim)`.
        cross_attention_cache_update_index: 0 to fill that cache, `None` to use it.
        use_causal_mask: whether a token sees itself and those before it only.
        training: whether dropout is active.
        return_attention_scores: whether to return scores too.

    Returns:
        The output, `(batch, time, width)`; with `return_attention_scores` then the scores of
        self-attention and of cross-attention, where there is one; with caches then the cache
        of self-attention and that of cross-attention.

    Raises:
        ValueError: if an argument is out of its range, there are more heads than features,
            a mask does not fit, there is an encoder sequence in one call and none in
            another, or one cache where there should be two.

    Example:

    ```python
    import keras
    import keras_pdattn

    inputs = keras.Input((None, 32))
    block = keras_pdattn.layers.TransformerDecoder(64, num_heads=4, primal="scaled_head")
    model = keras.Model(inputs, block(inputs))
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """

    def __init__(
        self,
        intermediate_dim,
        num_heads,
        dropout=0,
        activation="relu",
        layer_norm_epsilon=1e-05,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        normalize_first=False,
        primal="softmax",
        cross_attention_primal=None,
        **kwargs,
    ):
        # As KerasHub's: a file says what the block was built on.
        shapes = [kwargs.pop(f"{name}_sequence_shape", None) for name in ("decoder", "encoder")]
        super().__init__(
            intermediate_dim,
            num_heads,
            dropout=dropout,
            activation=activation,
            layer_norm_epsilon=layer_norm_epsilon,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            normalize_first=normalize_first,
            primal=primal,
            **kwargs,
        )
        self.cross_attention_primal = (
            between_sequences(self.primal)
            if cross_attention_primal is None
            else primals.get(cross_attention_primal)
        )
        if between_sequences(self.cross_attention_primal) != self.cross_attention_primal:
            raise ValueError(
                "`cross_attention_primal` can have no window around a position, and no transform "
                "that mixes neighbouring queries, of which later ones are not known yet. "
                f"Received: cross_attention_primal={self.cross_attention_primal}"
            )
        self._decoder_sequence_shape = self._encoder_sequence_shape = None
        if shapes[0]:
            self.build(*shapes)

    def adopt(self, primal):
        super().adopt(primal)
        self.cross_attention_primal = between_sequences(self.primal)
        self._convert_input_args = False

    def get_config(self):
        return {
            **super().get_config(),
            "cross_attention_primal": primals.serialize(self.cross_attention_primal),
            "decoder_sequence_shape": self._decoder_sequence_shape,
            "encoder_sequence_shape": self._encoder_sequence_shape,
        }

    def build(self, decoder_sequence_shape, encoder_sequence_shape=None):
        shape = self._decoder_sequence_shape = tuple(decoder_sequence_shape)
        self._self_attention_layer = self._add_attention(
            "self_attention", self.primal, shape, shape
        )
        self._self_attention_layer_norm = self._add_norm("self_attention_layer_norm", shape)
        self._self_attention_dropout = self._add_dropout("self_attention_dropout")
        self._cross_attention_layer = None
        if encoder_sequence_shape is not None:
            self._encoder_sequence_shape = tuple(encoder_sequence_shape)
            self._cross_attention_layer = self._add_attention(
                "cross_attention", self.cross_attention_primal, shape, self._encoder_sequence_shape
            )
            self._cross_attention_layer_norm = self._add_norm("cross_attention_layer_norm", shape)
            self._cross_attention_dropout = self._add_dropout("cross_attention_dropout")
        self._add_feedforward(shape)
        self._feedforward_layer_norm = self._add_norm("feedforward_layer_norm", shape)
        self._feedforward_dropout = self._add_dropout("feedforward_dropout")

    def init_cache(self, batch_size, max_length, dtype=None):
        """Returns a cache for self-attention without tokens.

        See `PrimalDualAttention.init_cache`.

        Args:
            batch_size: the number of sequences.
            max_length: the most tokens a sequence has.
            dtype: of keys and values; the compute dtype if `None`.
        """
        return self._self_attention_layer.init_cache(batch_size, max_length, dtype)

    def init_cross_attention_cache(self, batch_size, encoder_length, dtype=None):
        """Returns a cache for cross-attention, to be filled by the first call.

        Args:
            batch_size: the number of sequences.
            encoder_length: the number of tokens of the encoder.
            dtype: of keys and values; the compute dtype if `None`.
        """
        cache = caches.by_position(self._cross_attention_layer)
        dtype = dtype or self.compute_dtype
        return cache.zeros(self._cross_attention_layer, batch_size, encoder_length, dtype)

    def call(
        self,
        decoder_sequence,
        encoder_sequence=None,
        decoder_padding_mask=None,
        decoder_attention_mask=None,
        encoder_padding_mask=None,
        encoder_attention_mask=None,
        self_attention_cache=None,
        self_attention_cache_update_index=None,
        cross_attention_cache=None,
        cross_attention_cache_update_index=None,
        use_causal_mask=True,
        training=None,
        return_attention_scores=False,
    ):
        self._check_sequences(encoder_sequence, self_attention_cache, cross_attention_cache)
        if decoder_padding_mask is None:
            decoder_padding_mask = get_keras_mask(decoder_sequence)
        if encoder_padding_mask is None and encoder_sequence is not None:
            encoder_padding_mask = get_keras_mask(encoder_sequence)

        def attend_to_self(x):
            return as_tuple(
                self._self_attention_layer(
                    x,
                    x,
                    **self._masks(
                        self.primal,
                        decoder_padding_mask,
                        x,
                        self_attention_cache_update_index,
                    ),
                    attention_mask=decoder_attention_mask,
                    return_attention_scores=return_attention_scores,
                    training=training,
                    use_causal_mask=use_causal_mask,
                    cache=self_attention_cache,
                    cache_update_index=self_attention_cache_update_index,
                )
            )

        def attend_to_encoder(x):
            return as_tuple(
                self._cross_attention_layer(
                    x,
                    encoder_sequence,
                    value_mask=encoder_padding_mask,
                    attention_mask=encoder_attention_mask,
                    return_attention_scores=return_attention_scores,
                    training=training,
                    cache=cross_attention_cache,
                    cache_update_index=cross_attention_cache_update_index,
                )
            )

        sequences = [one for one in (decoder_sequence, encoder_sequence) if one is not None]
        # Sublayers would take the masks for those of queries as well.
        with detached_masks(*sequences):
            x, of_self = self._residual(
                decoder_sequence,
                attend_to_self,
                self._self_attention_layer_norm,
                self._self_attention_dropout,
                training,
            )
            of_encoder = []
            if encoder_sequence is not None:
                x, of_encoder = self._residual(
                    x,
                    attend_to_encoder,
                    self._cross_attention_layer_norm,
                    self._cross_attention_dropout,
                    training,
                )
            x = self._feed_forward(x, training)
        return _in_order(x, of_self, of_encoder)

    def _check_sequences(self, encoder_sequence, self_attention_cache, cross_attention_cache):
        has_encoder, is_given = (
            self._cross_attention_layer is not None,
            encoder_sequence is not None,
        )
        if has_encoder != is_given:
            raise ValueError(
                "A decoder block has an `encoder_sequence` in every call or in none, the first "
                f"included. Received: a call {'with' if is_given else 'without'} one on a block "
                f"built {'with' if has_encoder else 'without'}"
            )
        pair = self_attention_cache, cross_attention_cache
        if has_encoder and (pair[0] is None) != (pair[1] is None):
            given = [name for name, one in zip(("self", "cross"), pair) if one is not None]
            raise ValueError(
                "A block with cross-attention needs both `self_attention_cache` and "
                f"`cross_attention_cache`, or neither. Received: {given[0]}_attention_cache alone"
            )
        if not has_encoder and cross_attention_cache is not None:
            raise ValueError(
                "`cross_attention_cache` is for a block with cross-attention. Received: one in a "
                "call without `encoder_sequence`"
            )

    def compute_output_shape(self, decoder_sequence_shape, encoder_sequence_shape=None):
        return tuple(decoder_sequence_shape)

    def compute_output_spec(
        self,
        decoder_sequence,
        encoder_sequence=None,
        decoder_padding_mask=None,
        decoder_attention_mask=None,
        encoder_padding_mask=None,
        encoder_attention_mask=None,
        self_attention_cache=None,
        self_attention_cache_update_index=None,
        cross_attention_cache=None,
        cross_attention_cache_update_index=None,
        use_causal_mask=True,
        training=None,
        return_attention_scores=False,
    ):
        self._check_sequences(encoder_sequence, self_attention_cache, cross_attention_cache)
        x = keras.KerasTensor(decoder_sequence.shape, dtype=self.compute_dtype)
        _, *of_self = as_tuple(
            self._self_attention_layer.compute_output_spec(
                x,
                x,
                attention_mask=decoder_attention_mask,
                return_attention_scores=return_attention_scores,
                use_causal_mask=use_causal_mask,
                cache=self_attention_cache,
                cache_update_index=self_attention_cache_update_index,
            )
        )
        of_encoder = []
        if encoder_sequence is not None:
            _, *of_encoder = as_tuple(
                self._cross_attention_layer.compute_output_spec(
                    x,
                    encoder_sequence,
                    attention_mask=encoder_attention_mask,
                    return_attention_scores=return_attention_scores,
                    cache=cross_attention_cache,
                    cache_update_index=cross_attention_cache_update_index,
                )
            )
        return _in_order(x, of_self, of_encoder)


def _in_order(x, of_self, of_encoder):
    """Output, then scores of both attention layers, then caches of both."""
    if not of_encoder:
        return (x, *of_self) if of_self else x
    return (x, *(one for pair in zip(of_self, of_encoder) for one in pair))


def between_sequences(primal):
    """`primal` less what relates a query to the positions around it."""
    is_window = isinstance(primal.training_set, SlidingWindow)
    return dataclasses.replace(
        primal,
        transform=tuple(one for one in primal.transform if one.is_pointwise),
        training_set=AllKeys() if is_window else primal.training_set,
    )
