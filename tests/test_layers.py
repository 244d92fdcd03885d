"""The layers: what a user of `keras.layers.MultiHeadAttention` expects, and more."""

import functools
import inspect
import warnings

import backends
import keras
import numpy as np
import pytest
import reference
from keras import ops as keras_ops
from members import FEW, MEMBERS, every_member, every_member_compiled

from keras_pdattn import feature_maps, layers, ops

LAYERS = [
    layers.PrimalDualAttention,
    layers.BatchNormAttention,
    layers.ScaledHeadAttention,
    layers.BatchNormScaledHeadAttention,
    layers.LinearAttention,
    layers.SlidingWindowAttention,
    layers.Conv1DAttention,
    layers.Conv2DAttention,
]
every_layer = pytest.mark.parametrize("cls", LAYERS, ids=lambda cls: cls.__name__)


def needed(cls):
    """Arguments a layer needs for flat inputs of five positions."""
    return {"grid": (5, 1)} if cls is layers.Conv2DAttention else {}


QUERY, VALUE = (
    np.random.default_rng(0).normal(size=(2, length, 12)).astype("float32") for length in (5, 7)
)
KEY = VALUE[:, ::-1] + 1


def values(x):
    return keras_ops.convert_to_numpy(x)


def built(member, num_heads=4, key_dim=6, **arguments):
    layer = layers.PrimalDualAttention(num_heads, key_dim, primal=member.primal, **arguments)
    layer.build(QUERY.shape, VALUE.shape, KEY.shape)
    # Biases start at zero, where no test would miss one.
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=w.shape) / 3 for w in projections(layer)]
    weights += [w for one in member.weights(num_heads, key_dim) for w in one.values()]
    layer.set_weights(weights)
    return layer


def projections(layer):
    """The weights that Keras's layer has too."""
    return [w for w in layer.weights if "/primal/" not in w.path]


def by_hand(layer, member, query, value, key, **options):
    """Projections in float64, the oracle between them."""
    variables = projections(layer)
    weights = [values(w).astype("float64") for w in variables]
    names = [variable.path.split("/")[-2] for variable in variables]
    kernels = dict(zip(names[::2], weights[::2]))
    biases = dict(zip(names[1::2], weights[1::2]))

    def project(name, x):
        return np.einsum("btc,chd->bthd", x, kernels[name]) + biases[name]

    output, scores = reference.attention(
        project("query", query),
        project("key", key),
        project("value", value),
        member.oracle,
        **options,
    )
    if "gate" in kernels:
        output = output / (1 + np.exp(-project("gate", query)))
    output = np.einsum("bthd,hdc->btc", output, kernels["attention_output"])
    return output + biases["attention_output"], scores


@every_member_compiled
@pytest.mark.parametrize("use_gate", [False, True])
def test_a_layer_is_its_projections_around_the_oracle(member, use_gate):
    """All call arguments at once: cross-attention, three padding masks, a 3-D mask, causal."""
    rng = np.random.default_rng(2)
    layer = built(member, value_dim=5, use_gate=use_gate, sliding_window=4)
    query_mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    value_mask = np.array([[True] * 7, [True] * 6 + [False]])
    key_mask = np.array([[True] * 6 + [False], [False] + [True] * 6])
    attention_mask = rng.random((2, 5, 7)) < 0.8
    for use_causal_mask in (False, True):
        attend = functools.partial(
            layer, use_causal_mask=use_causal_mask, return_attention_scores=True
        )
        output, scores = backends.jitted(attend)(
            QUERY,
            VALUE,
            KEY,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
        )
        expected, expected_scores = by_hand(
            layer,
            member,
            QUERY,
            VALUE,
            KEY,
            query_mask=query_mask,
            key_mask=value_mask & key_mask,
            mask=attention_mask[:, None],
            is_causal=use_causal_mask,
            sliding_window=4,
        )
        np.testing.assert_allclose(values(output), expected, atol=2e-5)
        np.testing.assert_allclose(values(scores), expected_scores, atol=2e-5)


MASKS_OF_EVERY_RANK = [
    (5, 7),
    (1, 7),
    (5, 1),
    (2, 5, 7),
    (1, 5, 7),
    (2, 1, 7),
    (2, 5, 1),
    (2, 4, 5, 7),
    (1, 1, 5, 7),
    (2, 4, 5, 1),
]


