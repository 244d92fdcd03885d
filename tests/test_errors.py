"""Bad arguments and inputs: one error, raised by us, the same on every backend."""

import keras
import numpy as np
import pytest

from keras_pdattn import layers, ops, transforms
from keras_pdattn.layers import PrimalDualAttention
from keras_pdattn.ops.projection import Projection


def array(*shape, dtype="float32"):
    return np.ones(shape, dtype)


X = array(2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "argument `num_heads`.*positive integer. Received: num_heads=0"),
        ({"num_heads": 2.0}, "Received: num_heads=2.0"),
        ({"num_heads": True}, "Received: num_heads=True"),
        ({"key_dim": -1}, "argument `key_dim`.*Received: key_dim=-1"),
        ({"key_dim": True}, "Received: key_dim=True"),
        ({"value_dim": 0}, "argument `value_dim`.*Received: value_dim=0"),
        ({"sliding_window": 0}, "argument `sliding_window`.*Received: sliding_window=0"),
        ({"sliding_window": True}, "Received: sliding_window=True"),
        ({"attention_axes": (1.5,)}, r"argument `attention_axes`.*attention_axes=\(1.5,\)"),
        ({"attention_axes": ()}, r"Received: attention_axes=\(\)"),
        ({"attention_axes": True}, "Received: attention_axes=True"),
        ({"dropout": 1.0}, r"argument `dropout`.*\[0, 1\). Received: dropout=1.0"),
        ({"dropout": 1.5}, "Received: dropout=1.5"),
        ({"dropout": -0.1}, "Received: dropout=-0.1"),
        ({"dropout": "half"}, "Received: dropout='half'"),
        ({"primal": "soft"}, "Unknown primal problem.*'softmax'.*Received: 'soft'"),
        ({"flash_attention": True, "dropout": 0.1}, "Dropout is not supported"),
    ],
    ids=str,
)
def test_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrimalDualAttention(**{"num_heads": 2, "key_dim": 4, **arguments})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer: layer(array(5), array(5)), "must have the shape.*query.shape"),
        (lambda layer: layer(array(5, 8), array(5, 8)), "must have the shape.*query.shape"),
        (lambda layer: layer(X, array(2, 5, 3, 8)), "the rank and the batch size"),
        (lambda layer: layer(X, array(3, 5, 8)), "the rank and the batch size"),
        (lambda layer: layer(X, X, array(2, 4, 8)), "must be equal"),
        (lambda layer: layer(X, X, array(3, 5, 8)), "must be equal"),
        (lambda layer: layer.build((2, 5, None), (2, 5, 8)), "features, must have a size"),
        (lambda layer: layer(X, X, attention_mask=array(2, 5, dtype="bool")), "For padding"),
        (lambda layer: layer(X, X, attention_mask=array(5, dtype="bool")), "For padding"),
        (
            lambda layer: layer(X, X, attention_mask=array(2, 5, 4, dtype="bool")),
            r"attention_mask.*broadcastable.*Received: attention_mask of shape \(2, 1, 5, 4\)",
        ),
        (lambda layer: layer(X, X, attention_mask=array(3, 5, 5, dtype="bool")), "attention_mask"),
        (lambda layer: layer(X, X, attention_mask=array(5, 5) * -1e9), "additive.*float32"),
        (lambda layer: layer(X, X, attention_mask=array(5, 5) * 0.5), "additive"),
        (
            lambda layer: layer(X, X, attention_mask=array(5, 5, dtype="int32") * -10000),
            "`attention_mask`.*additive.*int32",
        ),
        (lambda layer: layer(X, X, key_mask=array(2, 5, dtype="int64") * 2), "`key_mask`.*int"),
        (lambda layer: layer(X, X, query_mask=array(2, 4, dtype="bool")), "`query_mask`"),
        (lambda layer: layer(X, X, value_mask=array(5, dtype="bool")), "`value_mask`"),
        (lambda layer: layer(X, X, key_mask=array(3, 5, dtype="bool")), "`key_mask`"),
        (lambda layer: layer(X, X, key_mask=array(2, 5) - 2), "`key_mask`.*additive"),
        (lambda layer: layer(array(2, 5, 8, dtype="int32"), X), "`query` must be floating.*int32"),
        (lambda layer: layer(X, array(2, 5, 8, dtype="complex64")), "`value` must be floating"),
    ],
)
@pytest.mark.parametrize("primal", ["softmax", "batch_norm"])
def test_call(primal, call, message):
    with pytest.raises(ValueError, match=message):
        call(PrimalDualAttention(2, 4, primal=primal))


