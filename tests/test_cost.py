"""What attention costs: hand counts, ratios, and on JAX what XLA counts."""

import backends
import keras
import numpy as np
import pytest

from keras_pdattn import Primal, analysis, feature_maps, layers, ops
from keras_pdattn.layers import projections
from keras_pdattn.training_sets import ScaledHeads, SlidingWindow

RANDOM = feature_maps.PositiveRandom(8)
BN_CONV = Primal("elu", ["batch_norm", "conv1d"])


def shape(*sizes):
    """`(batch, ..., width)`, the width being of no account to heads."""
    return (*sizes, 12)


def cross(query_length, key_length, batch=1):
    return [shape(batch, query_length), shape(batch, key_length)]


#: Two heads of depth 3: arguments, input shape, causal, and multiply-adds of the heads by hand.
HAND_COUNTS = [
    ({"primal": "softmax"}, shape(1, 5), False, 2 * 5 * 5 * (3 + 3)),
    ({"primal": "softmax"}, cross(5, 7, batch=4), False, 4 * 2 * 5 * 7 * (3 + 3)),
    ({"primal": "softmax", "value_dim": 4}, shape(1, 5), True, 2 * 5 * 5 * (3 + 4)),
    # The state of a head is 3 features times 3 values and the normaliser.
    ({"primal": "linear"}, shape(1, 5), False, 2 * (5 + 5) * 3 * 4),
    ({"primal": "linear"}, shape(1, 2), False, 2 * 2 * 2 * (3 + 3)),
    # Four chunks of 64: into states, out of them, and within chunks.
    ({"primal": "linear"}, shape(1, 200), True, 2 * (2 * 256 * 3 * 4 + 256 * 64 * (3 + 4))),
    ({"primal": RANDOM}, shape(1, 5), False, 2 * (5 * 5 * (8 + 3) + (5 + 5) * 8 * 3)),
    ({"primal": "taylor"}, shape(1, 5), False, 2 * 5 * 5 * (3 + 3)),
    # 1 + 3 + 6 features.
    ({"primal": "taylor"}, shape(1, 40), False, 2 * (40 + 40) * 10 * 4),
    # Seven blocks of 16 queries against slabs of 16 and one to either side.
    ({"primal": SlidingWindow(2)}, shape(1, 100), False, 2 * 112 * 18 * 6),
    ({"primal": SlidingWindow(2)}, shape(1, 100), True, 2 * 112 * 17 * 6),
    ({"primal": SlidingWindow(2)}, shape(1, 5), False, 2 * 5 * 5 * 6),
    # And with the global token, which sees 100.
    ({"primal": SlidingWindow(2, 1, 1)}, shape(1, 100), False, 2 * (112 * 19 + 100) * 6),
    ({"primal": "softmax", "sliding_window": 2}, shape(1, 100), False, 2 * 112 * 18 * 6),
    ({"primal": "batch_norm"}, shape(1, 5), False, 2 * 5 * 5 * 6),
    ({"primal": "batch_norm"}, shape(3, 5), True, 3 * 2 * 5 * 5 * 6),
    ({"primal": "batch_norm"}, cross(5, 7), False, 2 * 5 * 7 * 6),
    ({"primal": ScaledHeads((1, 2))}, shape(1, 5), False, 5 * 5 * 6 + 5 * 3 * 6),
    # The window a query stands in is an example of its own.
    ({"primal": ScaledHeads((1, 2))}, shape(1, 5), True, 5 * 5 * 6 + (5 * 3 + 5) * 6),
    ({"primal": ScaledHeads((3, 1))}, cross(5, 7), False, 5 * 3 * 6 + 5 * 7 * 6),
    # On a grid of 3 x 4, blocks of 2 x 2.
    ({"primal": ScaledHeads((2,))}, shape(1, 3, 4), False, 2 * 12 * 4 * 6),
    ({"primal": ("batch_norm", (1, 2))}, shape(1, 5), False, 5 * 5 * 6 + 5 * 3 * 6),
    ({"primal": ("batch_norm", (1, 2))}, shape(1, 5), True, 5 * 5 * 6 + (5 * 3 + 5) * 6),
    ({"primal": ("batch_norm", (4, 4))}, shape(2, 9), False, 2 * 2 * 9 * 3 * 6),
    # Queries and keys, three taps; causally two, and for the own window its past and itself.
    ({"primal": "conv1d"}, shape(1, 5), False, 2 * (5 * 5 * 6 + (5 + 5) * 3 * 3)),
    ({"primal": "conv1d"}, cross(5, 7), True, 2 * (5 * 7 * 6 + (5 + 7) * 2 * 3)),
    ({"primal": ("conv1d", (2, 2))}, shape(1, 5), True, 2 * (20 * 6 + (8 * 2 + 3 + 5) * 3)),
    ({"primal": "conv2d"}, shape(1, 2, 3), False, 2 * (6 * 6 * 6 + (6 + 6) * 9 * 3)),
    ({"primal": "conv2d"}, shape(1, 2, 3), True, 2 * (6 * 6 * 6 + (6 + 6) * 5 * 3)),
    ({"primal": "conv2d", "attention_axes": (1, 2)}, shape(2, 3, 3), False, 4 * (81 * 6 + 18 * 27)),
    # Each of 5 queries, and of 20 in blocks of 16, with all keys of its own.
    ({"primal": ("elu", "batch_norm")}, shape(1, 5), True, 2 * 5 * 5 * 6),
    ({"primal": ("elu", "batch_norm")}, shape(1, 20), True, 2 * 32 * 20 * 6),
    # With a convolution, which two taps of all queries and keys take for each of them.
    ({"primal": BN_CONV}, shape(1, 5), True, 2 * 5 * (5 * 6 + (5 + 5) * 2 * 3)),
    # Three chunks of 64 windows of two, and the own window's 3 features.
    (
        {"primal": Primal("elu", None, ScaledHeads((2, 2)))},
        shape(1, 300),
        True,
        2 * ((3 * 128 + 3 * 64) * 3 * 4 + 3 * 128 * 64 * (3 + 4) + 300 * 3),
    ),
]