@every_member_compiled
def test_masks_of_every_rank_equal_their_broadcast(member):
    layer = backends.jitted(built(member))
    for shape in MASKS_OF_EVERY_RANK:
        mask = np.random.default_rng(0).random(shape) < 0.7
        full = mask.reshape((1,) * (2 - mask.ndim) + mask.shape)
        while full.ndim < 4:
            full = full[None] if full.ndim == 2 else full[:, None]
        full = np.broadcast_to(full, (2, 4, 5, 7))
        np.testing.assert_allclose(
            values(layer(QUERY, VALUE, attention_mask=mask)),
            values(layer(QUERY, VALUE, attention_mask=full)),
            atol=1e-6,
        )


@every_member_compiled
def test_implicit_masks_are_explicit_ones(member):
    """Masks that Keras attaches do what the arguments do, eagerly and in a model."""
    layer = built(member)
    query_mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    value_mask = np.array([[True] * 7, [True] * 4 + [False] * 3])
    explicit = layer(QUERY, VALUE, query_mask=query_mask, value_mask=value_mask)
    query, value = QUERY * query_mask[..., None], VALUE * value_mask[..., None]
    masking = keras.layers.Masking()
    np.testing.assert_allclose(
        values(layer(masking(query), masking(value))), values(explicit), atol=1e-6
    )
    inputs = keras.Input((None, 12)), keras.Input((None, 12))
    model = keras.Model(inputs, layer(masking(inputs[0]), masking(inputs[1])))
    np.testing.assert_allclose(
        model.predict([query, value], verbose=0), values(explicit), atol=1e-5
    )


def test_implicit_masks_under_the_compiler():
    """A6: what Keras attaches to tensors inside a compiled function is not lost."""
    layer = layers.BatchNormScaledHeadAttention(4, 6, scales=(1, 2))
    masking = keras.layers.Masking()
    x = keras_ops.convert_to_tensor(QUERY * (np.arange(5) < np.array([[5], [3]]))[..., None])
    expected = values(layer(masking(x), masking(x)))
    assert (np.abs(expected[1, 3:]).max(axis=-1) == 0).all()
    compiled = backends.compiled(lambda x: layer(masking(x), masking(x)))
    np.testing.assert_allclose(values(compiled(x)), expected, atol=1e-5)


