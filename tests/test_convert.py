"""Existing models with other attention: the same weights, files, methods and generated text."""

import pickle
import subprocess
import sys
import warnings

import backends
import keras
import numpy as np
import pytest
from members import few_where_compiled
from test_layers import values

import keras_pdattn
from keras_pdattn import Primal, layers, training_sets

keras_hub = pytest.importorskip("keras_hub")

RNG = np.random.default_rng(0)
IDS = RNG.integers(1, 30, (2, 7))
MASK = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]], "int32")
IMAGES = RNG.normal(size=(2, 8, 8, 3)).astype("float32")
TEXT = {"token_ids": IDS, "padding_mask": MASK}
SIZES = {"vocabulary_size": 30, "num_layers": 2, "num_heads": 4, "hidden_dim": 16}
SIZES |= {"intermediate_dim": 24, "max_sequence_length": 12}
VISION = {"num_layers": 2, "num_heads": 4, "hidden_dim": 16}


def backbone(name):
    """A small model of KerasHub's, and inputs for it."""
    cls = getattr(keras_hub.models, f"{name}Backbone")
    if name in ("GPT2", "OPT", "Roberta", "DistilBert"):
        return cls(**SIZES), TEXT
    if name == "Bert":
        return cls(**SIZES), {**TEXT, "segment_ids": IDS % 2}
    if name == "Bart":
        inputs = {f"{part}_{key}": x for part in ("encoder", "decoder") for key, x in TEXT.items()}
        return cls(**SIZES), inputs
    if name in ("ViT", "DeiT"):
        sizes = {"mlp_dim": 24} if name == "ViT" else {"intermediate_dim": 24}
        return cls((8, 8, 3), 4, **VISION, **sizes), IMAGES
    sizes = {"intermediate_dim": 24, "patch_size": 4, "image_shape": (8, 8, 3)}
    cls = getattr(keras_hub.models, f"{name}VisionEncoder")
    return cls(**VISION, **sizes), {"images": IMAGES}


NAMES = ["Bert", "Roberta", "DistilBert", "GPT2", "OPT", "Bart", "ViT", "DeiT", "CLIP", "SigLIP"]
every_backbone = few_where_compiled("name", NAMES, few=["Bert", "GPT2", "Bart", "ViT", "SigLIP"])


def randomized(model):
    rng = np.random.default_rng(1)
    model.set_weights(
        [0.4 * rng.normal(size=w.shape) if w.dtype.kind == "f" else w for w in model.get_weights()]
    )
    return model


def quietly_converted(model, primal):
    """Converted; that SigLIP's pooling stays as it is, is tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return keras_pdattn.convert(model, primal)


def outputs(model, inputs):
    """All outputs; of tokens, those that are not padding."""
    found = [values(x) for x in keras.tree.flatten(model(inputs))]
    if not isinstance(inputs, dict) or "images" in inputs:
        return found
    return [x[MASK > 0] if x.shape[:2] == MASK.shape else x for x in found]


def assert_equal(some, others, atol):
    assert len(some) == len(others)
    for one, other in zip(some, others):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def attention_layers(model):
    return [x for x in model._flatten_layers() if isinstance(x, keras.layers.MultiHeadAttention)]


@every_backbone
def test_softmax_is_the_identity(name):
    model, inputs = backbone(name)
    randomized(model)
    converted = quietly_converted(model, "softmax")
    assert isinstance(converted, type(model))
    assert_equal(outputs(converted, inputs), outputs(model, inputs), atol=2e-6)
    # The model itself stays what it was.
    assert not any(isinstance(x, layers.PrimalDualAttention) for x in attention_layers(model))
    kept = [x for x in attention_layers(converted) if type(x) is not layers.PrimalDualAttention]
    assert len(kept) == (name == "SigLIP")
    shapes = [[w.shape for w in one.weights] for one in (converted, model)]
    assert shapes[0] == shapes[1]


@every_backbone
def test_what_is_converted_attends_otherwise_and_is_saved(name, tmp_path):
    model, inputs = backbone(name)
    converted = quietly_converted(randomized(model), "batch_norm_scaled_head")
    expected = outputs(converted, inputs)
    assert max(np.abs(a - b).max() for a, b in zip(expected, outputs(model, inputs))) > 1e-2
    converted.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, type(model))
    assert_equal(outputs(loaded, inputs), expected, atol=0)
    again = type(loaded).from_config(loaded.get_config())
    again.set_weights(loaded.get_weights())
    assert_equal(outputs(again, inputs), expected, atol=0)


@keras.saving.register_keras_serializable(package="test_convert")
class Block(keras.layers.Layer):
    """A block of somebody's that makes its attention when it is built, and knows how to rebuild."""

    def build(self, shape):
        self.attention = keras.layers.MultiHeadAttention(2, 8, name="attention")
        self.attention.build(shape, shape)

    def call(self, x, mask=None):
        return x + self.attention(x, x, value_mask=mask)