def layer_of(primal, **arguments):
    if isinstance(primal, tuple):
        first, second = primal
        if first == "elu":
            primal = Primal(first, second)
        else:
            primal = Primal(transform=first, training_set=ScaledHeads(second))
    elif isinstance(primal, (ScaledHeads, SlidingWindow)):
        primal = Primal(training_set=primal)
    elif isinstance(primal, feature_maps.FeatureMap) or primal == "taylor":
        primal = Primal(primal)
    return layers.PrimalDualAttention(2, 3, primal=primal, **arguments)


@pytest.mark.parametrize(("arguments", "input_shape", "is_causal", "expected"), HAND_COUNTS)
def test_hand_counts(arguments, input_shape, is_causal, expected, monkeypatch):
    # As for sequences that torch, too, takes means of before it projects them.
    monkeypatch.setattr(projections, "are_better_late", lambda weight, sizes: True)
    layer = layer_of(**arguments)
    cost = analysis.cost(layer, input_shape, use_causal_mask=is_causal)
    assert cost.attention == expected
    assert not layer.built
    query_shape, value_shape = input_shape if isinstance(input_shape, list) else [input_shape] * 2
    depths = 3, arguments.get("value_dim", 3)
    layer_cost, products = cost.layers[0], np.prod(query_shape) * 2 * sum(depths)
    for head in layer_cost.heads:
        # Means of inputs are fewer than keys; causally each query has one of its own.
        projected = layer_cost.keys if is_causal else head.examples
        products += np.prod(value_shape) // layer_cost.keys * projected * sum(depths)
    assert layer_cost.projections == products
    layer.build(query_shape, value_shape)
    assert analysis.cost(layer, input_shape, use_causal_mask=is_causal).attention == expected
    assert cost.parameters == layer.count_params()
    assert cost.parameter_bytes == 4 * layer.count_params()


