"""What attention costs: operations, activations and parameters, counted from shapes."""

import dataclasses
import math

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_pdattn import primals, validation
from keras_pdattn.analysis.calls import symbolic_calls
from keras_pdattn.layers import input_checks
from keras_pdattn.layers.primal_dual_attention import PrimalDualAttention
from keras_pdattn.layers.support_vector_attention import SupportVectorAttention
from keras_pdattn.ops import states
from keras_pdattn.ops.attention import has_causal_form
from keras_pdattn.ops.axes import AttendedAxes
from keras_pdattn.ops.dtypes import accumulator
from keras_pdattn.ops.examples import Examples, Queries
from keras_pdattn.ops.prefixes import num_prefixes
from keras_pdattn.ops.projection import Projection


def _itemsize(dtype):
    """Bytes of a number; NumPy knows of all dtypes of Keras through ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


@dataclasses.dataclass(frozen=True)
class HeadCost:
    """What one head costs, for all sequences of a call.

    Attributes:
        form: how it works: through `"weights"` of all pairs, of those in `"bands"`,
            through `"states"`, or by solving for all `"prefixes"`.
        examples: how many examples it is fitted on.
        projected_keys: how many vectors are projected to keys, for one sequence: means of
            inputs where these come first.
        projected_values: how many to values: means, or the sums that a state is made of.
        multiply_adds: those of transform, features, kernel and weighted sums.
        activation_bytes: bytes of the projected and pooled tensors, of weights or
            states, and of the head's output.
    """

    form: str
    examples: int
    projected_keys: int
    projected_values: int
    multiply_adds: int
    activation_bytes: int


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one call of an attention layer costs.

    Attributes:
        name: path of the layer.
        primal: its `Primal`.
        queries: how many queries a sequence has.
        keys: how many keys.
        heads: `HeadCost` of each head.
        projections: multiply-adds of the projections to and from the heads.
        parameters: how many numbers its weights hold.
        parameter_bytes: how many bytes.
        output_bytes: bytes of its output.
    """

    name: str
    primal: primals.Primal
    queries: int
    keys: int
    heads: tuple
    projections: int
    parameters: int
    parameter_bytes: int
    output_bytes: int

    @property
    def attention(self):
        """Multiply-adds of all heads."""
        return sum(head.multiply_adds for head in self.heads)

    @property
    def multiply_adds(self):
        """Multiply-adds of all heads and of the projections."""
        return self.projections + self.attention

    @property
    def activation_bytes(self):
        """Bytes of what the heads compute and of the output."""
        return self.output_bytes + sum(head.activation_bytes for head in self.heads)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the attention of a model costs; what `cost` returns.

    Attributes:
        layers: `LayerCost` of each call of an attention layer, in order.
        parameters: how many numbers the weights hold, those of a layer called twice
            once.
        parameter_bytes: how many bytes they take, likewise.
    """

    layers: tuple
    parameters: int
    parameter_bytes: int

    @classmethod
    def of_calls(cls, calls):
        """From pairs of a layer and the `LayerCost` of a call of it."""
        layers = tuple(cost for _, cost in calls)
        once = {id(layer): cost for layer, cost in calls}.values()
        return cls(
            layers, sum(one.parameters for one in once), sum(one.parameter_bytes for one in once)
        )

    @property
    def attention(self):
        """Multiply-adds of all heads."""
        return sum(layer.attention for layer in self.layers)

    @property
    def multiply_adds(self):
        """Multiply-adds of heads and projections."""
        return sum(layer.multiply_adds for layer in self.layers)

    @property
    def activation_bytes(self):
        """Bytes of activations, all layers added."""
        return sum(layer.activation_bytes for layer in self.layers)


def cost(
    layer_or_model,
    input_shape,
    use_causal_mask=False,
    attention_mask=False,
    return_attention_scores=False,
):
    r"""Counts what attention costs, without running it.

    Counted are multiply-adds of matrix products and convolutions, as the forms that
    the layers would choose take them: padded blocks of a window, chunks of a causal
    state, what a mask hides; for scaled heads the projections of means, and for states
    those of sums of inputs, where that is less. For \(T\) queries, \(M\) examples, depth
    \(D\), values of depth \(D_v\), inputs \(C\) wide and \(F\) features, a head takes

    | form | multiply-adds |
    |---|---|
    | weights | \(T M (D + D_v)\), and \(T (D + D_v)\) for a causal scaled head |
    | bands | (pairs in bands) \((D + D_v)\) |
    | states | \((T + M) F (D_v + 1)\); causally with those of each chunk with itself |
    | states of inputs | \(T F (D_v + 1) + M F (C + 1)\) |
    | prefixes | for each query what it and the keys take |

    and a kernel's size times the depth for each vector that is convolved, \(F D\) for
    each that random features are drawn for. Work for each number of a tensor, such as
    a softmax or a normalisation, is not. Bytes are those of the activations that these
    forms write; a fused kernel writes no weights, and blocks of queries hold few at a time:
    these need less. Both look at fewer pairs of a long causal sequence than are counted.
    Not counted is what scaled heads take more where PyTorch, run eagerly, fits those of
    a short causal or padded sequence on running means, see the guide to cost.

    Args:
        layer_or_model: a `keras.layers.MultiHeadAttention`, ours or Keras's, or a model
            with some inside; other layers of it are left out.
        input_shape: of a layer, `(batch, time, width)`, or a pair of such shapes for
            query and value; of a model, the shape of its input, or these in the
            structure that it takes. `None` for a batch counts as 1.
        use_causal_mask: whether a layer's call is causal. Of a model, that is seen from
            the calls of its layers, as is what follows.
        attention_mask: whether a layer's call has an attention mask.
        return_attention_scores: whether it returns scores.

    Returns:
        `Cost`, with `layers`, for each of which there are `heads`.

    Raises:
        ValueError: if there is no such layer, a size other than the batch is not known,
            or the shape is none for the layer or model.

    Example:

    ```python
    from keras_pdattn import analysis, layers

    full = analysis.cost(layers.PrimalDualAttention(8, 32), (1, 4096, 256))
    scaled = analysis.cost(layers.ScaledHeadAttention(8, 32), (1, 4096, 256))
    round(scaled.attention / full.attention, 3)  # 0.469
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """
    if not isinstance(layer_or_model, keras.layers.Layer):
        raise ValueError(
            "`layer_or_model` must be a Keras layer or model. "
            f"Received: layer_or_model={layer_or_model!r}"
        )
    if not isinstance(layer_or_model, keras.layers.MultiHeadAttention):
        if use_causal_mask or attention_mask or return_attention_scores:
            raise ValueError(
                "How the layers of a model are called is seen from the model. Received: "
                f"use_causal_mask={use_causal_mask}, attention_mask={attention_mask}, "
                f"return_attention_scores={return_attention_scores}"
            )
        calls = symbolic_calls(layer_or_model, _with_batch(input_shape))
        calls = [call for call in calls if isinstance(call[0], keras.layers.MultiHeadAttention)]
        if not calls:
            raise ValueError(
                "The model has no `keras.layers.MultiHeadAttention`. "
                f"Received: layer_or_model={layer_or_model!r}"
            )
        return Cost.of_calls([(call[0], _cost_of_call(*call)) for call in calls])
    for name, flag in (
        ("use_causal_mask", use_causal_mask),
        ("attention_mask", attention_mask),
        ("return_attention_scores", return_attention_scores),
    ):
        validation.boolean(name, flag)
    layer, shapes = layer_or_model, _shapes_of_pair(input_shape)
    input_checks.check_shapes(*shapes, shapes[1])
    if not layer.built:
        layer = type(layer).from_config(layer.get_config())
        layer.build(*(shapes[:1] if isinstance(layer, SupportVectorAttention) else shapes))
    flags = use_causal_mask, attention_mask, return_attention_scores
    return Cost.of_calls([(layer, _layer_cost(layer, *shapes, *flags))])


def _shapes_of_pair(shape):
    """The shapes of query and value that `shape` is, or is both of."""
    if isinstance(shape, (tuple, list)) and shape:
        pair = shape if isinstance(shape[0], (tuple, list)) else [shape, shape]
        if len(pair) == 2:
            return _with_batch(list(pair))
    raise ValueError(
        "`input_shape` of a layer must be a shape, or a pair of them for query and value. "
        f"Received: input_shape={shape}"
    )


def _with_batch(shape):
    """A shape, or a structure of them, with a batch of 1 where that is `None`."""
    if isinstance(shape, dict):
        return {name: _with_batch(one) for name, one in shape.items()}
    if isinstance(shape[0], (tuple, list, dict)):
        return [_with_batch(one) for one in shape]
    shape = (1 if shape[0] is None else shape[0], *shape[1:])
    for size in shape:
        validation.positive_int("input_shape", size)
    return shape


def _cost_of_call(layer, arguments):
    return _layer_cost(
        layer,
        tuple(arguments["query"].shape),
        # A layer may have keys of its own.
        tuple(getattr(arguments["value"], "shape", ())),
        arguments.get("use_causal_mask", False),
        arguments.get("attention_mask") is not None,
        arguments.get("return_attention_scores", False),
    )


def _layer_cost(layer, query_shape, value_shape, is_causal, has_mask, with_scores):
    if isinstance(layer, SupportVectorAttention):
        value_shape = (query_shape[0], *layer.values.shape)
    axes = AttendedAxes.of(len(query_shape), layer.attention_axes)
    sizes = [[shape[axis] for axis in axes.attended] for shape in (query_shape, value_shape)]
    rows = math.prod(query_shape[axis] for axis in (0, *axes.free))
    num_queries, num_keys = (math.prod(size) for size in sizes)
    is_ours = isinstance(layer, PrimalDualAttention)
    call = _Call(
        # Keras's layer takes its window as a mask.
        layer.primal if is_ours else primals.get("softmax"),
        *((None, None) if len(axes.attended) == 1 else map(tuple, sizes)),
        num_queries,
        num_keys,
        layer.key_dim,
        layer.value_dim,
        is_causal,
        has_mask,
        with_scores,
        layer._sliding_window if is_ours else None,
        layer._use_gate,
        is_ours and layer._projects_late(sizes[1], is_causal),
        value_shape[-1],
        layer.compute_dtype,
    )
    heads = []
    for group, training_set in call.primal.training_set.groups(layer.num_heads):
        heads += [call.head(training_set)] * (group.stop - group.start)
    heads = [
        dataclasses.replace(
            head,
            multiply_adds=rows * head.multiply_adds,
            activation_bytes=rows * head.activation_bytes,
        )
        for head in heads
    ]
    of_queries = [layer.query_dense, layer.output_dense]
    if layer._use_gate:
        of_queries.append(layer._gate_dense)
    projections = num_queries * sum(math.prod(dense.kernel.shape) for dense in of_queries)
    for head in heads:
        # A kernel is as large for each head.
        of_keys = head.projected_keys * math.prod(layer.key_dense.kernel.shape)
        of_values = head.projected_values * math.prod(layer.value_dense.kernel.shape)
        projections += (of_keys + of_values) // layer.num_heads
    output = rows * num_queries * math.prod(layer.output_dense.kernel.shape[2:])
    return LayerCost(
        name=layer.path,
        primal=call.primal,
        queries=num_queries,
        keys=num_keys,
        heads=tuple(heads),
        projections=rows * projections,
        parameters=sum(math.prod(weight.shape) for weight in layer.weights),
        parameter_bytes=sum(
            math.prod(weight.shape) * _itemsize(weight.dtype) for weight in layer.weights
        ),
        output_bytes=output * _itemsize(call.dtype),
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """What of a call decides on the cost of its heads, for one sequence."""

    primal: primals.Primal
    query_grid: tuple | None
    key_grid: tuple | None
    num_queries: int
    num_keys: int
    depth: int
    value_depth: int
    is_causal: bool
    has_mask: bool
    with_scores: bool
    sliding_window: int | None
    has_gate: bool
    projects_late: bool
    width: int
    dtype: str

    def head(self, training_set):
        """The cost of a head that is fitted on `training_set`."""
        if not self.is_causal or has_causal_form(self.primal, training_set, self.key_grid):
            return self._solve(training_set)
        alone = dataclasses.replace(self, num_queries=1, is_causal=False)._solve(training_set, True)
        prefixes, convolved = num_prefixes(self.num_queries), 0
        if not all(transform.is_pointwise for transform in self.primal.transform):
            # Each prefix has all of its queries transformed, though one is asked for.
            convolved = self._transforms(self.num_queries - 1, training_set)
        return HeadCost(
            form="prefixes",
            examples=alone.examples,
            projected_keys=self.num_keys,
            projected_values=self.num_keys,
            multiply_adds=prefixes * (alone.multiply_adds + convolved),
            activation_bytes=prefixes * alone.activation_bytes,
        )

    def _solve(self, training_set, is_prefix=False):
        """The cost of one solution, for all queries at once."""
        examples, queries = self._select(training_set, is_prefix)
        feature_map, num_examples = self.primal.feature_map, examples.key.shape[1]
        num_own = 0 if examples.own is None else self.num_queries
        multiply_adds = sum(
            member.multiply_adds(self.num_queries, examples, self.depth)
            for member in self.primal.weighted_members
        )
        weights = feature_map.initial_weights(1, self.depth)
        num_features, width = 0, self.depth
        if feature_map.is_finite:
            num_features, width = feature_map.widths(queries, weights)
        pooled = 0 if num_examples == self.num_keys else num_examples + num_own
        means_first = self.projects_late and training_set.takes_means
        projected_keys = projected_values = num_examples if means_first else self.num_keys
        num_kept = pooled if means_first else self.num_keys + pooled
        kept = (self.num_queries + num_kept) * (self.depth + self.value_depth)
        kept += self.has_gate * self.num_queries * self.value_depth
        if feature_map.uses_primal_form(queries, examples, weights, self.with_scores):
            form, sizes = "states", (self.num_queries, num_examples, num_features, self.value_depth)
            stride = examples.stride
            multiply_adds += states.multiply_adds(*sizes, self.is_causal, stride)
            multiply_adds += num_own * num_features
            written = num_features * (self.value_depth + 1)
            if feature_map.sums_come_first(queries, examples, weights):
                projected_values = num_features
                multiply_adds += num_examples * num_features * (self.width - self.value_depth)
                written += num_features * self.width
                kept -= num_kept * self.value_depth
            if self.is_causal:
                chunk = states.chunk_size(num_features)
                written += chunk * chunk * stride
                written *= states.num_chunks(self.num_queries, num_features, stride)
        else:
            form, written = "weights", self.num_queries * num_examples + num_own
            if examples.has_bands() and not (self.with_scores or is_prefix):
                form = "bands"
                written = examples.window.num_pairs(self.num_queries, self.is_causal)
            multiply_adds += written * (width + self.value_depth)
            num_features = width if feature_map.is_finite else 0
        wide = written + (self.num_queries + num_examples + num_own) * num_features
        return HeadCost(
            form=form,
            examples=num_examples,
            projected_keys=projected_keys,
            projected_values=projected_values,
            multiply_adds=multiply_adds,
            activation_bytes=_itemsize(self.dtype) * kept
            + _itemsize(accumulator(self.dtype)) * wide,
        )

    def _transforms(self, num_queries, training_set):
        """Multiply-adds of the transforms of some queries alone."""
        examples, _ = self._select(training_set, is_prefix=True)
        none = dataclasses.replace(examples, key=examples.key[:, :0])
        transforms = self.primal.transform
        return sum(one.multiply_adds(num_queries, none, self.depth) for one in transforms)

    def _select(self, training_set, is_prefix):
        """The examples of a head, and queries, of the shapes that they would have."""
        depths = self.depth, self.value_depth
        key, value = (ops.zeros((1, self.num_keys, 1, depth)) for depth in depths)
        queries = Queries(ops.zeros((1, self.num_queries, 1, self.depth)), grid=self.query_grid)
        is_restricted = self.has_mask
        if self.sliding_window is not None:
            near = training_set.within(self.sliding_window)
            is_restricted, training_set = is_restricted or near is None, near or training_set
        keys = Examples.keys(
            key,
            value,
            self.num_queries,
            self.is_causal,
            grid=self.key_grid,
            is_prefix=is_prefix,
        )
        examples = training_set.select(keys, queries)
        if self.projects_late and self.primal.may_sum_inputs(training_set):
            value = ops.zeros((*examples.value.shape[:2], 1, self.width))
            projection = Projection(ops.zeros((self.width, 1, self.value_depth)))
            examples = dataclasses.replace(examples, value=value, projections=(None, projection))
        if is_restricted:
            # What a mask holds does not matter.
            examples = dataclasses.replace(examples, visible=ops.ones((1, 1, 1, 1), dtype="bool"))
        return examples, queries.x