@keras.saving.register_keras_serializable(package="test_convert")
class Unregistered(Block):
    """Another class, of which nobody has said anything."""


SEQUENCE = RNG.normal(size=(2, 7, 16)).astype("float32")


def functional():
    """Attention as a layer of the graph, in a model in it and in KerasHub's block."""
    x = inputs = keras.Input((None, 16))
    inner_inputs = keras.Input((None, 16))
    attention = keras.layers.MultiHeadAttention(2, 8, name="inner")
    inner = keras.Model(inner_inputs, attention(inner_inputs, inner_inputs))
    x = keras.layers.MultiHeadAttention(2, 8, name="outer")(x, x)
    x = keras_hub.layers.TransformerEncoder(24, 4, name="encoder")(inner(x))
    return keras.Model(inputs, x)


def with_block(cls):
    return keras.Sequential([keras.Input((None, 16)), cls(), keras.layers.Dense(3)])


def test_functional_models_and_those_in_them():
    model = randomized(functional())
    assert_equal(
        outputs(keras_pdattn.convert(model, "softmax"), SEQUENCE), outputs(model, SEQUENCE), 2e-6
    )
    converted = keras_pdattn.convert(model, "batch_norm")
    assert type(converted) is type(model)
    assert type(converted.get_layer("outer")) is layers.PrimalDualAttention
    assert type(converted.get_layer("encoder")) is layers.TransformerEncoder
    assert len([x for x in attention_layers(converted) if x.primal.transform]) == 3


def test_layers_of_the_same_path_are_all_converted():
    x = inputs = keras.Input((None, 16))
    for index in range(2):
        own = keras.Input((None, 16))
        attention = keras.layers.MultiHeadAttention(2, 8, name="attention")
        x = keras.Model(own, attention(own, own), name=f"part_{index}")(x)
    converted = keras_pdattn.convert(keras.Model(inputs, x), "batch_norm")
    kinds = [type(one) for one in attention_layers(converted)]
    assert kinds == 2 * [layers.PrimalDualAttention]


@pytest.mark.parametrize("is_saved", [False, True], ids=["", "saved"])
def test_a_registered_block(is_saved, tmp_path):
    keras_pdattn.register_block(Block, "attention")
    model = randomized(with_block(Block))
    converted = keras_pdattn.convert(model, "batch_norm")
    x = values(model.layers[0].attention(SEQUENCE, SEQUENCE))
    ours = layers.BatchNormAttention(2, 8)
    ours.build(SEQUENCE.shape, SEQUENCE.shape)
    ours.set_weights(model.layers[0].attention.get_weights())
    assert np.abs(values(ours(SEQUENCE, SEQUENCE)) - x).max() > 1e-2
    expected = values(model.layers[1](SEQUENCE + values(ours(SEQUENCE, SEQUENCE))))
    if is_saved:
        converted.save(tmp_path / "model.keras")
        converted = keras.saving.load_model(tmp_path / "model.keras")
        assert isinstance(converted.layers[0], Block)
    assert_equal(outputs(converted, SEQUENCE), [expected], atol=1e-5)


READER = """
import pickle, sys
import keras_pdattn, keras, numpy as np
for name, (path, inputs, expected) in pickle.load(open(sys.argv[1], "rb")).items():
    found = keras.tree.flatten(keras.saving.load_model(path)(inputs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(one), other, rtol=0, atol=1e-6)
"""