def test_torch_projects_few_keys_before_it_takes_means(monkeypatch):
    """On a CPU; on a GPU all keys are projected at once."""
    monkeypatch.setattr(projections.native, "runs_on_gpu", lambda: False)
    monkeypatch.setattr(projections.native, "is_cuda", lambda x: False)
    layer = layers.ScaledHeadAttention(2, 3, scales=(1, 4))
    for length in (projections.LEAST_LATE - 4, projections.LEAST_LATE):
        all_at_once = keras.backend.backend() == "torch" and length < projections.LEAST_LATE
        projected = 2 * length if all_at_once else length + length // 4
        (layer_cost,) = analysis.cost(layer, shape(1, length)).layers
        assert layer_cost.projections == 12 * 2 * 3 * (2 * length + projected)


def test_bytes_by_hand(monkeypatch):
    """Float32 and bfloat16: projections, weights or states, outputs; each head of its own."""
    monkeypatch.setattr(projections, "are_better_late", lambda weight, sizes: True)
    one_head = (5 + 5) * (3 + 3) * 4 + 5 * 5 * 4
    output = 5 * 12 * 4
    assert analysis.cost(layer_of("softmax"), shape(1, 5)).activation_bytes == 2 * one_head + output
    pooled = (5 + 3) * (3 + 3) * 4 + 5 * 3 * 4
    cost = analysis.cost(layer_of(ScaledHeads((1, 2))), shape(1, 5)).layers[0]
    assert [head.activation_bytes for head in cost.heads] == [one_head, pooled]
    assert [head.examples for head in cost.heads] == [5, 3]
    half = analysis.cost(layer_of("softmax", dtype="mixed_bfloat16"), shape(1, 5))
    assert half.activation_bytes == 2 * ((5 + 5) * 6 * 2 + 5 * 5 * 4) + output // 2
    assert half.parameter_bytes == 4 * half.parameters
    gated = analysis.cost(layer_of("softmax", use_gate=True), shape(1, 5))
    assert gated.activation_bytes == 2 * (one_head + 5 * 3 * 4) + output
    states = analysis.cost(layer_of("linear"), shape(1, 5)).layers[0].heads[0]
    assert states.activation_bytes == (5 + 5) * 6 * 4 + (5 + 5) * 3 * 4 + 3 * 4 * 4


