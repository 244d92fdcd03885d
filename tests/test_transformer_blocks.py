"""The encoder and the decoder block: KerasHub's, with any primal problem."""

import inspect
import re

import keras
import numpy as np
import pytest
from keras import ops as keras_ops
from members import few_where_compiled
from test_layers import values

from keras_pdattn import layers, transforms
from keras_pdattn.layers.transformer_decoder import between_sequences

keras_hub = pytest.importorskip("keras_hub")
theirs = keras_hub.layers

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 6, 12)).astype("float32")
ENCODED = RNG.normal(size=(2, 5, 8)).astype("float32")
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], "bool")
ENCODED_MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], "bool")
ATTENTION_MASK = RNG.random((2, 6, 6)) < 0.7
ATTENTION_MASK |= np.eye(6, dtype="bool")
CROSS_MASK = RNG.random((2, 6, 5)) < 0.7
CROSS_MASK[:, :, 0] = True
PRIMALS = [
    "softmax",
    "batch_norm",
    "scaled_head",
    "batch_norm_scaled_head",
    "linear",
    "sliding_window",
    "conv1d",
]
ARGUMENTS = {"intermediate_dim": 16, "num_heads": 4, "layer_norm_epsilon": 1e-3}
pre_and_post = pytest.mark.parametrize("normalize_first", [False, True], ids=["post", "pre"])
every_primal = few_where_compiled(
    "primal", PRIMALS, few=["batch_norm_scaled_head", "linear", "sliding_window", "conv1d"]
)


def pair(cls, *inputs, **arguments):
    """Our block and KerasHub's with the same random weights."""
    blocks = [getattr(module, cls)(**ARGUMENTS, **arguments) for module in (layers, theirs)]
    for block in blocks:
        block(*inputs)
    weights = [RNG.normal(size=w.shape) / 3 for w in blocks[1].get_weights()]
    for block in blocks:
        block.set_weights(weights)
    return blocks


def assert_equal(results, atol=1e-6):
    ours, others = ([values(x) for x in keras.tree.flatten(one)] for one in results)
    assert len(ours) == len(others)
    for one, other in zip(ours, others):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


@pre_and_post
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_is_that_of_keras_hub(normalize_first, activation):
    blocks = pair("TransformerEncoder", X, normalize_first=normalize_first, activation=activation)
    calls = [
        {},
        {"padding_mask": MASK},
        {"padding_mask": MASK.astype("int32")},
        {"attention_mask": ATTENTION_MASK},
        {"padding_mask": MASK, "attention_mask": ATTENTION_MASK, "return_attention_scores": True},
    ]
    for options in calls:
        assert_equal([block(X, **options) for block in blocks])


@pre_and_post
def test_a_decoder_is_that_of_keras_hub(normalize_first):
    blocks = pair("TransformerDecoder", X, normalize_first=normalize_first)
    calls = [
        {},
        {"use_causal_mask": False},
        {"decoder_padding_mask": MASK},
        {"decoder_padding_mask": MASK, "decoder_attention_mask": ATTENTION_MASK},
    ]
    for options in calls:
        assert_equal([block(X, **options) for block in blocks])


@pre_and_post
def test_cross_attention_is_that_of_keras_hub(normalize_first):
    blocks = pair("TransformerDecoder", X, ENCODED, normalize_first=normalize_first)
    calls = [
        {},
        {"encoder_padding_mask": ENCODED_MASK},
        {"encoder_padding_mask": ENCODED_MASK, "encoder_attention_mask": CROSS_MASK},
        {"decoder_padding_mask": MASK, "encoder_padding_mask": ENCODED_MASK},
    ]
    for options in calls:
        assert_equal([block(X, ENCODED, **options) for block in blocks])


def steps(block, encoded=None):
    """All that a block returns when tokens come one after the other, in KerasHub's caches."""
    cache = keras_ops.zeros((2, 2, 6, 4, 3))
    results, index_of_cross, inputs = [], 0, {}
    if encoded is not None:
        cross_cache = keras_ops.zeros((2, 2, 5, 4, 3))
    for index in range(6):
        if encoded is not None:
            inputs = {
                "encoder_sequence": encoded,
                "encoder_padding_mask": ENCODED_MASK,
                "cross_attention_cache": cross_cache,
                "cross_attention_cache_update_index": index_of_cross,
            }
            index_of_cross = None
        output, cache, *cross = block(
            X[:, index : index + 1],
            self_attention_cache=cache,
            self_attention_cache_update_index=index,
            **inputs,
        )
        cross_cache = cross[0] if cross else None
        results.append((output, cache, *cross))
    return results