def test_files_need_no_more_than_our_import(tmp_path):
    models = {name: backbone(name) for name in ("Bert", "GPT2", "ViT")}
    models["Functional"] = functional(), SEQUENCE
    files = {}
    for name, (model, inputs) in models.items():
        primal = "conv1d" if name == "GPT2" else "batch_norm"
        converted = randomized(keras_pdattn.convert(model, primal))
        path = str(tmp_path / f"{name}.keras")
        converted.save(path)
        expected = [values(x) for x in keras.tree.flatten(converted(inputs))]
        files[name] = path, inputs, expected
    (tmp_path / "files").write_bytes(pickle.dumps(files))
    command = [sys.executable, "-c", READER, str(tmp_path / "files")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_primal_may_differ_from_layer_to_layer():
    model, _ = backbone("Bert")
    seen = []

    def primal(path, index):
        seen.append((path, index))
        return ["batch_norm", None][index]

    with pytest.warns(UserWarning, match="transformer_layer_1.*`primal` gave None"):
        converted = keras_pdattn.convert(model, primal)
    assert seen == [("transformer_layer_0", 0), ("transformer_layer_1", 1)]
    assert converted.transformer_layers[0].primal == Primal(transform="batch_norm")
    assert type(converted.transformer_layers[1]) is keras_hub.layers.TransformerEncoder
    again = type(converted).from_config(converted.get_config())
    assert again.transformer_layers[0].primal == Primal(transform="batch_norm")
    assert type(again.transformer_layers[1]) is keras_hub.layers.TransformerEncoder


def test_what_is_left_is_named_with_the_reason():
    inputs = keras.Input((None, 16))
    x = keras.layers.MultiHeadAttention(2, 8, name="plain")(inputs, inputs)
    x = Unregistered(name="block")(x)
    x = keras.layers.GroupQueryAttention(8, 2, 1, name="grouped")(x, x)
    x = layers.LinearAttention(2, 8, name="ours")(x, x)
    with pytest.warns(UserWarning) as caught:
        keras_pdattn.convert(keras.Model(inputs, x), "batch_norm")
    (message,) = [str(one.message) for one in caught if "Not converted" in str(one.message)]
    assert "block/attention` (MultiHeadAttention): `register_block` has not been told" in message
    assert "`grouped` (GroupedQueryAttention): GroupedQueryAttention has an attention" in message
    assert "`ours` (LinearAttention): it has a primal problem" in message
    assert "plain" not in message


def test_frozen_layers_stay_frozen_and_weights_are_copies():
    model = functional()
    model.get_layer("outer").trainable = False
    converted = keras_pdattn.convert(model, "softmax")
    assert not converted.get_layer("outer").trainable
    assert converted.get_layer("encoder").trainable
    before = model.get_weights()
    converted.set_weights([w + 1 for w in converted.get_weights()])
    assert_equal(model.get_weights(), before, atol=0)


@pytest.mark.parametrize("name", ["functional", "GPT2", "block"])
def test_all_weights_of_a_converted_model_train(name):
    keras_pdattn.register_block(Block, "attention")
    models = {"functional": functional, "block": lambda: with_block(Block)}
    model, inputs = (models[name](), SEQUENCE) if name in models else backbone(name)
    converted = keras_pdattn.convert(model, "conv1d")
    kernels = [w for w in converted.trainable_weights if w.path.endswith("Conv1D_0_kernel")]
    assert len(kernels) == {"functional": 3, "GPT2": 2, "block": 1}[name]
    before = [values(w) for w in kernels]
    converted.compile(keras.optimizers.SGD(1.0), "mse")
    target = RNG.normal(size=np.shape(values(converted(inputs))))
    converted.fit(inputs, target, verbose=0)
    assert all((values(w) != b).any() for w, b in zip(kernels, before))
    outputs(model, inputs)  # Whose weights are still there.


CAUSAL = {
    "softmax": "softmax",
    "batch_norm": "batch_norm",
    "scaled_head": "scaled_head",
    "both": "batch_norm_scaled_head",
    "linear": "linear",
    "window": Primal(training_set=training_sets.SlidingWindow(3)),
    "conv1d": "conv1d",
    "random": Primal("positive_random", "conv1d", training_sets.ScaledHeads((1, 2))),
}
PROMPTS = np.zeros((2, 12), "int32")
PROMPTS[0, :4], PROMPTS[1, :2] = [1, 2, 3, 4], [5, 6]
PROMPT = {"token_ids": PROMPTS, "padding_mask": (PROMPTS > 0).astype("int32")}


def uncached(model):
    """Greedy tokens from calls on all tokens so far."""
    tokens, length = PROMPTS.copy(), PROMPTS.shape[1]
    for index in range(2, length):
        mask = np.arange(length) < index
        logits = model({"token_ids": tokens, "padding_mask": np.tile(mask, (2, 1))})
        best = values(logits)[:, index - 1].argmax(-1)
        tokens[:, index] = np.where(PROMPTS[:, index] > 0, PROMPTS[:, index], best)
    return tokens


#: By position, a state and a ring.
CACHES = ["batch_norm", "linear", "window"]


@few_where_compiled("name", list(CAUSAL), few=[*CACHES, "random"])
def test_a_converted_gpt2_generates(name):
    model = keras_hub.models.GPT2CausalLM(backbone=backbone("GPT2")[0], preprocessor=None)
    converted = randomized(keras_pdattn.convert(model, CAUSAL[name]))
    assert type(converted) is keras_hub.models.GPT2CausalLM
    converted.compile(sampler="greedy")
    tokens = values(converted.generate(PROMPT, stop_token_ids=None)["token_ids"])
    assert (tokens[PROMPTS > 0] == PROMPTS[PROMPTS > 0]).all()
    np.testing.assert_array_equal(tokens, uncached(converted))


SAMPLERS = {"top_k": lambda: keras_hub.samplers.TopKSampler(k=3, seed=0), "beam": lambda: "beam"}


@few_where_compiled("name", list(CAUSAL), few=CACHES)
@few_where_compiled("sampler", SAMPLERS, few=["beam"])
def test_other_samplers_take_every_kind_of_cache(name, sampler):
    """A beam reorders them."""
    model = keras_hub.models.GPT2CausalLM(backbone=backbone("GPT2")[0], preprocessor=None)
    converted = randomized(keras_pdattn.convert(model, CAUSAL[name]))
    converted.compile(sampler=sampler())
    tokens = values(converted.generate(PROMPT, stop_token_ids=None)["token_ids"])
    assert (tokens[PROMPTS > 0] == PROMPTS[PROMPTS > 0]).all()
    assert (tokens > 0).any(axis=0)[4:].all()


def test_a_converted_gpt2_keeps_its_tokenizer_and_is_saved(tmp_path):
    merges = ["\u0120 q", "u i", "c k", "ui ck", "\u0120q uick", "\u0120 f", "o x", "\u0120f ox"]
    tokens = ["<|endoftext|>", *"aquickfox\u0120", *(one.replace(" ", "") for one in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=12)
    model = keras_hub.models.GPT2CausalLM(backbone("GPT2")[0], preprocessor)
    converted = keras_pdattn.convert(model, "batch_norm")
    converted.compile(sampler="greedy")
    text = converted.generate("a quick fox", max_length=8)
    converted.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.compile(sampler="greedy")
    assert loaded.generate("a quick fox", max_length=8) == text
    assert text.startswith("a quick fox")


def test_a_converted_bart_generates():
    model = keras_hub.models.BartSeq2SeqLM(backbone=backbone("Bart")[0], preprocessor=None)
    converted = randomized(keras_pdattn.convert(model, "batch_norm_scaled_head"))
    converted.compile(sampler="greedy")
    prompt = {"encoder_token_ids": IDS, "encoder_padding_mask": MASK}
    prompt |= {f"decoder_{name}": x for name, x in PROMPT.items()}
    tokens = values(converted.generate(prompt, stop_token_ids=None)["decoder_token_ids"])
    logits = values(
        converted(
            {**prompt, "decoder_token_ids": tokens, "decoder_padding_mask": np.ones_like(tokens)}
        )
    )
    best = logits[:, :-1].argmax(-1)
    free = PROMPTS[:, 1:] == 0
    np.testing.assert_array_equal(tokens[:, 1:][free], best[free])


def test_what_can_not_be_converted_is_refused():
    with pytest.raises(ValueError, match="is built.*Received: model="):
        keras_pdattn.convert(keras.Sequential([keras.layers.Dense(3)]), "softmax")
    with pytest.raises(ValueError, match="no attention layer.*Received"):
        keras_pdattn.convert(keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)]), "linear")
    with pytest.raises(ValueError, match="outer.*can't be converted.*scale"):
        keras_pdattn.convert(functional(), "scaled_head")
    with pytest.raises(ValueError, match="primal"):
        keras_pdattn.convert(functional(), "no_such_primal")
    model, _ = backbone("Bert")
    with pytest.raises(ValueError, match="converted once.*Received"):
        keras_pdattn.convert(keras_pdattn.convert(model, "linear"), "batch_norm")
    model.enable_lora(2)
    with pytest.raises(ValueError, match="LoRA.*Received"):
        keras_pdattn.convert(model, "linear")
    with pytest.raises(ValueError, match="block.*Received"):
        keras_pdattn.register_block(Block)


