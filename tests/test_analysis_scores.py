"""Scores of whole models: those of each layer called by itself, and a model left as it was."""

import warnings

import keras
import numpy as np
import pytest
import reference
from backends import to_numpy
from keras import ops as keras_ops

from keras_pdattn import analysis, layers
from keras_pdattn.analysis.calls import attention_calls

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(2, 5, 8)).astype("float32")
PADDED = X.copy()
PADDED[1, 3:] = 0
MASK = np.array([[True] * 5, [True] * 3 + [False] * 2])


def ours(**arguments):
    return layers.BatchNormAttention(2, 4, **arguments)


def grouped(**arguments):
    return keras.layers.GroupQueryAttention(4, 2, 1, **arguments)


def multi_head(**arguments):
    return keras.layers.MultiHeadAttention(2, 4, **arguments)


def close(actual, expected):
    np.testing.assert_allclose(actual, to_numpy(keras_ops.convert_to_tensor(expected)), atol=1e-6)


class Block(keras.layers.Layer):
    """A layer with attention inside, which it calls twice, once asking for scores."""

    def __init__(self, attention, **kwargs):
        super().__init__(**kwargs)
        self.attention = attention

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        x, scores = self.attention(x, x, return_attention_scores=True)
        assert scores.shape[-1] == x.shape[1]
        return self.attention(x, x, use_causal_mask=True)


class Subclassed(keras.Model):
    """A model that is not built before it is called, with dropout and batch normalisation."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = keras.layers.BatchNormalization()
        self.block = Block(ours(name="mine"), name="block")
        self.dropout = keras.layers.Dropout(0.5, seed=1)
        self.last = {"attention": multi_head(name="last")}

    def call(self, inputs, training=None):
        x = self.dropout(self.block(self.norm(inputs)))
        return self.last["attention"](x, x)


@pytest.mark.parametrize("make", [ours, grouped, multi_head], ids=lambda make: make.__name__)
def test_a_layer_by_itself(make):
    layer = make(name="attention")
    output, expected = layer(X, Y, return_attention_scores=True)
    scores = analysis.attention_scores(layer, (X, Y))
    assert list(scores) == ["attention"]
    assert scores["attention"].dtype == "float32" and isinstance(scores["attention"], np.ndarray)
    close(scores["attention"], expected)
    masks = {"value_mask": MASK, "use_causal_mask": True}
    _, expected = layer(X, Y, return_attention_scores=True, **masks)
    masked = analysis.attention_scores(layer, {"query": X, "value": Y, **masks})
    close(masked["attention"], expected)
    assert np.abs(masked["attention"] - scores["attention"]).max() > 0.1
    close(to_numpy(layer(X, Y)), output)


@pytest.mark.parametrize("cls", [keras.layers.Attention, keras.layers.AdditiveAttention])
def test_attention_without_heads_counts_as_one(cls):
    layer = cls(name="attention")
    _, expected = layer([X, Y], return_attention_scores=True)
    (scores,) = analysis.attention_scores(layer, [X, Y]).values()
    assert scores.shape == (2, 1, 5, 5)
    close(scores[:, 0], expected)


def test_a_model_of_all_of_them():
    """Nested, shared and called again: each call's scores are those of its layer on its input."""
    shared = ours(name="shared")
    inner_inputs = keras.Input((5, 8))
    inner = keras.Model(inner_inputs, grouped(name="inner")(inner_inputs, inner_inputs))
    inputs = keras.Input((5, 8))
    x = shared(inputs, inputs)
    x = inner(x)
    x = Block(multi_head(name="two"), name="block")(x)
    x = keras.layers.Attention(name="flat")([x, x])
    model = keras.Model(inputs, shared(x, inputs))

    scores = analysis.attention_scores(model, X)
    # The path of a layer that is called by a Functional model depends on where it was built.
    names = [name.split("/")[-1] for name in scores]
    assert names == ["shared", "inner", "two", "two#2", "flat", "shared#2"]
    assert all(x.shape[0] == 2 and x.shape[2:] == (5, 5) for x in scores.values())
    got = dict(zip(names, scores.values()))

    x, expected = shared(X, X, return_attention_scores=True)
    close(got["shared"], expected)
    x, expected = inner.layers[1](x, x, return_attention_scores=True)
    close(got["inner"], expected)
    two = model.get_layer("block").attention
    x, expected = two(x, x, return_attention_scores=True)
    close(got["two"], expected)
    x, expected = two(x, x, return_attention_scores=True, use_causal_mask=True)
    close(got["two#2"], expected)
    x, expected = model.get_layer("flat")([x, x], return_attention_scores=True)
    close(got["flat"][:, 0], expected)
    x, expected = shared(x, X, return_attention_scores=True)
    close(got["shared#2"], expected)