@pytest.mark.parametrize("encoded", [None, ENCODED], ids=["", "cross"])
def test_caches_are_those_of_keras_hub(encoded):
    inputs = [X] if encoded is None else [X, encoded]
    assert_equal([steps(block, encoded) for block in pair("TransformerDecoder", *inputs)])


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
def test_signatures_begin_with_those_of_keras_hub(name):
    for method in ("__init__", "call"):
        ours, others = (
            list(inspect.signature(getattr(getattr(module, name), method)).parameters.values())
            for module in (layers, theirs)
        )
        others = [one for one in others if one.kind is not one.VAR_KEYWORD]
        assert [(one.name, one.default) for one in ours[: len(others)]] == [
            (one.name, one.default) for one in others
        ]


@pytest.mark.parametrize(
    ("cls", "inputs"),
    [
        ("TransformerEncoder", [X]),
        ("TransformerDecoder", [X]),
        ("TransformerDecoder", [X, ENCODED]),
    ],
    ids=["encoder", "decoder", "cross"],
)
def test_weights_have_the_names_and_order_of_keras_hub(cls, inputs):
    ours, others = pair(cls, *inputs, name="block", dropout=0.1)
    paths = [
        [re.sub(r"seed_generator_\d+", "seed_generator", w.path) for w in block.variables]
        for block in (ours, others)
    ]
    assert paths[0] == paths[1]
    names = [
        [layer.name for layer in block._flatten_layers() if layer.weights]
        for block in (ours, others)
    ]
    assert names[0] == names[1]
    sublayers = [
        {name for name, one in vars(block).items() if isinstance(one, keras.layers.Layer)}
        for block in (ours, others)
    ]
    assert sublayers[0] == sublayers[1]


@every_primal
@pre_and_post
def test_an_encoder_is_its_sublayers(primal, normalize_first):
    block = layers.TransformerEncoder(
        **ARGUMENTS, primal=primal, normalize_first=normalize_first, activation="tanh"
    )
    block.build(X.shape)
    attention, norm = block._self_attention_layer, block._self_attention_layer_norm
    inputs = keras_ops.convert_to_tensor(X)
    x = norm(inputs) if normalize_first else inputs
    x = inputs + attention(x, x, value_mask=MASK)
    x = x if normalize_first else norm(x)
    norm = block._feedforward_layer_norm
    y = norm(x) if normalize_first else x
    y = x + block._feedforward_output_dense(block._feedforward_intermediate_dense(y))
    expected = y if normalize_first else norm(y)
    results = [values(x)[MASK] for x in (block(X, padding_mask=MASK), expected)]
    assert_equal(results)


@every_primal
def test_masks_go_through_a_stack(primal):
    tokens = np.array([[3, 1, 2, 4, 0, 0], [1, 2, 3, 4, 5, 1]])
    embed = keras.layers.Embedding(7, 12, mask_zero=True)
    blocks = [layers.TransformerEncoder(**ARGUMENTS, primal=primal) for _ in range(2)]
    blocks.append(layers.TransformerDecoder(**ARGUMENTS, primal=primal))
    x = y = embed(tokens)
    for block in blocks:
        block.build(x.shape)
        block.set_weights([RNG.normal(size=w.shape) / 3 for w in block.weights])
        x = block(x)
        mask = {"decoder_padding_mask" if block is blocks[2] else "padding_mask": tokens > 0}
        y = block(keras_ops.convert_to_tensor(values(y)), **mask)
    assert_equal([x, y])
    np.testing.assert_array_equal(values(keras.src.backend.get_keras_mask(x)), tokens > 0)
    # What padding holds is nobody's business.
    embed.set_weights([np.where(np.arange(7)[:, None] > 0, embed.get_weights()[0], 1e3)])
    x = embed(tokens)
    for block in blocks:
        x = block(x)
    np.testing.assert_allclose(values(x)[tokens > 0], values(y)[tokens > 0], rtol=0, atol=1e-5)


@every_primal
def test_a_decoder_decodes_what_it_gives_at_once(primal):
    block = layers.TransformerDecoder(**ARGUMENTS, primal=primal)
    full = block(X, ENCODED, encoder_padding_mask=ENCODED_MASK)
    cache = block.init_cache(2, 6)
    cross_cache = block.init_cross_attention_cache(2, 5)
    outputs = []
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 6)):
        output, cache, cross_cache = block(
            X[:, start:stop],
            ENCODED,
            encoder_padding_mask=ENCODED_MASK,
            self_attention_cache=cache,
            self_attention_cache_update_index=start,
            cross_attention_cache=cross_cache,
            cross_attention_cache_update_index=None if start else 0,
        )
        outputs.append(values(output))
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), values(full), rtol=0, atol=1e-5)