def test_a_task_may_have_lost_its_preprocessor():
    model = keras_hub.models.BertTextClassifier(backbone("Bert")[0], num_classes=2)
    model.preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
        keras_hub.models.BertTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]), 7
    )
    model.preprocessor = None
    inputs = {**TEXT, "segment_ids": IDS * 0}
    model.fit(inputs, np.zeros(2), verbose=0)
    converted = keras_pdattn.convert(model, "softmax")
    np.testing.assert_allclose(values(converted(inputs)), values(model(inputs)), rtol=0, atol=1e-6)


def masked(call):
    inputs, mask = keras.Input((None, 16)), keras.Input((None, None), dtype="bool")
    return keras.Model([inputs, mask], call(inputs, mask))


def test_a_mask_in_the_graph_may_be_padding_that_statistics_need():
    attention = keras.layers.MultiHeadAttention(2, 8)
    model = masked(lambda x, mask: attention(x, x, attention_mask=mask))
    assert type(keras_pdattn.convert(model, "linear").layers[-1]) is layers.PrimalDualAttention
    for primal in ("batch_norm", "conv1d", Primal(training_set=training_sets.ScaledHeads((1, 2)))):
        with pytest.raises(ValueError, match="called with an `attention_mask`"):
            keras_pdattn.convert(model, primal)