def test_states_of_inputs_by_hand(monkeypatch):
    """Fifty inputs 12 wide, summed by 3 features, are projected three at a time."""
    monkeypatch.setattr(projections, "are_better_late", lambda weight, sizes: True)
    (cost,) = analysis.cost(layer_of("linear"), shape(2, 50)).layers
    head = cost.heads[0]
    assert (head.projected_keys, head.projected_values) == (50, 3)
    assert cost.attention == 2 * 2 * (50 * 3 * 4 + 50 * 3 * 13)
    assert cost.projections == 2 * 12 * 2 * 3 * (50 + 50 + 50 + 3)
    # Queries, keys and outputs; features; the states of inputs and of values.
    written = (50 + 50 + 50) * 3 + (50 + 50) * 3 + 3 * 12 + 3 * 4
    assert cost.activation_bytes == 2 * 4 * (2 * written + 50 * 12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_theoretical_ratios(is_causal):
    """Scaled heads 0.469; linear and windows linear in the length, softmax quadratic."""

    def attention(primal, length):
        layer = layers.PrimalDualAttention(8, 32, primal=primal)
        return analysis.cost(layer, (1, length, 256), use_causal_mask=is_causal).attention

    full, double = (attention("softmax", length) for length in (4096, 8192))
    assert double == 4 * full
    assert abs(attention("scaled_head", 4096) / full - 0.46875) < 1e-3
    assert abs(attention("batch_norm_scaled_head", 4096) / full - 0.46875) < 1e-3
    for primal in ("linear", "sliding_window"):
        assert attention(primal, 8192) == 2 * attention(primal, 4096)
    # A block of 64 queries sees its own keys and 63 to either side.
    width = 64 + 63 * (1 if is_causal else 2)
    assert attention("sliding_window", 4096) / full == width / 4096


def test_models():
    """Every call of every layer, Keras's too, as it is called; nothing of the model changes."""
    inputs = keras.Input((None, 12))
    shared = layers.ScaledHeadAttention(2, 3, scales=(1, 2), name="shared")
    x = shared(inputs, inputs)
    x = shared(x, x, use_causal_mask=True)
    mask = keras.ops.ones((1, 1, 1), dtype="bool")
    x = layers.SlidingWindowAttention(2, 3, size=2, name="masked")(x, x, attention_mask=mask)
    inner = keras.Sequential([keras.layers.Dense(12)])
    x = keras.layers.MultiHeadAttention(2, 3, name="theirs")(inner(x), x)
    model = keras.Model(inputs, x)
    before = [
        id(layer.call.__func__) for layer in model.layers if layer.name in ("shared", "theirs")
    ]
    cost = analysis.cost(model, (None, 100, 12))
    found = {(layer.name.split("/")[-1], layer.attention) for layer in cost.layers}
    assert found == {
        ("shared", 100 * 150 * 6),
        ("shared", (100 * 150 + 100) * 6),
        ("masked", 2 * 100 * 100 * 6),
        ("theirs", 2 * 100 * 100 * 6),
    }
    assert len(cost.layers) == 4
    three = sum(model.get_layer(name).count_params() for name in ("shared", "masked", "theirs"))
    assert cost.parameters == three
    assert cost.multiply_adds == cost.attention + sum(layer.projections for layer in cost.layers)
    assert analysis.cost(model, (3, 100, 12)).attention == 3 * cost.attention
    after = [
        id(layer.call.__func__) for layer in model.layers if layer.name in ("shared", "theirs")
    ]
    assert after == before


def test_layers_with_keys_of_their_own():
    layer = layers.SupportVectorAttention(20, 3, 2)
    assert analysis.cost(layer, (1, 5, 3)).attention == 5 * 20 * (3 + 2)
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, layer(inputs))
    (found,) = analysis.cost(model, (2, 7, 3)).layers
    assert (found.attention, found.keys) == (2 * 7 * 20 * (3 + 2), 20)


def test_layers_of_one_path_are_not_one():
    def block():
        inputs = keras.Input((None, 12))
        attention = layers.PrimalDualAttention(2, 3, name="attention")
        return keras.Model(inputs, attention(inputs, inputs))

    inputs = keras.Input((None, 12))
    model = keras.Model(inputs, block()(block()(inputs)))
    assert analysis.cost(model, (1, 5, 12)).parameters == model.count_params()


def test_quantized_weights_take_fewer_bytes():
    layer = layer_of("softmax")
    layer.build(shape(1, 5), shape(1, 5))
    before = analysis.cost(layer, shape(1, 5))
    layer.query_dense.quantize("int8")
    after = analysis.cost(layer, shape(1, 5))
    held = sum(w.value.nbytes for w in layer.weights) if backends.BACKEND != "tensorflow" else None
    assert after.parameter_bytes < before.parameter_bytes
    assert held in (None, after.parameter_bytes)


def test_models_with_several_inputs():
    tokens, floats = (
        keras.Input((None,), dtype="int32", name="ids"),
        keras.Input((None, 12), name="x"),
    )
    x = floats + keras.layers.Embedding(9, 12)(keras.ops.bitwise_and(tokens, tokens))
    outputs = layers.PrimalDualAttention(2, 3)(x, x)
    listed = keras.Model([tokens, floats], outputs)
    named = keras.Model({"ids": tokens, "x": floats}, outputs)
    assert analysis.cost(listed, [(1, 5), (1, 5, 12)]).attention == 2 * 5 * 5 * 6
    assert analysis.cost(named, {"ids": (1, 5), "x": (1, 5, 12)}).attention == 2 * 5 * 5 * 6
    with pytest.raises(ValueError, match="each of the model's 2 inputs"):
        analysis.cost(listed, [(1, 5)])