def test_cross_attention_looks_at_no_neighbours():
    assert between_sequences(layers.Conv1DAttention(4, 3).primal).transform == ()
    primal = layers.SlidingWindowAttention(4, 3).primal
    assert between_sequences(primal) == layers.PrimalDualAttention(4, 3).primal
    kept = layers.BatchNormScaledHeadAttention(4, 3).primal
    assert between_sequences(kept) == kept
    for primal in ("conv1d", "sliding_window"):
        with pytest.raises(ValueError, match="cross_attention_primal.*Received"):
            layers.TransformerDecoder(**ARGUMENTS, cross_attention_primal=primal)
    block = layers.TransformerDecoder(
        **ARGUMENTS, primal="conv1d", cross_attention_primal="batch_norm"
    )
    assert block.cross_attention_primal.transform == (transforms.BatchNorm(),)


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
def test_scores_on_request(name):
    block = getattr(layers, name)(**ARGUMENTS, primal="batch_norm")
    output, scores = block(X, return_attention_scores=True)
    assert_equal([output, block(X)])
    assert scores.shape == (2, 4, 6, 6)
    np.testing.assert_allclose(values(scores).sum(-1), 1, atol=1e-5)
    spec = block(keras.KerasTensor((None, None, 12)), return_attention_scores=True)
    assert [tuple(x.shape) for x in spec] == [(None, None, 12), (None, 4, None, None)]


def test_scores_of_both_attention_layers_and_caches():
    block = layers.TransformerDecoder(**ARGUMENTS)
    results = block(
        X,
        ENCODED,
        self_attention_cache=keras_ops.zeros((2, 2, 6, 4, 3)),
        self_attention_cache_update_index=0,
        cross_attention_cache=keras_ops.zeros((2, 2, 5, 4, 3)),
        cross_attention_cache_update_index=0,
        return_attention_scores=True,
    )
    shapes = [(2, 6, 12), (2, 4, 6, 6), (2, 4, 6, 5), (2, 2, 6, 4, 3), (2, 2, 5, 4, 3)]
    assert [tuple(x.shape) for x in results] == shapes


@pytest.mark.parametrize("primal", ["softmax", "batch_norm_scaled_head"])
def test_configs_and_files_keep_a_block(primal, tmp_path):
    inputs, encoded = keras.Input((None, 12)), keras.Input((None, 8))
    options = {**ARGUMENTS, "primal": primal, "activation": "gelu", "dropout": 0.1}
    x = layers.TransformerEncoder(**options, normalize_first=True)(inputs)
    x = layers.TransformerDecoder(**options)(x, encoded)
    model = keras.Model([inputs, encoded], x)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal([model([X, ENCODED]), loaded([X, ENCODED])], atol=0)
    for ours, again in zip(model.layers, loaded.layers):
        assert ours.get_config() == again.get_config()


def test_wrong_arguments_and_calls_are_refused():
    for name in ("TransformerEncoder", "TransformerDecoder"):
        cls = getattr(layers, name)
        with pytest.raises(ValueError, match="intermediate_dim.*Received"):
            cls(0, 4)
        with pytest.raises(ValueError, match="num_heads.*Received"):
            cls(16, 0)
        with pytest.raises(ValueError, match="dropout.*Received"):
            cls(16, 4, dropout=1.0)
        for epsilon in (0, -1e-5, float("nan"), "small"):
            with pytest.raises(ValueError, match="layer_norm_epsilon.*Received"):
                cls(16, 4, layer_norm_epsilon=epsilon)
        with pytest.raises(ValueError, match="scale.*Received"):
            cls(16, 2, primal="scaled_head")
        with pytest.raises(ValueError, match="one feature for each head.*Received"):
            cls(16, 20)(X)
    block = layers.TransformerDecoder(**ARGUMENTS)
    block(X)
    with pytest.raises(ValueError, match="in every call or in none.*Received"):
        block(X, ENCODED)
    block = layers.TransformerDecoder(**ARGUMENTS)
    block(X, ENCODED)
    with pytest.raises(ValueError, match="in every call or in none.*Received"):
        block(X)
    with pytest.raises(ValueError, match="both.*Received"):
        block(X, ENCODED, self_attention_cache=keras_ops.zeros((2, 2, 6, 4, 3)))
    encoder = layers.TransformerEncoder(**ARGUMENTS)
    with pytest.raises(ValueError, match="attention_mask.*Received"):
        encoder(X, attention_mask=MASK)


@every_primal
def test_unknown_lengths_and_padding(primal):
    inputs, mask = keras.Input((None, 12)), keras.Input((None,), dtype="bool")
    x = layers.TransformerEncoder(**ARGUMENTS, primal=primal)(inputs, padding_mask=mask)
    x = layers.TransformerDecoder(**ARGUMENTS, primal=primal)(x, decoder_padding_mask=mask)
    model = keras.Model([inputs, mask], x)
    # A fresh convolution mixes nothing.
    model.set_weights([RNG.normal(size=w.shape) / 3 for w in model.get_weights()])
    alone = model.predict([X[:1, :4], MASK[:1, :4]], verbose=0)
    padded = model.predict([np.where(MASK[..., None], X, 1e3), MASK], verbose=0)
    np.testing.assert_allclose(padded[:1, :4], alone, rtol=0, atol=1e-5)