def test_masks_stay_on_inputs_and_come_with_the_output():
    tokens = np.array([[1, 2, 3, 0], [4, 0, 0, 0]])
    embedded = keras.layers.Embedding(5, 12, mask_zero=True)(tokens)
    layer = layers.BatchNormAttention(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        output = layer(embedded, embedded)
        twice = layer(output, output)
    for tensor in (embedded, output, twice):
        np.testing.assert_array_equal(values(tensor._keras_mask), tokens != 0)
    explicit = layer(QUERY, QUERY, query_mask=np.arange(5) < np.array([[5], [2]]))
    np.testing.assert_array_equal(values(explicit._keras_mask), np.arange(5) < np.array([[5], [2]]))


@every_layer
def test_every_argument_survives_the_round_trip(cls):
    """By introspection: each constructor argument gets another value and comes back with it."""
    other = {
        "num_heads": 6,
        "key_dim": 3,
        "value_dim": 5,
        "dropout": 0.25,
        "use_bias": False,
        "output_shape": (7,),
        "attention_axes": (2,),
        "sliding_window": 3,
        "flash_attention": False,
        "kernel_initializer": "he_normal",
        "bias_initializer": "ones",
        "kernel_regularizer": "l2",
        "bias_regularizer": "l1",
        "activity_regularizer": "l2",
        "kernel_constraint": "non_neg",
        "bias_constraint": "unit_norm",
        "use_gate": True,
        "seed": 3,
        "primal": "batch_norm_scaled_head",
        "epsilon": 0.5,
        "center": True,
        "scale": False,
        "beta": 0.5,
        "learn_beta": True,
        "scales": [1, 3],
        "reduction": "first",
        "feature_map": feature_maps.serialize(feature_maps.PositiveRandom(7, seed=2)),
        "size": 5,
        "dilation": 2,
        "global_tokens": 1,
        "kernel_size": 5,
        "grid": [2, 3],
        "class_tokens": 2,
        "name": "other",
        "dtype": "bfloat16",
        "trainable": False,
    }
    parameters = inspect.signature(keras.layers.MultiHeadAttention).parameters.keys()
    parameters = {*parameters, *inspect.signature(cls).parameters, "name", "dtype", "trainable"}
    arguments = {name: other[name] for name in parameters - {"kwargs", "args"}}
    layer = cls(**arguments)
    plain = cls(4, 2).get_config()
    config = layer.get_config()
    assert set(config) >= set(keras.layers.MultiHeadAttention(2, 2).get_config())
    for name in arguments:
        assert name in config
        assert name == "center" or config[name] != plain[name], name
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert restored.get_config() == config
    assert type(restored) is cls


@every_layer
def test_drop_in_names_weights_and_config(cls):
    """Law 2: names, paths, order and shapes of weights are those of Keras's layer."""
    ours = cls(4, 6, value_dim=5, use_gate=True, name="attention", **needed(cls))
    keras_layer = keras.layers.MultiHeadAttention(
        4, 6, value_dim=5, use_gate=True, name="attention"
    )
    for layer in (ours, keras_layer):
        layer.build(QUERY.shape, VALUE.shape)
    count = len(keras_layer.weights)
    assert [w.path for w in ours.weights[:count]] == [w.path for w in keras_layer.weights]
    assert [w.shape for w in ours.weights[:count]] == [w.shape for w in keras_layer.weights]
    assert all(w.path.startswith("attention/primal/") for w in ours.weights[count:])
    assert {*keras_layer.get_config()} <= {*ours.get_config()} - {"primal"}
    assert {*dir(keras_layer)} <= {*dir(ours)}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"value_dim": 6, "use_bias": False},
        {"use_gate": True, "output_shape": 3},
        {"sliding_window": 2},
        {"dropout": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("use_causal_mask", [False, True])
def test_drop_in_numbers(arguments, use_causal_mask):
    """Law 2: with `primal="softmax"` and the same weights, the same outputs and scores."""
    keras_layer = keras.layers.MultiHeadAttention(4, 6, **arguments)
    keras_layer.build(QUERY.shape, VALUE.shape)
    rng = np.random.default_rng(1)
    keras_layer.set_weights([rng.normal(size=w.shape) / 3 for w in keras_layer.get_weights()])
    ours = layers.PrimalDualAttention(4, 6, **arguments)
    ours.build(QUERY.shape, VALUE.shape)
    ours.set_weights(keras_layer.get_weights())
    mask = rng.random((2, 5, 7)) < 0.8
    mask[:, :, 0] = True
    call = {"use_causal_mask": use_causal_mask}
    for options in ({}, {"attention_mask": mask}, {"value_mask": mask[:, 1]}):
        if arguments.get("sliding_window") and options:
            continue  # A row without a key left is where Keras is of two minds.
        expected = keras_layer(QUERY, VALUE, KEY, **options, **call)
        np.testing.assert_allclose(
            values(ours(QUERY, VALUE, KEY, **options, **call)), values(expected), atol=1e-6
        )
        expected = keras_layer(QUERY, VALUE, **options, **call, return_attention_scores=True)
        actual = ours(QUERY, VALUE, **options, **call, return_attention_scores=True)
        for one, other in zip(actual, expected):
            np.testing.assert_allclose(values(one), values(other), atol=1e-6)


ATTENDED = [
    ((2, 3, 4, 12), (2, 3, 5, 12), (2,)),
    ((2, 4, 3, 12), (2, 5, 3, 12), (1,)),
    ((2, 3, 4, 12), (2, 5, 2, 12), (1, 2)),
    ((2, 3, 4, 12), (2, 5, 2, 12), None),
    ((2, 2, 3, 4, 12), (2, 2, 5, 2, 12), (2, -2)),
]


@pytest.mark.parametrize(("query_shape", "value_shape", "axes"), ATTENDED, ids=str)
def test_drop_in_over_any_axes(query_shape, value_shape, axes):
    rng = np.random.default_rng(0)
    query, value = (rng.normal(size=s).astype("float32") for s in (query_shape, value_shape))
    keras_layer = keras.layers.MultiHeadAttention(2, 4, attention_axes=axes)
    expected, expected_scores = keras_layer(query, value, return_attention_scores=True)
    ours = layers.PrimalDualAttention(2, 4, attention_axes=axes)
    ours.build(query_shape, value_shape)
    ours.set_weights(keras_layer.get_weights())
    np.testing.assert_allclose(values(ours(query, value)), values(expected), atol=1e-5)
    output, scores = ours(query, value, return_attention_scores=True)
    np.testing.assert_allclose(values(output), values(expected), atol=1e-5)
    np.testing.assert_allclose(values(scores), values(expected_scores), atol=1e-5)
    spec = ours(
        keras.Input(batch_shape=query_shape),
        keras.Input(batch_shape=value_shape),
        return_attention_scores=True,
    )
    assert [tuple(s.shape) for s in spec] == [tuple(output.shape), tuple(scores.shape)]
    pairs = 2 * len(ours.attention_axes)
    mask = rng.random((2, *scores.shape[-pairs:])) < 0.7
    expected = keras_layer(query, value, attention_mask=mask, return_attention_scores=True)[0]
    np.testing.assert_allclose(
        values(ours(query, value, attention_mask=mask)), values(expected), atol=1e-5
    )


@pytest.mark.parametrize("lead", [(), (1,), (None,)], ids=str)
def test_masks_over_several_axes_of_a_batch_of_unknown_size(lead):
    """A mask for each of the batch, or one for all, under the backend's compiler."""
    rng = np.random.default_rng(0)
    grid = (3, 4)
    image = rng.normal(size=(2, *grid, 12)).astype("float32")
    mask = rng.random((*((2 if size is None else 1) for size in lead), *grid, *grid)) < 0.7
    layer = layers.ScaledHeadAttention(4, 4, scales=(1, 2))
    expected = layer(image, image, attention_mask=mask)
    if len(lead) == 0:
        fixed = keras.Input((*grid, 12))
        model = keras.Model(fixed, layer(fixed, fixed, attention_mask=mask))
        actual = model.predict(image, verbose=0)
    else:
        inputs = (
            keras.Input((*grid, 12)),
            keras.Input(batch_shape=(*lead, *grid, *grid), dtype="bool"),
        )
        model = keras.Model(inputs, layer(inputs[0], inputs[0], attention_mask=inputs[1]))
        compiled = backends.compiled(lambda *tensors: model(list(tensors)))
        actual = values(compiled(*map(keras_ops.convert_to_tensor, (image, mask))))
    np.testing.assert_allclose(actual, values(expected), atol=1e-5)


def test_masks_of_unknown_sizes_may_be_broadcast():
    """Sizes of 1 that nobody knew when the graph was made."""
    primal = layers.ScaledHeadAttention(4, 6, scales=(1, 2)).primal

    def call(x, mask):
        return ops.attention(x, x, x, primal, mask=mask, is_causal=True)

    compiled = backends.compiled(call, {"x": (None, None, 4, 6), "mask": (None,) * 4})
    rng = np.random.default_rng(0)
    x = keras_ops.convert_to_tensor(rng.normal(size=(2, 7, 4, 6)).astype("float32"))
    for shape in ((2, 4, 7, 7), (1, 1, 7, 1), (2, 1, 1, 7)):
        mask = keras_ops.convert_to_tensor(rng.random(shape) < 0.7)
        np.testing.assert_allclose(values(compiled(x, mask)), values(call(x, mask)), atol=1e-5)


def test_axes_that_are_not_attended_are_a_batch():
    """Batch norm and padding along the second axis, for each position of the first."""
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 12)).astype("float32")
    mask = np.arange(7) < np.array([[7], [4]])
    layer = layers.BatchNormScaledHeadAttention(4, 4, attention_axes=2, scales=(1, 3))
    plain = layers.BatchNormScaledHeadAttention(4, 4, scales=(1, 3))
    together = layer(x, x, query_mask=mask, value_mask=mask, use_causal_mask=True)
    plain.build((2, 7, 12), (2, 7, 12))
    plain.set_weights(layer.get_weights())
    for row in range(3):
        alone = plain(x[:, row], x[:, row], query_mask=mask, value_mask=mask, use_causal_mask=True)
        np.testing.assert_allclose(values(together)[:, row], values(alone), atol=1e-5)
    full = np.broadcast_to(mask[:, None], (2, 3, 7))
    again = layer(x, x, query_mask=full, value_mask=full, use_causal_mask=True)
    np.testing.assert_allclose(values(again), values(together), atol=1e-6)


