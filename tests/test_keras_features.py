"""What Keras does with a layer, done with ours: adapters, fewer bits, copies, exports, compilers.

Where Keras can't do it with its own layer on a backend, a test says so.
"""

import warnings

import backends
import keras
import numpy as np
import pytest
from keras import ops as keras_ops
from members import every_member, few_where_compiled
from test_layers import built, values

import keras_pdattn
from keras_pdattn import Primal, feature_maps, layers, training_sets, transforms

PRIMALS = {
    "softmax": "softmax",
    "batch_norm": "batch_norm",
    "scaled_head": "scaled_head",
    # Few pooled keys may have hardly any spread, of whose rounding a small epsilon makes much.
    "both": Primal(
        transform=transforms.BatchNorm(epsilon=0.1), training_set=training_sets.ScaledHeads()
    ),
    "linear": "linear",
    "window": Primal(training_set=training_sets.SlidingWindow(3)),
    "conv1d": "conv1d",
}
every_primal = few_where_compiled("primal", PRIMALS, few=["both", "linear", "window"])
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 7, 12)).astype("float32")


def model_of(primal, use_causal_mask=False, **arguments):
    inputs = keras.Input((None, 12))
    layer = layers.PrimalDualAttention(4, 6, primal=primal, name="attention", **arguments)
    return keras.Model(inputs, layer(inputs, inputs, use_causal_mask=use_causal_mask))


def encoder_of(primal):
    inputs = keras.Input((None, 12))
    return keras.Model(inputs, layers.TransformerEncoder(16, 4, primal=primal)(inputs))


def converted_bert(primal):
    keras_hub = pytest.importorskip("keras_hub")
    sizes = {"vocabulary_size": 30, "num_layers": 2, "num_heads": 4, "hidden_dim": 16}
    bert = keras_hub.models.BertBackbone(**sizes, intermediate_dim=24, max_sequence_length=12)
    return keras_pdattn.convert(bert, primal)


TOKENS = RNG.integers(1, 30, (2, 7))
TEXT = {"token_ids": TOKENS, "segment_ids": TOKENS * 0, "padding_mask": TOKENS > 0}


def embedded(model):
    return values(model(TEXT)["sequence_output"])


@every_primal
def test_lora_adapts_the_projections(primal, tmp_path):
    model = model_of(primal)
    before = values(model(X))
    attention = model.get_layer("attention")
    for dense in (attention.query_dense, attention.value_dense):
        dense.enable_lora(2)
    np.testing.assert_allclose(values(model(X)), before, rtol=0, atol=1e-6)
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.fit(X, RNG.normal(size=X.shape), verbose=0, epochs=2)
    adapted = values(model(X))
    for dense in (attention.query_dense, attention.value_dense):
        assert np.abs(values(dense.lora_kernel_b)).max() > 0
        dense.lora_kernel_b.assign(values(dense.lora_kernel_b) * 0)
        assert np.abs(values(model(X)) - adapted).max() > 1e-6
    expected = values(model(X))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(values(loaded(X)), expected, rtol=0, atol=1e-6)


@every_primal
def test_a_backbone_with_our_blocks_takes_lora(primal, tmp_path):
    model = converted_bert(primal)
    before = embedded(model)
    model.enable_lora(2)
    adapted = [x for x in model._flatten_layers() if getattr(x, "lora_enabled", False)]
    assert sorted(x.name for x in adapted) == 2 * ["query"] + 2 * ["value"]
    for dense in adapted:
        dense.lora_kernel_b.assign(RNG.normal(size=dense.lora_kernel_b.shape))
    expected = embedded(model)
    assert np.abs(expected - before).max() > 1e-2
    model.save_lora_weights(tmp_path / "adapters.lora.h5")
    other = type(model).from_config(model.get_config())
    other.set_weights([values(w) for w in model.weights if "lora_kernel" not in w.path])
    np.testing.assert_allclose(embedded(other), before, rtol=0, atol=1e-5)
    other.load_lora_weights(tmp_path / "adapters.lora.h5")
    np.testing.assert_allclose(embedded(other), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("mode", "most"), [("int8", 1e-3), ("int4", 0.3), ("float8", 1e-2)])
@every_primal
def test_quantized_layers_compute_nearly_the_same(primal, mode, most):
    model = model_of(primal)
    before = values(model(X))
    model.quantize(mode)
    attention = model.get_layer("attention")
    for name in ("query", "key", "value", "output"):
        assert getattr(attention, f"{name}_dense").quantization_mode == mode
    error = np.mean((values(model(X)) - before) ** 2) / np.mean(before**2)
    assert 0 < error < most


@pytest.mark.parametrize("primal", ["batch_norm"])
def test_a_quantized_backbone_is_saved(primal, tmp_path):
    model = converted_bert(primal)
    before = embedded(model)
    model.quantize("int8")
    expected = embedded(model)
    assert 0 < np.abs(expected - before).max() < 0.1
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(embedded(loaded), expected, rtol=0, atol=1e-6)