def test_models_of_tokens():
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(9, 12, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.LinearAttention(2, 3)(x, x, use_causal_mask=True))
    cost = analysis.cost(model, (None, 200))
    assert cost.attention == 2 * (2 * 256 * 3 * 4 + 256 * 64 * (3 + 4))
    assert {head.form for head in cost.layers[0].heads} == {"states"}


def fixed_model():
    inputs = keras.Input((5, 12))
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Reshape((60,))(inputs)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analysis.cost("model", (1, 5, 12)), "Keras layer or model. Received"),
        (lambda: analysis.cost(layer_of("softmax"), (1, None, 12)), "Received: input_shape=None"),
        (lambda: analysis.cost(layer_of("softmax"), (1, 5, 12), 1), "use_causal_mask=1"),
        (lambda: analysis.cost(layer_of("softmax"), ()), r"a pair of them.*input_shape=\(\)"),
        (lambda: analysis.cost(layer_of("softmax"), [(1, 5, 12)] * 3), "a pair of them"),
        (lambda: analysis.cost(layer_of("softmax"), (1, 5)), "must have the shape"),
        (lambda: analysis.cost(keras.Sequential([keras.layers.Dense(3)]), (1, 5)), "must be built"),
        (lambda: analysis.cost(fixed_model(), (1, 5, 12), True), "seen from the model.*=True"),
        (
            lambda: analysis.cost(fixed_model(), (1, 6, 12)),
            "can't be called on inputs of this shap",
        ),
        (
            lambda: analysis.cost(
                keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)]), (1, 5)
            ),
            "has no `keras.layers.MultiHeadAttention`",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


if backends.BACKEND == "jax":
    COUNTED = [
        ("softmax", False),
        ("softmax", True),
        ("linear", False),
        ("linear", True),
        ("sliding_window", False),
        ("sliding_window", True),
        ("batch_norm", False),
        ("batch_norm", True),
        ("scaled_head", False),
        ("scaled_head", True),
        ("batch_norm_scaled_head", False),
        ("batch_norm_scaled_head", True),
        ("conv1d", False),
        ("conv1d", True),
        ("conv2d", False),
        (Primal(feature_maps.PositiveRandom(256)), False),
        (Primal(training_set=SlidingWindow(32, 2, 1)), False),
        (Primal("elu", "batch_norm", ScaledHeads((1, 2))), False),
    ]

    @pytest.mark.parametrize(("primal", "is_causal"), COUNTED, ids=str)
    def test_xla_counts_as_much(primal, is_causal):
        """Twice the multiply-adds are XLA's floating-point operations, to 5 %.

        Heads are deep here, so that work for each number of a tensor hardly counts.
        """
        import jax

        layer = layers.PrimalDualAttention(4, 128, primal=primal)
        grid = (32, 32) if primal == "conv2d" else None
        shape = (1, 1024, 512) if grid is None else (1, *grid, 512)
        layer.build(shape, shape)
        cost = analysis.cost(layer, shape, use_causal_mask=is_causal)
        # XLA counts the body of a loop over blocks once, whatever the number of blocks.
        has_all_pairs = {head.form for head in cost.layers[0].heads} == {"weights"}
        options = {"query_grid": grid, "key_grid": grid, "form": "whole"}

        def heads(query, key, value):
            return ops.attention(query, key, value, layer.primal, is_causal=is_causal, **options)

        def whole(x):
            return layer(x, x, use_causal_mask=is_causal)

        # Compiled, as a cumulative sum is quadratic in the length before that.
        if has_all_pairs:
            count, lowered = cost.attention, jax.jit(heads).lower(*np.zeros((3, 1, 1024, 4, 128)))
        else:
            count, lowered = cost.multiply_adds, jax.jit(whole).lower(np.zeros(shape))
        assert abs(2 * count / lowered.compile().cost_analysis()["flops"] - 1) < 0.05