def call_with(**arguments):
    layer = PrimalDualAttention(2, 4)
    layer(X, X)
    return layer(**{"query": X, "value": X, **arguments})


def attend_to(**arguments):
    x = array(2, 5, 2, 4)
    return ops.attention(**{"query": x, "key": x, "value": x, "primal": "softmax", **arguments})


@pytest.mark.parametrize("call", [call_with, attend_to])
@pytest.mark.parametrize("name", ["query", "value", "key_mask", "query_mask"])
def test_what_is_no_tensor(call, name):
    for nothing in (object(), None) if name in ("query", "value") else (object(),):
        with pytest.raises(ValueError, match=f"`{name}` must be a tensor.* Received: {name}="):
            call(**{name: nothing})
    with pytest.raises(TypeError, match=f"`{name}` must be a tensor.* Received: {name}='words'"):
        call(**{name: "words"})


def test_a_built_layer_keeps_its_widths():
    layer = PrimalDualAttention(2, 4)
    layer(X, X)
    with pytest.raises(ValueError, match=r"built for a `query` with 8 features.*\(2, 5, 9\)"):
        layer(array(2, 5, 9), X)
    with pytest.raises(ValueError, match="built for a `value` with 8 features"):
        layer.build((2, 5, 8), (2, 5, 7))
    layer.build((2, 6, 8), (2, 3, 8))
    assert layer(array(2, 6, 8), array(2, 3, 8)).shape == (2, 6, 8)


def test_a_built_layer_keeps_its_rank():
    layer = PrimalDualAttention(2, 4)
    layer(X, X)
    with pytest.raises(ValueError, match=r"for inputs of rank 3. Received: query.shape=\(2, 3, 5"):
        layer(array(2, 3, 5, 8), array(2, 3, 5, 8))


def test_unknown_words_in_a_config_are_named():
    config = PrimalDualAttention(2, 4, primal="batch_norm").get_config()
    config["primal"]["config"]["transform"][0]["config"]["epsilonn"] = 1e-3
    # Keras puts the error of whatever it deserialises into one of its own.
    message = "BatchNorm may hold epsilon, center.*Received: epsilonn"
    with pytest.raises(ValueError, match=message):
        transforms.BatchNorm.from_config({"epsilonn": 1e-3})
    with pytest.raises(TypeError, match=message):
        PrimalDualAttention.from_config(config)


def test_symbolic_calls_raise_too():
    """Early: a model with a wrong call does not come to be."""
    inputs = keras.Input((5, 8))
    with pytest.raises(ValueError, match="`query` must be floating"):
        PrimalDualAttention(2, 4)(keras.Input((5, 8), dtype="int32"), inputs)
    with pytest.raises(ValueError, match="built for"):
        layer = PrimalDualAttention(2, 4)
        layer(inputs, inputs)
        layer(keras.Input((5, 9)), inputs)
    with pytest.raises(ValueError, match="must be equal"):
        PrimalDualAttention(2, 4)(inputs, inputs, keras.Input((4, 8)))


def test_float_masks_of_zero_and_one_are_boolean():
    """As in Keras, where their values can be read; an additive mask never gets through."""
    layer = PrimalDualAttention(2, 4)
    mask = np.tril(np.ones((5, 5)))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 8)).astype("float32")
    outputs = [layer(x, x, attention_mask=mask.astype(d)) for d in ("bool", "int32", "float32")]
    for output in outputs[1:]:
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(output), keras.ops.convert_to_numpy(outputs[0])
        )


def test_symbolic_masks():
    """Integers of 0 and 1 are Keras's way too; what a float mask means can't be seen."""
    x = keras.Input((5, 8))
    layer = PrimalDualAttention(2, 4)
    layer(x, x, attention_mask=keras.Input((5, 5), dtype="int32"))
    with pytest.raises(ValueError, match="a float mask is refused"):
        layer(keras.Input((5, 8)), x, attention_mask=keras.Input((5, 5)))


def test_attention_axes():
    x = array(2, 3, 5, 8)
    for axes in ((0,), (3,), (1, 1), (1, -3), (4,)):
        with pytest.raises(ValueError, match="`attention_axes`"):
            PrimalDualAttention(2, 4, attention_axes=axes)(x, x)
    with pytest.raises(ValueError, match="not attended over must have one size"):
        PrimalDualAttention(2, 4, attention_axes=2)(x, array(2, 4, 5, 8))
    with pytest.raises(ValueError, match="`value_mask` must have the shape"):
        PrimalDualAttention(2, 4, attention_axes=2)(x, x, value_mask=array(2, 3, dtype="bool"))