POLICIES = {
    **{name: (primal, "mixed_bfloat16") for name, primal in PRIMALS.items()},
    "mixed_float16": ("batch_norm", "mixed_float16"),
    "bfloat16": ("scaled_head", "bfloat16"),
}


@few_where_compiled("case", POLICIES, few=["conv1d", "mixed_float16", "bfloat16"])
def test_policies_reach_every_sublayer(case):
    primal, policy = case[0], keras.DTypePolicy(case[1])
    for block in (
        layers.PrimalDualAttention(4, 6, primal=primal, dtype=policy),
        layers.TransformerEncoder(16, 4, primal=primal, dtype=policy),
        layers.TransformerDecoder(16, 4, primal=primal, dtype=policy),
    ):
        inputs = (X, X) if isinstance(block, layers.PrimalDualAttention) else (X,)
        output = block(*inputs)
        assert keras.backend.standardize_dtype(output.dtype) == policy.compute_dtype
        assert np.isfinite(values(keras_ops.cast(output, "float32"))).all()
        assert {w.dtype for w in block.weights} == {policy.variable_dtype}
        for layer in block._flatten_layers():
            assert layer.compute_dtype == policy.compute_dtype


def test_a_map_of_policies_tells_sublayers_apart():
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="mixed_bfloat16")
    policies["attention/attention_output"] = keras.DTypePolicy("float32")
    layer = layers.BatchNormAttention(4, 6, name="attention", dtype=policies)
    output = layer(X, X)
    assert layer.query_dense.compute_dtype == "bfloat16"
    assert layer.output_dense.compute_dtype == "float32"
    assert keras.backend.standardize_dtype(output.dtype) == "float32"
    expected = layers.BatchNormAttention(4, 6)
    expected.build(X.shape, X.shape)
    expected.set_weights(layer.get_weights())
    np.testing.assert_allclose(values(output), values(expected(X, X)), rtol=0, atol=0.05)


@every_primal
def test_a_clone_has_the_config_and_weights_of_its_own(primal):
    for model in (model_of(primal), encoder_of(primal)):
        clone = keras.models.clone_model(model)
        assert clone.layers[-1].get_config() == model.layers[-1].get_config()
        clone.set_weights(model.get_weights())
        np.testing.assert_allclose(values(clone(X)), values(model(X)), rtol=0, atol=1e-6)
        clone.set_weights([w + 1 for w in model.get_weights()])
        assert np.abs(values(clone(X)) - values(model(X))).max() > 1e-2


def lengths(width=12):
    """Inputs of three lengths and batch sizes, none that of an example.

    One, or so many that means of three have some spread, see `PRIMALS`, and in more than a chunk;
    whatever tests ran before.
    """
    rng, shapes = np.random.default_rng(1), ((1, 1), (3, 11), (2, 130))
    return [rng.normal(size=(b, t, width)).astype("float32") for b, t in shapes]


#: Primal problems, and whether a causal mask is used; and what JAX, which compiles each for
#: seconds, is asked for in every run.
SAVED = {
    **{name: (primal, False) for name, primal in PRIMALS.items()},
    "batch_norm-causal": ("batch_norm", True),
    "linear-causal": ("linear", True),
    "random-causal": (Primal(feature_maps.PositiveRandom(6)), True),
}
FEW_SAVED = ["softmax", "both", "conv1d", "batch_norm-causal", "linear-causal", "random-causal"]


@pytest.mark.skipif(backends.BACKEND == "torch", reason="Keras's SavedModel of torch fails too")
@few_where_compiled("case", SAVED, few=FEW_SAVED if backends.BACKEND == "jax" else SAVED)
def test_a_saved_model_takes_any_length(case, tmp_path):
    import tensorflow as tf

    model = model_of(*case)
    model.export(tmp_path / "exported", format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "exported"))
    for x in lengths():
        np.testing.assert_allclose(loaded.serve(x).numpy(), values(model(x)), rtol=0, atol=1e-5)


