"""What the encoder and the decoder block share."""

import keras
from keras import ops

from keras_pdattn import primals, validation
from keras_pdattn.layers.primal_dual_attention import PrimalDualAttention
from keras_pdattn.ops.indexing import start_at


class TransformerBlock(keras.layers.Layer):
    """Constructor arguments, and the sublayers made of them.

    Sublayers have the names, attributes and order of KerasHub's blocks, so that weights,
    LoRA files, layout maps and checkpoint converters fit.
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
        **kwargs,
    ):
        validation.positive_int("intermediate_dim", intermediate_dim)
        validation.positive_int("num_heads", num_heads)
        validation.dropout_rate("dropout", dropout)
        validation.positive("layer_norm_epsilon", layer_norm_epsilon)
        super().__init__(**kwargs)
        self.intermediate_dim = intermediate_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.activation = keras.activations.get(activation)
        self.layer_norm_epsilon = layer_norm_epsilon
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.normalize_first = normalize_first
        self.primal = primals.get(primal)
        self.primal.training_set.groups(num_heads)
        self.supports_masking = True

    def adopt(self, primal):
        """Takes on a primal problem; for `convert`, which makes one of a block of KerasHub's."""
        self.primal = primals.get(primal)
        self.primal.training_set.groups(self.num_heads)

    def get_config(self):
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "num_heads": self.num_heads,
            "dropout": self.dropout,
            "activation": keras.activations.serialize(self.activation),
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "normalize_first": self.normalize_first,
            "primal": primals.serialize(self.primal),
        }

    def _initializers(self):
        """Initialisers for one sublayer: each draws numbers of its own."""
        found = {
            "kernel_initializer": self.kernel_initializer,
            "bias_initializer": self.bias_initializer,
        }
        is_object = keras.initializers.Initializer
        return {n: x.clone() if isinstance(x, is_object) else x for n, x in found.items()}

    def _add_attention(self, name, primal, query_shape, value_shape):
        """Makes an attention layer, built."""
        width = query_shape[-1]
        if width is None or width < self.num_heads:
            raise ValueError(
                "The last axis of the input must have at least one feature for each head. "
                f"Received: input shape {tuple(query_shape)} with num_heads={self.num_heads}"
            )
        attention = PrimalDualAttention(
            num_heads=self.num_heads,
            key_dim=width // self.num_heads,
            dropout=self.dropout,
            primal=primal,
            dtype=self.dtype_policy,
            name=name,
            **self._initializers(),
        )
        attention.build(query_shape, value_shape)
        return attention

    def _add_norm(self, name, shape):
        norm = keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, dtype=self.dtype_policy, name=name
        )
        norm.build(shape)
        return norm

    def _add_dropout(self, name):
        return keras.layers.Dropout(self.dropout, dtype=self.dtype_policy, name=name)

    def _add_dense(self, name, units, shape, activation=None):
        dense = keras.layers.Dense(
            units,
            activation=activation,
            dtype=self.dtype_policy,
            name=name,
            **self._initializers(),
        )
        dense.build(shape)
        return dense

    def _add_feedforward(self, shape):
        """Makes the two dense layers."""
        self._feedforward_intermediate_dense = self._add_dense(
            "feedforward_intermediate_dense", self.intermediate_dim, shape, self.activation
        )
        self._feedforward_output_dense = self._add_dense(
            "feedforward_output_dense", shape[-1], (*shape[:-1], self.intermediate_dim)
        )

    def _masks(self, primal, mask, queries=None, start=None):
        """The masks an attention layer of `primal` gets, of queries and of values.

        Padded queries are left to have outputs, as KerasHub's blocks leave them, but where
        a transform would mix them into others.

        Args:
            primal: a `Primal`.
            mask: the padding mask of values, or `None`.
            queries: `(batch, queries, width)`, some of the values, or `None` for all.
            start: where among what is masked they begin; `None` if the mask is theirs.
        """
        masks = {"value_mask": mask}
        if mask is not None and not all(one.is_pointwise for one in primal.transform):
            of_queries = mask
            if start is not None and mask.shape[1] != queries.shape[1]:
                of_queries = ops.slice(mask, start_at(start, 1, 2), ops.shape(queries)[:2])
            masks["query_mask"] = of_queries
        return masks

    def _residual(self, x, function, norm, dropout, training):
        """`x` plus `function` of it, normalised before or after, and what else that returns."""
        output, *others = function(norm(x) if self.normalize_first else x)
        x = dropout(output, training=training) + x
        return x if self.normalize_first else norm(x), others

    def _feed_forward(self, x, training):
        def function(x):
            return (self._feedforward_output_dense(self._feedforward_intermediate_dense(x)),)

        norm, dropout = self._feedforward_layer_norm, self._feedforward_dropout
        return self._residual(x, function, norm, dropout, training)[0]


def as_tuple(x):
    """What an attention layer returned, as a tuple."""
    return x if isinstance(x, tuple) else (x,)