def test_equals_the_oracle():
    """The projections in float64, the definition between them."""
    inputs = keras.Input((5, 8))
    masked = keras.layers.Masking()(inputs)
    layer = ours(name="attention")
    model = keras.Model(inputs, layer(masked, masked, use_causal_mask=True))
    scores = analysis.attention_scores(model, PADDED)["attention"]
    weights = {w.path.split("/", 1)[1]: to_numpy(w.value) for w in layer.weights}
    query, key, value = (
        np.einsum("btc,chd->bthd", PADDED.astype("float64"), weights[f"{name}/kernel"])
        for name in ("query", "key", "value")
    )
    primal = reference.Primal(transforms=(reference.BatchNorm(),))
    masks = {"key_mask": MASK, "query_mask": MASK}
    _, expected = reference.attention(query, key, value, primal, is_causal=True, **masks)
    np.testing.assert_allclose(scores, expected, atol=2e-5)


@pytest.mark.parametrize("make", [ours, multi_head], ids=lambda make: make.__name__)
@pytest.mark.parametrize("kind", ["masking", "embedding"])
def test_attached_masks_act_and_are_recorded(make, kind):
    attention = make(name="attention")
    if kind == "masking":
        inputs, data = keras.Input((5, 8)), PADDED
        masked = keras.layers.Masking()(inputs)
    else:
        inputs, data = keras.Input((5,), dtype="int32"), MASK * np.arange(1, 6)
        masked = keras.layers.Embedding(6, 8, mask_zero=True)(inputs)
    model = keras.Model(inputs, attention(masked, masked))
    before = to_numpy(model(data))
    (call,) = attention_calls(model, data)
    assert call.layer is attention
    for name in ("query", "value", "key"):
        np.testing.assert_array_equal(
            keras_ops.convert_to_numpy(call.arguments[f"{name}_mask"]), MASK
        )
        assert call.arguments[name].shape == (2, 5, 8)
    assert call.arguments["use_causal_mask"] is False
    assert np.abs(call.scores[1, :, :3, 3:]).max() == 0
    assert np.abs(call.scores[1, :, :3, :3]).min() > 0
    close(to_numpy(model(data)), before)


def test_arguments_have_one_vocabulary():
    """Explicit masks win over attached ones, lists are taken apart, and a key is always there."""
    (call,) = attention_calls(ours(), {"query": X, "value": Y, "value_mask": MASK})
    np.testing.assert_array_equal(keras_ops.convert_to_numpy(call.arguments["value_mask"]), MASK)
    assert call.arguments["query_mask"] is None and call.arguments["key_mask"] is None
    close(to_numpy(call.arguments["key"]), Y)
    layer = keras.layers.Attention()
    (call,) = attention_calls(layer, {"inputs": [X, Y, 2 * X], "mask": [None, MASK]})
    close(to_numpy(call.arguments["key"]), 2 * X)
    np.testing.assert_array_equal(keras_ops.convert_to_numpy(call.arguments["value_mask"]), MASK)
    assert not {"inputs", "mask"} & set(call.arguments)


def test_several_attended_axes():
    images = np.random.default_rng(0).normal(size=(1, 2, 3, 8)).astype("float32")
    scores = analysis.attention_scores(layers.PrimalDualAttention(2, 4), (images, images))
    assert [x.shape for x in scores.values()] == [(1, 2, 2, 3, 2, 3)]


