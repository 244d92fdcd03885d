"""The attention layer that a primal problem defines."""

import keras

from keras_pdattn import descriptions, ops, primals, validation
from keras_pdattn.layers import caches, input_checks, projections
from keras_pdattn.layers.masking import attach_mask, detached_masks
from keras_pdattn.layers.primal_weights import PrimalWeights
from keras_pdattn.ops import checks, masks
from keras_pdattn.ops.axes import AttendedAxes


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class PrimalDualAttention(caches.KeepsCaches, keras.layers.MultiHeadAttention):
    r"""Multi-head attention defined by a primal problem.

    Each head computes, with the feature map \(\Phi\), the transform \(T\) and the
    training set \(S_i\) of query \(i\) that `primal` names,

    \[ h_i = \sum_{j \in S_i} \frac{\Phi(T(q_i))^\top \Phi(T(k_j))}
       {\sum_{l \in S_i} \Phi(T(q_i))^\top \Phi(T(k_l))} v_j \]

    which is the support vector expansion of a support vector regression. It is a
    `keras.layers.MultiHeadAttention` in every argument, call argument, sublayer
    and weight, and with `primal="softmax"` in its numbers. It differs where Keras
    is not of one mind: a query that sees nothing gets exactly zero before the
    output bias, an explicit `query_mask` acts (and is attached to the output),
    and masks stay on the inputs.

    Masking: a padded key is in no training set. Padding comes from
    `query_mask`, `value_mask` and `key_mask` or, where these are `None`, from
    the masks Keras attaches to tensors; the output carries the query's. An
    `attention_mask` and `sliding_window` restrict what a query sums over.

    Causal use: a query's output is that of the last query of a causal call on the
    keys up to it, statistics and windows included; and of a non-causal one, but
    for convolutions, whose taps that look ahead a causal call drops.

    Cost: that of `primal`; softmax over all keys takes queries times keys
    products per head.

    Args:
        num_heads: number of heads.
        key_dim: depth of each head's queries and keys.
        value_dim: depth of each head's values; `key_dim` if `None`.
        dropout: share of the attention weights dropped in training, in [0, 1); with
            a finite feature map, of the heads' outputs.
        use_bias: whether the projections have biases.
        output_shape: shape of an output beyond batch and time, an int or a
            tuple; the query's width if `None`.
        attention_axes: the axes to attend over; all between batch and features
            if `None`. Several are one sequence in raster order; windows on them
            are boxes.
        sliding_window: a query sees keys less than this many positions away,
            along each attended axis; `None` for all.
        flash_attention: whether to insist on the backend's flash kernel; `None`
            leaves the choice to it. The kernel takes a window as a mask of queries
            times keys.
        kernel_initializer: initialiser of the projections' kernels.
        bias_initializer: initialiser of their biases.
        kernel_regularizer: regulariser of their kernels.
        bias_regularizer: regulariser of their biases.
        activity_regularizer: regulariser of their outputs.
        kernel_constraint: constraint on their kernels.
        bias_constraint: constraint on their biases.
        use_gate: whether a sigmoid projection of the query gates the output.
        seed: seed of the dropout.
        primal: a `keras_pdattn.Primal`, its name (`"softmax"`, `"linear"`,
            `"sliding_window"`, `"batch_norm"`, `"scaled_head"`,
            `"batch_norm_scaled_head"`, `"conv1d"`, `"conv2d"`) or its config.
        **kwargs: `name`, `dtype` and `trainable`, as for any layer.

    Call arguments:
        query: tensor of shape `(batch, queries, width)`.
        value: tensor of shape `(batch, keys, width)`.
        key: tensor of shape `(batch, keys, width)`; `value` if `None`.
        query_mask: boolean `(batch, queries)`, False for padding.
        value_mask: boolean `(batch, keys)`, False for padding.
        key_mask: boolean `(batch, keys)`, False for padding.
        attention_mask: boolean `(queries, keys)`, `(batch, queries, keys)` or
            `(batch, heads, queries, keys)`, sizes of 1 being broadcast; True
            lets a query see a key.
        return_attention_scores: whether to return the scores too.
        training: whether dropout is active.
        use_causal_mask: whether query `i` sees keys `0` to `i` only.
        cache: what `init_cache` made or the call before returned, or KerasHub's
            `(batch, 2, length, heads, key_dim)`: `query`, `value` and `key` are the
            tokens that come next. Masks of keys are of these, or of the whole
            length, `attention_mask` is of the whole length, and a causal query
            sees the tokens before it. Which of these were padding the cache does
            not hold (but one of a sliding window): a mask of the whole length says.
        cache_update_index: the position of the first of these tokens, an integer or
            an integer scalar tensor; `None` to attend to `cache` as it is, whatever
            `value` and `key` are (cross-attention). A state, or the ring of a
            sliding window, has no last position.

    Returns:
        The output, `(batch, queries, width)`; with `return_attention_scores`
        also the scores, `(batch, heads, queries, keys)`, each row summing to 1,
        or to 0 where the query sees nothing; with `cache` also, last, the cache
        with the new tokens.

    Raises:
        ValueError: if an argument is out of its range; if inputs have the wrong
            rank, dtype or width, or don't fit each other; if a mask does not fit
            or is an additive float mask; if there is an index without a cache, one
            beyond its length, or a cache of another kind of layer.

    Example:

    ```python
    import keras
    import keras_pdattn

    inputs = keras.Input((None, 32))
    outputs = keras_pdattn.layers.PrimalDualAttention(
        num_heads=4, key_dim=8, primal="batch_norm"
    )(inputs, inputs)
    model = keras.Model(inputs, outputs)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        dropout=0.0,
        use_bias=True,
        output_shape=None,
        attention_axes=None,
        sliding_window=None,
        flash_attention=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        use_gate=False,
        seed=None,
        primal="softmax",
        **kwargs,
    ):
        validation.positive_int("num_heads", num_heads)
        validation.positive_int("key_dim", key_dim)
        if value_dim is not None:
            validation.positive_int("value_dim", value_dim)
        if sliding_window is not None:
            validation.positive_int("sliding_window", sliding_window)
        if attention_axes is not None:
            validation.axes("attention_axes", attention_axes)
        validation.dropout_rate("dropout", dropout)
        super().__init__(
            num_heads=num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            dropout=dropout,
            use_bias=use_bias,
            output_shape=output_shape,
            attention_axes=attention_axes,
            sliding_window=sliding_window,
            flash_attention=flash_attention,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            use_gate=use_gate,
            seed=seed,
            **kwargs,
        )
        self.flash_attention = flash_attention
        self.primal = primals.get(primal)
        # Asks early whether the training set has work for this many heads.
        self.primal.training_set.groups(num_heads)

    def get_config(self):
        return {
            **super().get_config(),
            "flash_attention": self.flash_attention,
            "primal": primals.serialize(self.primal),
        }

    def build(self, query_shape, value_shape, key_shape=None):
        shapes = {
            "query": tuple(query_shape),
            "value": tuple(value_shape),
            "key": tuple(value_shape if key_shape is None else key_shape),
        }
        self._check_shapes(shapes)
        if self.built:
            return
        super().build(query_shape, value_shape, key_shape)
        self._build_primal(shapes)

    def _build_primal(self, shapes):
        """Builds what `keras.layers.MultiHeadAttention` has not, for inputs of these shapes."""
        self._rank = len(shapes["query"])
        self._widths = {name: shape[-1] for name, shape in shapes.items()}
        self._axes = AttendedAxes.of(self._rank, self._attention_axes)
        self.primal.check_call(len(self._axes.attended))
        # Made last: the projections keep their places among the weights.
        self._primal_weights = PrimalWeights(
            self.primal.weighted_members, dtype=self.dtype_policy, name="primal"
        )
        self._primal_weights.build((self._num_heads, self._key_dim))

    def adopt(self, primal):
        """Takes on a primal problem; for `convert`, which makes one of a layer that Keras built."""
        self._convert_input_args = False
        self.flash_attention = self._flash_attention
        self.primal = primals.get(primal)
        self.primal.training_set.groups(self.num_heads)
        shapes = {
            name: tuple(self._build_shapes_dict[f"{name}_shape"]) for name in ("query", "value")
        }
        key_shape = self._build_shapes_dict.get("key_shape") or shapes["value"]
        self._tracker.unlock()
        with self._open_name_scope():
            self._build_primal({**shapes, "key": tuple(key_shape)})
        self._tracker.lock()
        self._primal_weights.trainable = self.trainable

    def redraw(self, seed):
        """Draws the random features of a layer anew, e.g. every few training steps.

        Args:
            seed: non-negative integer.

        Raises:
            ValueError: if the feature map draws nothing, or before the layer is built.
        """
        if not hasattr(self.primal.feature_map, "redraw"):
            raise ValueError(
                "Only random features can be drawn anew. "
                f"Received: feature_map={self.primal.feature_map!r}"
            )
        if not self.built:
            raise ValueError(
                "The features of a layer are first drawn when it is built. "
                f"Received: redraw(seed={seed}) before that"
            )
        validation.natural("seed", seed)
        self.primal.feature_map.redraw(self._primal_weights.by_member[-1], seed)

    def _check_shapes(self, shapes):
        input_checks.check_shapes(**shapes)
        if self.built:
            input_checks.check_rank(self._rank, **shapes)
        input_checks.check_axes(self._attention_axes, shapes["query"], shapes["value"])
        input_checks.check_widths(self._widths if self.built else None, **shapes)

    def _check_call(self, query, value, key, return_attention_scores, use_causal_mask):
        tensors = {"query": query, "value": value, "key": key}
        checks.check_tensors(**tensors)
        self._check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        self.primal.check_call(len(self._axes.attended), use_causal_mask)
        if self._flash_attention and return_attention_scores:
            raise ValueError(
                "Returning attention scores is not supported when flash attention is enabled. "
                "Please disable flash attention to access attention scores. "
                f"Received: flash_attention={self.flash_attention}"
            )

    def call(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        cache=None,
        cache_update_index=None,
    ):
        key = value if key is None else key
        self._check_call(query, value, key, return_attention_scores, use_causal_mask)
        if cache is not None or cache_update_index is not None:
            return self._call_with_cache(
                query,
                value,
                key,
                query_mask,
                key_masks={"value_mask": value_mask, "key_mask": key_mask},
                attention_mask=attention_mask,
                return_attention_scores=return_attention_scores,
                training=training,
                use_causal_mask=use_causal_mask,
                cache=cache,
                index=cache_update_index,
            )
        attention_mask, context = self._visibility(
            query, value, query_mask, value_mask, key_mask, attention_mask, use_causal_mask
        )
        with detached_masks(query, value, key):
            gate = self._project(self._gate_dense, query) if self._use_gate else None
            query = self._project(self._query_dense, query)
            sizes = [value.shape[axis] for axis in self._axes.attended]
            if self._projects_late(sizes, use_causal_mask):
                context["projections"] = [
                    projections.projection(dense) for dense in (self._key_dense, self._value_dense)
                ]
            else:
                key = self._project(self._key_dense, key)
                value = self._project(self._value_dense, value)
        output, scores = self._compute_attention(
            query, key, value, attention_mask, training, return_attention_scores, **context
        )
        output = self._finish(output, gate, query_mask)
        return (output, scores) if return_attention_scores else output

    def _finish(self, output, gate, query_mask):
        """The layer's output, from that of its heads."""
        output = self._project(self._output_dense, output if gate is None else output * gate)
        if query_mask is not None:
            attach_mask(output, query_mask)
        return output

    def init_cache(self, batch_size, max_length, dtype=None):
        """Returns a cache without tokens, for calls that bring the next tokens of sequences.

        One of states for a finite feature map fitted on all keys; one of a sliding window's
        last keys; of all keys and values, `(batch, 2, max_length, heads, key_dim)` as
        KerasHub's, for other layers. Each tensor of it has the batch as first axis, and
        keeps its shape and dtype.

        Args:
            batch_size: the number of sequences.
            max_length: the most tokens a sequence has.
            dtype: of keys and values; the layer's compute dtype if `None`. States are
                float32.

        Raises:
            ValueError: if a number is not a positive integer, before the layer is built,
                or if it attends over several axes.

        Example:

        ```python
        import keras
        import keras_pdattn

        layer = keras_pdattn.layers.BatchNormAttention(num_heads=4, key_dim=8)
        layer.build((None, None, 32), (None, None, 32))
        cache = layer.init_cache(batch_size=2, max_length=10)
        for index in range(10):
            token = keras.random.normal((2, 1, 32))
            output, cache = layer(
                token, token, use_causal_mask=True, cache=cache, cache_update_index=index
            )
        ```
        """
        validation.positive_int("batch_size", batch_size)
        validation.positive_int("max_length", max_length)
        self._check_cacheable()
        cache = caches.least(self, max_length)
        return cache.zeros(self, batch_size, max_length, dtype or self.compute_dtype)

    def _check_cacheable(self):
        if not self.built or not self._axes.is_plain:
            raise ValueError(
                "Caches are for layers that are built, and attend over one axis. Received: "
                f"built={self.built}, attention_axes={self._attention_axes}"
            )

    def _call_with_cache(
        self,
        query,
        value,
        key,
        query_mask,
        key_masks,
        attention_mask,
        return_attention_scores,
        training,
        use_causal_mask,
        cache,
        index,
    ):
        """`call` with a cache; `key_masks` holds those of `value` and `key`, by name."""
        kind, cache, index = self._checked_cache(
            query, value, cache, index, use_causal_mask, return_attention_scores
        )
        if query_mask is not None:
            query_mask = self._axes.padding("query_mask", query_mask, query)
        if attention_mask is not None:
            attention_mask = masks.as_boolean("attention_mask", attention_mask)
        with detached_masks(query, value, key):
            gate = self._project(self._gate_dense, query) if self._use_gate else None
            tokens = caches.Tokens(
                query=self._project(self._query_dense, query),
                key=None if index is None else self._project(self._key_dense, key),
                value=None if index is None else self._project(self._value_dense, value),
                index=index,
                query_mask=query_mask,
                key_masks=tuple(
                    caches.mask_of_keys(name, mask, value, cache)
                    for name, mask in key_masks.items()
                    if mask is not None
                ),
                attention_mask=attention_mask,
                is_causal=use_causal_mask,
                training=training,
            )

        def solve(tokens):
            return self._compute_attention(
                tokens.query,
                tokens.key,
                tokens.value,
                tokens.attention_mask,
                training,
                return_attention_scores,
                use_causal_mask=tokens.is_causal,
                query_mask=tokens.query_mask,
                key_mask=tokens.key_mask,
                query_start=tokens.index,
            )

        output, scores, cache = kind.attend(self, cache, tokens, solve)
        output = self._finish(output, gate, query_mask)
        return (output, scores, cache) if return_attention_scores else (output, cache)

    def _checked_cache(self, query, value, cache, index, use_causal_mask, return_attention_scores):
        if cache is None:
            raise ValueError(
                "`cache_update_index` is a place in a `cache`. "
                f"Received: cache=None, cache_update_index={index}"
            )
        self._check_cacheable()
        lengths = query.shape[1:2], value.shape[1:2]
        if use_causal_mask and index is not None and not masks.fits(*lengths, exactly=True):
            raise ValueError(
                "A causal call with a cache brings a query for each new key. "
                f"Received: query.shape={query.shape}, value.shape={value.shape}"
            )
        return caches.checked(self, cache, index, query.shape[0], return_attention_scores)

    def _project(self, dense, x):
        return projections.project(dense, x, self.compute_dtype)

    def _projects_late(self, sizes, use_causal_mask):
        """Whether keys and values may be projected once means or sums are taken, and better so.

        `sizes` are those of the axes that keys run over.
        """
        if use_causal_mask or self._is_overridden():
            return False
        training_sets = [one for _, one in self.primal.training_set.groups(self._num_heads)]
        if not any(one.takes_means or self.primal.may_sum_inputs(one) for one in training_sets):
            return False
        denses = self._key_dense, self._value_dense
        return all(
            projections.is_plain(dense, self.compute_dtype) for dense in denses
        ) and projections.are_better_late(self._key_dense.weights[0], sizes)

    def _is_overridden(self):
        return type(self)._compute_attention is not PrimalDualAttention._compute_attention

    def _visibility(
        self, query, value, query_mask, value_mask, key_mask, attention_mask, use_causal_mask
    ):
        """What limits each query: the mask that `_compute_attention` gets, and its keywords."""
        if self._is_overridden() and self.primal == primals.get("softmax"):
            # Written for Keras, it may know of one mask only, in which all are merged.
            merged = self._compute_attention_mask(
                query, value, query_mask, value_mask, key_mask, attention_mask, use_causal_mask
            )
            return merged, {}
        context = {}
        if use_causal_mask:
            context["use_causal_mask"] = True
        if query_mask is not None:
            context["query_mask"] = self._axes.padding("query_mask", query_mask, query)
        if value_mask is not None:
            context["key_mask"] = self._axes.padding("value_mask", value_mask, value)
        if key_mask is not None:
            key_mask = self._axes.padding("key_mask", key_mask, value)
            context["key_mask"] = masks.intersect(context.get("key_mask"), key_mask)
        return attention_mask, context

    def _compute_attention(
        self,
        query,
        key,
        value,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
        use_causal_mask=False,
        query_mask=None,
        key_mask=None,
        projections=None,
        query_start=None,
    ):
        """Attention of projected queries, keys and values; the hook that Keras documents.

        A subclass that overrides it gets, where `primal` is `"softmax"`, all
        masks merged in `attention_mask`; for other primals, whose statistics
        and windows need to tell them apart, the keywords that are in use.

        Args:
            query: tensor of shape `(batch, ..., heads, key_dim)`.
            key: tensor of shape `(batch, ..., heads, key_dim)`.
            value: tensor of shape `(batch, ..., heads, value_dim)`.
            attention_mask: as in `call`.
            training: as in `call`.
            return_attention_scores: as in `call`.
            use_causal_mask: as in `call`.
            query_mask: boolean `(batch, queries)`, for several axes flattened.
            key_mask: boolean `(batch, keys)`, likewise.
            projections: those of keys and values, where `key` and `value` are the
                layer's inputs yet; no subclass that overrides this gets them.
            query_start: where among the keys the first query stands, in a call with a
                cache.

        Returns:
            `(output, scores)`; the scores are `None` unless asked for.
        """
        if attention_mask is not None:
            attention_mask = self._axes.attention_mask(
                attention_mask, query, value, self._num_heads
            )

        sequence = self._axes.to_sequence(value)
        result = ops.attention(
            self._axes.to_sequence(query),
            sequence if key is value else self._axes.to_sequence(key),
            sequence,
            self.primal,
            mask=attention_mask,
            key_mask=key_mask,
            is_causal=use_causal_mask,
            query_mask=query_mask,
            sliding_window=self._sliding_window,
            weights=self._primal_weights.by_member,
            dropout=self._dropout if training else 0.0,
            seed=getattr(self._dropout_layer, "seed_generator", None),
            return_scores=return_attention_scores,
            flash_attention=self._flash_attention,
            query_grid=self._axes.grid(query),
            key_grid=self._axes.grid(value),
            projections=projections,
            query_start=query_start,
        )
        output, scores = result if return_attention_scores else (result, None)
        output = self._axes.from_sequence(output, query)
        if return_attention_scores:
            scores = self._axes.scores_from_sequence(scores, query, value)
        return output, scores

    def compute_output_spec(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        cache=None,
        cache_update_index=None,
    ):
        key = value if key is None else key
        self._check_call(query, value, key, return_attention_scores, use_causal_mask)
        if cache is not None or cache_update_index is not None:
            _, cache, _ = self._checked_cache(
                query, value, cache, cache_update_index, use_causal_mask, return_attention_scores
            )
        for name, mask in (
            ("query_mask", query_mask),
            ("value_mask", value_mask),
            ("key_mask", key_mask),
            ("attention_mask", attention_mask),
        ):
            if mask is not None:
                masks.as_boolean(name, mask)
        output = keras.KerasTensor(
            self.compute_output_shape(query.shape, value.shape, key.shape),
            dtype=self.compute_dtype,
        )
        results = [output]
        if return_attention_scores:
            keys = value.shape if cache is None else caches.shape_of_keys(cache)
            shape = self._axes.scores_shape(query.shape, keys, self._num_heads)
            results.append(keras.KerasTensor(shape, dtype=self.compute_dtype))
        if cache is not None:
            like = [keras.KerasTensor(x.shape, x.dtype) for x in keras.tree.flatten(cache)]
            results.append(keras.tree.pack_sequence_as(cache, like))
        return tuple(results) if len(results) > 1 else output