def test_layers_of_keras_hub_that_ignore_an_argument_stay():
    inputs = keras.Input((None, 16))
    cls = keras_hub.layers.CachedMultiHeadAttention
    for arguments, call in (
        ({"use_gate": True}, lambda layer: layer(inputs, inputs)),
        ({"sliding_window": 2}, lambda layer: layer(inputs, inputs)),
        ({}, lambda layer: layer(inputs, inputs, None, keras.Input((None, None), dtype="bool"))),
    ):
        with pytest.raises(ValueError, match="ignores its gate and window|by position"):
            keras_pdattn.convert(keras.Model(inputs, call(cls(2, 8, **arguments))), "linear") if (
                arguments
            ) else keras_pdattn.convert(
                masked(lambda x, mask: cls(2, 8)(x, x, None, mask)), "linear"
            )


def test_another_class_of_the_same_name_is_not_registered():
    keras_pdattn.register_block(Block, "attention")
    namesake = keras.saving.register_keras_serializable(package="other")(
        type("Block", (keras.layers.Layer,), dict(vars(Block), __qualname__="Other.Block"))
    )
    with pytest.raises(ValueError, match="has not been told of Block"):
        keras_pdattn.convert(with_block(namesake), "batch_norm")


@keras.saving.register_keras_serializable(package="test_convert")
class Wide(keras.Model):
    """A graph made from arguments, which its config holds."""

    def __init__(self, width, **kwargs):
        inputs = keras.Input((None, width))
        attention = keras.layers.MultiHeadAttention(2, 8)
        super().__init__(inputs, attention(inputs, inputs), **kwargs)
        self.width = width

    def get_config(self):
        return {"width": self.width, "name": self.name}


@keras.saving.register_keras_serializable(package="test_convert")
class Given(keras.layers.Layer):
    """A block whose config holds the attention it was given."""

    def __init__(self, attention, **kwargs):
        super().__init__(**kwargs)
        self.attention = attention

    def call(self, x):
        return self.attention(x, x)

    def get_config(self):
        attention = keras.saving.serialize_keras_object(self.attention)
        return {**super().get_config(), "attention": attention}

    @classmethod
    def from_config(cls, config):
        attention = keras.saving.deserialize_keras_object(config.pop("attention"))
        return cls(attention, **config)