def test_axes_that_are_not_attended_follow_the_batch():
    images = np.random.default_rng(0).normal(size=(2, 2, 3, 8)).astype("float32")
    layer = ours(attention_axes=(2,))
    (scores,) = analysis.attention_scores(layer, (images, images)).values()
    assert scores.shape == (2, 2, 2, 3, 3)
    close(scores, layer(images, images, return_attention_scores=True)[1])


def test_a_layer_with_keys_of_its_own():
    layer = layers.SupportVectorAttention(7, 8, 2)
    (call,) = attention_calls(layer, (X,))
    close(call.scores, layer(X, return_attention_scores=True)[1])
    assert call.arguments["value"] is call.arguments["key"] is None


def test_half_precision_is_widened():
    (scores,) = analysis.attention_scores(ours(dtype="bfloat16"), (X, Y)).values()
    assert scores.dtype == "float32"
    np.testing.assert_allclose(scores.sum(axis=-1), 1, atol=2e-2)


def snapshot(model):
    """What must not change: attributes, configs and values of a model and all its layers."""
    attributes = [
        {name: id(value) for name, value in vars(layer).items()}
        for layer in model._flatten_layers()
    ]
    state = [to_numpy(variable.value) for variable in model.variables]
    return attributes, model.get_config(), state


def assert_unchanged(model, before):
    attributes, config, state = snapshot(model)
    assert attributes == before[0]
    assert config == before[1]
    for value, earlier in zip(state, before[2]):
        np.testing.assert_array_equal(value, earlier)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training):
    """Moving statistics, the seed of dropout and what a layer keeps between calls included."""
    inputs = keras.Input((5, 8))
    x = keras.layers.BatchNormalization()(inputs)
    x = keras.layers.Dropout(0.5, seed=1)(x)
    x = grouped()(x, x)
    model = keras.Model(inputs, ours()(x, x))
    model.compile("sgd", "mse")
    model.fit(X, X, verbose=0)
    before, output = snapshot(model), to_numpy(model(X))
    compiled = model.get_compile_config()
    scores = list(analysis.attention_scores(model, X, training=training).values())
    assert_unchanged(model, before)
    again = list(analysis.attention_scores(model, X, training=training).values())
    np.testing.assert_array_equal(scores[0], again[0])
    close(to_numpy(model(X)), output)
    assert model.compiled and model.get_compile_config() == compiled
    plain = list(analysis.attention_scores(model, X).values())
    assert (np.abs(plain[0] - scores[0]).max() > 1e-3) == training
    model.fit(X, X, verbose=0)


def test_a_model_that_is_not_built():
    """It is built as by a call; then paths are those of the weights."""
    model = Subclassed(name="model")
    scores = analysis.attention_scores(model, X, training=True)
    assert list(scores) == ["model/block/mine", "model/block/mine#2", "model/last"]
    before = snapshot(model)
    again = analysis.attention_scores(model, X, training=True)
    assert_unchanged(model, before)
    np.testing.assert_array_equal(scores["model/last"], again["model/last"])


def test_the_model_is_left_as_it_was_after_an_error():
    class Fails(keras.layers.Layer):
        fails = False

        def call(self, x):
            if self.fails:
                self.left_behind = True
                raise RuntimeError("on purpose")
            return x

    inputs = keras.Input((5, 8))
    fails = Fails()
    model = keras.Model(inputs, fails(ours()(inputs, inputs)))
    output = to_numpy(model(X))
    fails.fails = True
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        analysis.attention_scores(model, X)
    assert_unchanged(model, before)
    fails.fails = False
    close(to_numpy(model(X)), output)


def test_rematerialised_layers_can_be_read():
    """What is to be computed again in the backward pass, JAX only traces."""
    with keras.RematScope(mode="full"):
        layer = ours()
    plain = ours()
    for one in (layer, plain):
        one.build(X.shape, X.shape)
    plain.set_weights(layer.get_weights())
    (scores,) = analysis.attention_scores(layer, (X, X)).values()
    _, expected = plain(X, X, return_attention_scores=True)
    close(scores, expected)
    assert layer._remat_mode is not None