@every_member
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("static", [True, False])
def test_symbolic_shapes_and_dtypes_are_the_real_ones(member, dtype, static):
    """D1: T and S differ, and with scores the spec tells them apart."""
    layer = layers.PrimalDualAttention(4, 6, primal=member.primal, dtype=dtype)
    shapes = (QUERY.shape, VALUE.shape) if static else ((None, None, 12),) * 2
    specs = layer(*(keras.Input(batch_shape=s) for s in shapes), return_attention_scores=True)
    results = layer(QUERY, VALUE, return_attention_scores=True)
    for spec, result in zip(specs, results):
        known = tuple(size for size in spec.shape if size is not None)
        assert len(spec.shape) == len(result.shape)
        assert not static or known == tuple(result.shape)
        assert spec.dtype == keras.backend.standardize_dtype(result.dtype)
    assert tuple(specs[1].shape)[2:] == ((5, 7) if static else (None, None))
    policy = keras.dtype_policies.get(dtype)
    assert {w.dtype for w in layer.weights} == {policy.variable_dtype}


#: What torch's compiler, which takes a minute or two for some, is asked for in every run.
COMPILED_ON_TORCH = {
    "softmax",
    "softmax-bn",
    "elu-causal",
    "taylor-window",
}


def compiled_cases():
    """Every member, causal and not; on torch a choice, elsewhere a few."""
    for member in MEMBERS:
        for use_causal_mask in (False, True):
            name = f"{member}-causal" if use_causal_mask else str(member)
            is_quick = name in COMPILED_ON_TORCH if backends.BACKEND == "torch" else member in FEW
            marks = [] if is_quick else [pytest.mark.slow]
            yield pytest.param(member, use_causal_mask, marks=marks, id=name)