def time_distributed():
    inputs = keras.Input((3, 7, 16))
    return keras.Model(inputs, keras.layers.TimeDistributed(functional())(inputs))


def given():
    keras_pdattn.register_block(Given, "attention")
    inputs = keras.Input((None, 16))
    return keras.Model(inputs, Given(keras.layers.MultiHeadAttention(2, 8))(inputs))


@pytest.mark.parametrize("make", [lambda: Wide(16), time_distributed, given])
def test_whatever_a_config_holds_files_load(make, tmp_path):
    model = randomized(make())
    x = np.stack(3 * [SEQUENCE], axis=1) if make is time_distributed else SEQUENCE
    converted = keras_pdattn.convert(model, "batch_norm")
    expected = values(converted(x))
    assert np.abs(expected - values(model(x))).max() > 1e-3
    converted.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(values(loaded(x)), expected, rtol=0, atol=1e-6)


def test_a_converted_model_is_pickled():
    model, inputs = backbone("Bert")
    converted = keras_pdattn.convert(model, "batch_norm")
    again = pickle.loads(pickle.dumps(converted))
    assert isinstance(again, type(model))
    assert_equal(outputs(again, inputs), outputs(converted, inputs), atol=0)


def test_what_is_frozen_gets_no_weights_that_train():
    model = functional()
    model.get_layer("outer").trainable = False
    converted = keras_pdattn.convert(model, "conv1d")
    paths = [w.path for w in converted.trainable_weights]
    assert not any(path.startswith("outer/") for path in paths)
    assert any(path.startswith("encoder/") and "primal" in path for path in paths)


def test_a_backbone_alone_makes_no_task():
    model = functional()
    model.backbone = model.get_layer(index=2)
    assert keras_pdattn.convert(functional(), "linear").count_params() == model.count_params()


def test_a_quantized_model_is_refused():
    model, _ = backbone("Bert")
    model.quantize("int8")
    with pytest.raises(ValueError, match="quantised then.*Received"):
        keras_pdattn.convert(model, "linear")


def test_the_older_name_of_keras_hub_gives_the_same_layers():
    keras_nlp = pytest.importorskip("keras_nlp")
    inputs = keras.Input((None, 16))
    model = keras.Model(inputs, keras_nlp.layers.TransformerEncoder(24, 4)(inputs))
    converted = keras_pdattn.convert(model, "batch_norm")
    assert type(converted.layers[-1]) is layers.TransformerEncoder


def test_a_decoder_called_by_position_is_converted():
    decoder = keras_hub.layers.TransformerDecoder(24, 4)
    inputs, encoded = keras.Input((None, 16)), keras.Input((None, 16))
    mask = keras.Input((None,), dtype="bool")
    model = keras.Model([inputs, encoded, mask], decoder(inputs, encoded, mask, None))
    converted = keras_pdattn.convert(model, "softmax")
    x = [SEQUENCE, SEQUENCE + 1, np.arange(7) < [[5], [7]]]
    assert type(converted.layers[-1]) is layers.TransformerDecoder
    np.testing.assert_allclose(values(converted(x)), values(model(x)), rtol=0, atol=2e-6)


def test_a_converted_decoder_keeps_the_dtype_of_its_state():
    inputs = keras.Input((None, 16))
    decoder = keras_hub.layers.TransformerDecoder(24, 4, dtype="mixed_bfloat16")
    block = keras_pdattn.convert(keras.Model(inputs, decoder(inputs)), "linear").layers[-1]
    cache = block.init_cache(2, 7)
    _, after = block(SEQUENCE, self_attention_cache=cache, self_attention_cache_update_index=0)
    for one in (cache, after):
        assert {keras.backend.standardize_dtype(x.dtype) for x in one.values()} == {"float32"}


@pytest.mark.skipif(backends.BACKEND != "torch", reason="Its loops ask the module for parameters")
@pytest.mark.parametrize("name", ["functional", "GPT2"])
def test_modules_of_torch_list_the_new_weights(name):
    model = functional() if name == "functional" else backbone(name)[0]
    converted = keras_pdattn.convert(model, "conv1d")
    again = type(converted).from_config(converted.get_config())
    for one in (converted, again):
        listed = {id(parameter) for parameter in one.parameters()}
        assert {id(w.value) for w in one.trainable_weights} <= listed