def test_subclasses_with_more_results_and_keywords():
    """KerasHub's cached attention returns its cache behind the scores; others take `**kwargs`."""

    class Cached(keras.layers.MultiHeadAttention):
        def call(self, query, value, cache=None, **kwargs):
            result = super().call(query, value, **kwargs)
            result = result if isinstance(result, tuple) else (result,)
            return (*result, query) if cache else result[0] if len(result) == 1 else result

    class Outer(keras.layers.Layer):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def build(self, shape):
            self.attention.build(shape, shape)

        def call(self, x):
            cached = self.attention(x, x, cache=True, use_causal_mask=True)
            plain = self.attention(x, x)
            assert isinstance(cached, tuple) and not isinstance(plain, tuple)
            return cached[0] + cached[1] + plain

    attention = Cached(2, 4)
    outer = Outer(attention)
    expected = to_numpy(outer(X))
    first, second = attention_calls(outer, X)
    assert first.arguments["cache"] is True and first.arguments["use_causal_mask"] is True
    assert second.arguments["cache"] is None
    assert np.triu(first.scores, 1).max() == 0 < np.triu(second.scores, 1).max()
    close(to_numpy(outer(X)), expected)


def test_keras_hub():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras_hub = pytest.importorskip("keras_hub")
    attention = keras_hub.layers.CachedMultiHeadAttention(2, 4, name="attention")
    _, expected = attention(X, Y, return_attention_scores=True)
    close(analysis.attention_scores(attention, (X, Y))["attention"], expected)
    cache = np.zeros((2, 2, 5, 2, 4), "float32")
    cached = {"query": X, "value": X, "cache": cache, "cache_update_index": 0}
    _, expected, _ = attention(**cached, return_attention_scores=True)
    close(analysis.attention_scores(attention, cached)["attention"], expected)
    decoder = keras_hub.layers.TransformerDecoder(16, 2, name="decoder")
    scores = analysis.attention_scores(decoder, (X, Y))
    assert [x.shape for x in scores.values()] == [(2, 2, 5, 5)] * 2
    own, cross = scores.values()
    assert np.triu(own, 1).max() == 0 < np.triu(cross, 1).max()


class NoScores(keras.layers.MultiHeadAttention):
    def call(self, query, value):
        return super().call(query, value)


class NoneScores(keras.layers.MultiHeadAttention):
    def _compute_attention(self, *args, **kwargs):
        return super()._compute_attention(*args, **kwargs)[0], None


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (lambda: "model", X, "must be a Keras model or layer. Received: model='model'"),
        (lambda: keras.layers.Dense(3), X, "has no attention layer. Received: model=<Dense"),
        (
            ours,
            X,
            "`inputs` must hold the arguments of Batch.*'value'. Received: inputs of type nd",
        ),
        (ours, {"query": X, "values": X}, "'value'. Received: inputs of type dict"),
        (ours, (keras.Input((5, 8)),) * 2, r"not symbolic. Received: inputs=\(<KerasTensor"),
        (
            lambda: multi_head(flash_attention=True, name="fast"),
            (X, X),
            "flash attention can't return.* Received: layer 'fast' with flash_attention=True",
        ),
        (
            lambda: ours(flash_attention=True, name="fast"),
            (X, X),
            "Received: layer 'fast' with flash_attention=True",
        ),
        (
            lambda: NoScores(2, 4, name="mine"),
            (X, X),
            "`return_attention_scores`.* Received: layer 'mine' of type NoScores",
        ),
        (
            lambda: NoneScores(2, 4, name="mine"),
            (X, X),
            "must compute scores when asked to. Received: scores=None from layer 'mine'",
        ),
    ],
)
def test_errors(make, inputs, message):
    with pytest.raises(ValueError, match=message):
        analysis.attention_scores(make(), inputs)