@pytest.mark.skipif(backends.BACKEND != "torch", reason="Needs tf2onnx or jax2onnx there")
@pytest.mark.parametrize("use_causal_mask", [False, True], ids=["whole", "causal"])
@every_member
def test_onnx_takes_any_length_or_is_refused(member, use_causal_mask, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    layer, inputs = built(member), keras.Input((None, 12))
    model = keras.Model(inputs, layer(inputs, inputs, use_causal_mask=use_causal_mask))
    model(X)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if use_causal_mask and str(member) in ("relu-bn-scaled", "random-conv_bn-scaled"):
            with pytest.raises(ValueError, match="can't be exported to ONNX.*Received"):
                model.export(path, format="onnx", verbose=False)
            return
        model.export(path, format="onnx", verbose=False)
    session = runtime.InferenceSession(path)
    (name,) = [one.name for one in session.get_inputs()]
    for x in lengths():
        (output,) = session.run(None, {name: x})
        np.testing.assert_allclose(output, values(model(x)), rtol=0, atol=1e-5)


def check_litert(model, x, path):
    """The interpreter, with no operations of TensorFlow's in it, gives what the model does."""
    import tensorflow as tf

    model.export(path, format="litert", verbose=False)
    builtin = tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        interpreter = tf.lite.Interpreter(str(path), experimental_op_resolver_type=builtin)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    output = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(output, values(model(x)), rtol=0, atol=1e-5)


needs_litert = pytest.mark.skipif(
    backends.BACKEND != "tensorflow", reason="Needs TensorFlow, or litert-torch"
)


@needs_litert
@pytest.mark.parametrize("use_causal_mask", [False, True], ids=["whole", "causal"])
@every_primal
def test_litert_runs_a_known_length(primal, use_causal_mask, tmp_path):
    inputs = keras.Input((7, 12), batch_size=1)
    layer = layers.PrimalDualAttention(4, 6, primal=primal)
    model = keras.Model(inputs, layer(inputs, inputs, use_causal_mask=use_causal_mask))
    check_litert(model, X[:1], tmp_path / "model.tflite")


@needs_litert
def test_litert_loops_over_a_long_sequence(tmp_path):
    inputs = keras.Input((520, 12), batch_size=1)
    model = keras.Model(inputs, layers.PrimalDualAttention(2, 6)(inputs, inputs))
    x = np.random.default_rng(0).normal(size=(1, 520, 12)).astype("float32")
    check_litert(model, x, tmp_path / "model.tflite")


def through_the_compiler(function):
    """As `backends.compiled`, but by XLA on TensorFlow."""
    if backends.BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    return backends.compiled(function)


#: Torch takes half a minute to trace each.
COMPILED = ["linear"] if backends.BACKEND == "torch" else ["both", "linear", "window"]


@pytest.mark.parametrize(
    "primal",
    [
        pytest.param(primal, marks=[] if name in COMPILED else pytest.mark.slow, id=name)
        for name, primal in PRIMALS.items()
    ],
)
def test_blocks_and_caches_under_the_compiler(primal):
    encoder = layers.TransformerEncoder(16, 4, primal=primal)
    decoder = layers.TransformerDecoder(16, 4, primal=primal)
    x = keras_ops.convert_to_tensor(X)
    mask = keras_ops.convert_to_tensor(np.arange(7) < [[5], [7]])
    expected = values(decoder(encoder(x, padding_mask=mask), decoder_padding_mask=mask))

    def both(x, mask):
        return decoder(encoder(x, padding_mask=mask), decoder_padding_mask=mask)

    output = values(through_the_compiler(both)(x, mask))
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)

    def step(x, cache, index):
        return decoder(x, self_attention_cache=cache, self_attention_cache_update_index=index)

    step, cache = through_the_compiler(step), decoder.init_cache(2, 7)
    expected = values(decoder(x))
    for index in range(3):
        position = keras_ops.convert_to_tensor(index, dtype="int32")
        output, cache = step(x[:, index : index + 1], cache, position)
        np.testing.assert_allclose(values(output)[:, 0], expected[:, index], rtol=0, atol=1e-5)


@every_primal
def test_rematerialised_layers_have_the_same_gradients(primal):
    layer = layers.PrimalDualAttention(4, 6, primal=primal)
    layer.build(X.shape, X.shape)
    remat = keras.remat(lambda x: layer(x, x, use_causal_mask=True))

    def loss(function):
        return lambda x: keras_ops.sum(keras_ops.square(function(x)))

    (expected,) = backends.gradients(loss(lambda x: layer(x, x, use_causal_mask=True)), [X])
    (found,) = backends.gradients(loss(remat), [X])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(found).max() > 1e-2


@pytest.mark.skipif(backends.BACKEND != "torch", reason="Keras's own layer fails there too")
@every_primal
def test_a_remat_scope(primal):
    with keras.RematScope("full"):
        model = model_of(primal)
    plain = model_of(primal)
    plain.set_weights(model.get_weights())
    for one in (model, plain):
        one.compile(keras.optimizers.SGD(0.1), "mse")
        one.fit(X, X[:, ::-1], verbose=0)
    for weights in zip(model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(*weights, rtol=0, atol=1e-6)


@pytest.mark.skipif(backends.BACKEND != "torch", reason="an export of torch's")
@pytest.mark.parametrize("primal", ["softmax", "batch_norm"])
@pytest.mark.parametrize("use_causal_mask", [False, True], ids=["whole", "causal"])
def test_torch_exports_any_length(primal, use_causal_mask):
    """One graph for every batch size and length: no size decides on what is done."""
    import torch

    inputs = keras.Input((None, 16))
    layer = layers.PrimalDualAttention(4, 4, primal=primal)
    model = keras.Model(inputs, layer(inputs, inputs, use_causal_mask=use_causal_mask))
    any_size = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(
        model, (torch.randn(2, 6, 16),), dynamic_shapes=((any_size,),), strict=False
    )
    for shape in ((2, 6, 16), (3, 9, 16), (1, 300, 16)):
        x = torch.randn(shape)
        np.testing.assert_allclose(values(exported.module()(x)), values(model(x)), atol=1e-5)