def test_a_fixed_primal_takes_no_other():
    with pytest.raises(TypeError, match="primal"):
        layers.BatchNormAttention(2, 4, primal="softmax")


def test_flash_attention_is_never_dropped_in_silence():
    scaled = layers.ScaledHeadAttention(2, 4, scales=(1, 2), flash_attention=True)
    with pytest.raises(ValueError, match="flash attention is enabled"):
        scaled(X, X, return_attention_scores=True)
    x = array(1, 3, 2, 4)
    with pytest.raises(ValueError, match="flash_attention=True"):
        ops.attention(x, x, x, "softmax", dropout=0.5, seed=1, flash_attention=True)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3, 4), (2, 3, 2, 4), (2, 3, 2, 4)], "must have the shape"),
        ([(2, 3, 2, 4), (1, 3, 2, 4), (2, 3, 2, 4)], "one batch size"),
        ([(2, 3, 2, 4), (2, 3, 3, 4), (2, 3, 3, 4)], "one number of heads"),
        ([(2, 3, 2, 4), (2, 3, 2, 4), (2, 4, 2, 4)], "one length"),
        ([(2, 3, 2, 4), (2, 3, 2, 5), (2, 3, 2, 5)], "one depth"),
    ],
)
def test_ops(shapes, message):
    with pytest.raises(ValueError, match=message):
        ops.attention(*(array(*shape) for shape in shapes), "softmax")


def test_ops_masks():
    x = array(2, 3, 2, 4)
    with pytest.raises(ValueError, match="`mask` must be broadcastable"):
        ops.attention(x, x, x, "softmax", mask=array(3, 3, dtype="bool"))
    with pytest.raises(ValueError, match="`key_mask` must have the shape"):
        ops.attention(x, x, x, "softmax", key_mask=array(2, 4, dtype="bool"))
    with pytest.raises(ValueError, match="argument `sliding_window`"):
        ops.attention(x, x, x, "softmax", sliding_window=0)
    additive = array(1, 1, 3, 3, dtype="int32") - 5
    with pytest.raises(ValueError, match="`mask` must be boolean.*additive.*int32"):
        ops.attention(x, x, x, "softmax", mask=additive)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_ops_on_integers(name):
    tensors = {one: array(2, 3, 2, 4) for one in ("query", "key", "value")}
    tensors[name] = tensors[name].astype("int32")
    with pytest.raises(ValueError, match=f"`{name}` must be floating point.*int32"):
        ops.attention(**tensors, primal="softmax")


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ({"query_grid": (2, 3)}, "must both be given"),
        ({"query_grid": (2, 3), "key_grid": (6,)}, "one number of axes"),
        ({"query_grid": (2, 2), "key_grid": (2, 3)}, "`query_grid` must hold the 6 positions"),
        ({"query_grid": (2, 3), "key_grid": (3, 3)}, "`key_grid` must hold.*Received: query_grid"),
    ],
)
def test_ops_on_grids(grids, message):
    x = array(2, 6, 2, 4)
    with pytest.raises(ValueError, match=message):
        ops.attention(x, x, x, "softmax", **grids)


def test_ops_with_weights_of_another_primal():
    x = array(2, 6, 2, 4)
    with pytest.raises(ValueError, match="here 2 in all. Received: weights of length 1"):
        ops.attention(x, x, x, "conv1d", weights=[{}])


def test_ops_with_dropout_or_forms_that_cannot_be():
    x = array(2, 6, 2, 4)
    with pytest.raises(ValueError, match="Dropout needs a `seed`.*Received: dropout=0.1, seed=No"):
        ops.attention(x, x, x, "softmax", dropout=0.1)
    with pytest.raises(ValueError, match=r"argument `dropout`.*\[0, 1\). Received: dropout=1.0"):
        ops.attention(x, x, x, "softmax", dropout=1.0, seed=1)
    with pytest.raises(ValueError, match="`form` must be.*Received: form='flash'"):
        ops.attention(x, x, x, "softmax", form="flash")
    with pytest.raises(ValueError, match="need the softmax feature map.*form='fused'"):
        ops.attention(x, x, x, "linear", form="fused")
    with pytest.raises(ValueError, match="can't be kept.*form='fused'"):
        ops.attention(x, x, x, "softmax", form="fused", return_scores=True)


def test_ops_with_projections_of_another_width():
    query, inputs = array(2, 6, 4, 3), array(2, 6, 5)
    projection = Projection(array(7, 4, 3))
    with pytest.raises(ValueError, match=r"projection of `key` takes inputs 7 wide.*\(2, 6, 5\)"):
        ops.attention(query, inputs, inputs, "softmax", projections=(projection, projection))