@pytest.mark.parametrize(("member", "use_causal_mask"), list(compiled_cases()))
def test_unknown_lengths_under_the_compiler(member, use_causal_mask):
    """One graph for any batch and length, compiled, equals the eager function."""

    def call(x, mask):
        return ops.attention(
            x,
            x,
            x,
            member.primal,
            key_mask=mask,
            query_mask=mask,
            is_causal=use_causal_mask,
            return_scores=True,
        )

    shapes = {"x": (None, None, 4, 6), "mask": (None, None)}
    compiled = backends.compiled(call, shapes)
    rng = np.random.default_rng(0)
    sizes = [(2, 5), (3, 8), (1, 11)]
    # JAX compiles for each size alone.
    for batch, length in sizes[:1] if backends.BACKEND == "jax" else sizes:
        x = keras_ops.convert_to_tensor(rng.normal(size=(batch, length, 4, 6)).astype("float32"))
        mask = keras_ops.convert_to_tensor(rng.random((batch, length)) < 0.8)
        for actual, expected in zip(compiled(x, mask), call(x, mask)):
            np.testing.assert_allclose(values(actual), values(expected), atol=1e-5)


@every_member_compiled
def test_a_functional_model_of_unknown_length_trains(member):
    """`fit` under the backend's default compiler; every weight gets a gradient."""
    inputs = keras.Input((None, 12))
    x = keras.layers.Masking()(inputs)
    layer = layers.PrimalDualAttention(4, 6, primal=member.primal, dropout=0.1)
    model = keras.Model(inputs, layer(x, x, use_causal_mask=True))
    before = [values(w).copy() for w in model.trainable_weights]
    drawn = [values(w).copy() for w in layer.non_trainable_weights]
    model.compile("adam", "mse")
    data = np.random.default_rng(0).normal(size=(4, 6, 12)).astype("float32")
    data[:, 4:] = 0
    history = model.fit(data, data[..., ::-1], epochs=2, batch_size=4, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    for weight, start in zip(model.trainable_weights, before):
        if not weight.path.endswith("key/bias"):  # Softmax does not notice that one.
            assert np.abs(values(weight) - start).max() > 0, weight.path
    for weight, start in zip(layer.non_trainable_weights, drawn):
        np.testing.assert_array_equal(values(weight), start)
    assert model.predict(data[:, :3], verbose=0).shape == (4, 3, 12)


@every_member_compiled
def test_dropout(member):
    """Inactive in inference; in training seeded, unbiased, and of the stated share."""
    arguments = {"dropout": 0.4, "seed": 7}
    layer, again, without = built(member, **arguments), built(member, **arguments), built(member)
    np.testing.assert_allclose(
        values(layer(QUERY, VALUE)), values(without(QUERY, VALUE)), atol=1e-6
    )
    first, second = (values(layer(QUERY, VALUE, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_allclose(values(again(QUERY, VALUE, training=True)), first, atol=1e-6)
    many = (np.concatenate(200 * [x]) for x in (QUERY, VALUE))
    draws = values(layer(*many, training=True)).reshape(200, *first.shape)
    plain = values(without(QUERY, VALUE))
    assert np.abs(draws.mean(axis=0) - plain).max() < 0.25 * np.abs(first - plain).max() + 0.1
    assert draws.std(axis=0).min() > 1e-3


def test_learned_beta_is_a_weight_behind_the_projections():
    layer = layers.BatchNormAttention(2, 4, beta=0.5, learn_beta=True, name="attention")
    layer(QUERY, QUERY)
    assert layer.weights[-1].path == "attention/primal/BatchNorm_0_beta"
    assert float(layer.weights[-1].value) == 0.5
    fixed = layers.BatchNormAttention(2, 4, beta=0.5)
    fixed.build(QUERY.shape, QUERY.shape)
    fixed.set_weights(layer.get_weights()[:-1])
    np.testing.assert_allclose(values(fixed(QUERY, QUERY)), values(layer(QUERY, QUERY)), atol=1e-6)
    layer.weights[-1].assign(0.9)
    assert np.abs(values(fixed(QUERY, QUERY)) - values(layer(QUERY, QUERY))).max() > 1e-3


@every_layer
def test_nested_layers_save_and_load(cls, tmp_path):
    """E1: inside another layer and a Functional model, with `safe_mode` on, exactly."""
    inputs = keras.Input((None, 12))
    x = keras.layers.Masking()(inputs)
    x = keras.layers.TimeDistributed(keras.layers.Dense(12))(x)
    x = cls(4, 6, name="attention", **needed(cls))(x, x)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(x))
    path = tmp_path / "model.keras"
    model.save(path)
    restored = keras.saving.load_model(path, safe_mode=True)
    np.testing.assert_array_equal(
        restored.predict(QUERY, verbose=0), model.predict(QUERY, verbose=0)
    )
    assert type(restored.get_layer("attention")) is cls
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone.predict(QUERY, verbose=0), model.predict(QUERY, verbose=0))


def test_a_subclass_that_overrides_compute_attention():
    """Keras's hook gets one merged mask for softmax, the keywords in use for other primals."""

    class Hooked(layers.PrimalDualAttention):
        def _compute_attention(self, query, key, value, attention_mask=None, *args, **context):
            self.seen = attention_mask, context
            return super()._compute_attention(query, key, value, attention_mask, *args, **context)

    mask = np.arange(5) < np.array([[5], [3]])
    for primal in ("softmax", "batch_norm"):
        hooked, plain = Hooked(2, 4, primal=primal), layers.PrimalDualAttention(2, 4, primal=primal)
        for layer in (hooked, plain):
            layer.build(QUERY.shape, QUERY.shape)
        hooked.set_weights(plain.get_weights())
        results = [
            values(layer(QUERY, QUERY, value_mask=mask, use_causal_mask=True))
            for layer in (hooked, plain)
        ]
        np.testing.assert_allclose(*results, atol=1e-6)
        seen_mask, context = hooked.seen
        assert (seen_mask is None) == (primal == "batch_norm")
        assert set(context) == (set() if primal == "softmax" else {"use_causal_mask", "key_mask"})


class Outer(keras.layers.Layer):
    """A layer that holds one of ours and does not say what comes out of it."""

    def __init__(self, inner, **arguments):
        super().__init__()
        self.inner, self.arguments = inner, arguments

    def call(self, x, its_mask):
        return self.inner(x, x, query_mask=its_mask, value_mask=its_mask, **self.arguments)


@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
@every_member_compiled
def test_a_layer_around_one_need_not_know_the_length(member, is_causal):
    """Keras traces what the outer layer does, on JAX with symbols for sizes."""
    outer = Outer(built(member), use_causal_mask=is_causal)
    spec = outer(keras.KerasTensor((None, None, 12)), keras.KerasTensor((None, None), "bool"))
    assert spec.shape == (None, None, 12)
