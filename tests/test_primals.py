"""Primals and their members: names, configs, equality, registration."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from members import MEMBERS, VARIANTS
from user_members import Centered, EvenKeys, Gain, Mixing, NotCausal, Scale, Squares, Unregistered

from keras_pdattn import Primal, feature_maps, layers, ops, primals, training_sets, transforms

KINDS = {
    feature_maps: ("feature map", ["softmax", "elu", "relu", "taylor", "positive_random"], Squares),
    transforms: ("transform", ["batch_norm", "conv1d", "conv2d"], Gain),
    training_sets: ("training set", ["all_keys", "scaled_heads", "sliding_window"], EvenKeys),
}
NAMES = [
    "softmax",
    "linear",
    "sliding_window",
    "batch_norm",
    "scaled_head",
    "batch_norm_scaled_head",
    "conv1d",
    "conv2d",
]
ALL = [member.primal for member in MEMBERS + VARIANTS] + [
    Primal(Squares()),
    Primal(transform=[Gain(), "batch_norm"], training_set=EvenKeys()),
    Primal(transform=Scale(3.0)),
]


@pytest.mark.parametrize("primal", ALL, ids=repr)
def test_round_trip_through_json(primal):
    config = json.loads(json.dumps(primals.serialize(primal)))
    for restored in (
        primals.get(config),
        keras.saving.deserialize_keras_object(config),
        primals.get(json.loads(json.dumps(primal.get_config()))),
    ):
        assert restored == primal
        assert hash(restored) == hash(primal)
        assert repr(restored) == repr(primal)
        assert primals.serialize(restored) == config


@pytest.mark.parametrize("name", NAMES)
def test_primals_by_name(name):
    assert primals.get(name) == primals.get(primals.get(name))
    assert primals.get(name) != Primal(Squares())


def test_the_named_primals_are_what_they_say():
    scaled = training_sets.ScaledHeads((1, 2, 4, 8))
    assert primals.get("softmax") == Primal("softmax", None, "all_keys") == Primal()
    assert primals.get("linear") == Primal("elu")
    assert primals.get("sliding_window") == Primal(training_set=training_sets.SlidingWindow(64))
    assert primals.get("conv1d") == Primal(transform=transforms.Conv1D(3))
    assert primals.get("conv2d") == Primal(transform=transforms.Conv2D(3))
    assert primals.get("batch_norm") == Primal(transform=transforms.BatchNorm(1e-5))
    assert primals.get("scaled_head") == Primal(training_set=scaled)
    assert primals.get("batch_norm_scaled_head") == Primal("softmax", "batch_norm", scaled)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_members_by_name_class_config_and_instance(kind):
    label, names, user_class = KINDS[kind]
    for name in names:
        member = kind.get(name)
        assert kind.get(member) is member
        assert kind.get(type(member)) == member
        assert kind.get(kind.serialize(member)) == member
        assert kind.get({"class_name": type(member).__name__, "config": {}}) == member
    assert kind.get(f"tests>{user_class.__name__}") == user_class()
    with pytest.raises(ValueError, match=f"Unknown {label}.*{names[0]}.*Received: 'nothing'"):
        kind.get("nothing")
    for wrong in (3, None, {}, {"config": {}}, lambda x: x, object):
        with pytest.raises(ValueError, match=f"A {label} is given as a name.*Received"):
            kind.get(wrong)


def test_unknown_primal():
    with pytest.raises(ValueError, match="Unknown primal problem.*'batch_norm'.*Received: 'nope'"):
        primals.get("nope")
    with pytest.raises(ValueError, match="Unknown feature map.*'softmax'.*Received: 'nope'"):
        Primal(feature_map="nope")
    with pytest.raises(ValueError, match="Unknown transform"):
        layers.PrimalDualAttention(2, 2, primal={"transform": ["nope"]})


def test_primals_are_immutable():
    primal = Primal(transform="batch_norm")
    for description in (primal, primal.transform[0], primal.training_set, primal.feature_map):
        with pytest.raises(dataclasses.FrozenInstanceError):
            description.epsilon = 1.0


def test_repr_reads_like_the_constructor():
    primal = Primal(transform=transforms.BatchNorm(epsilon=0.5))
    assert "transform=(BatchNorm(epsilon=0.5, " in repr(primal)
    assert eval(repr(training_sets.ScaledHeads((1, 2))), vars(training_sets)) == (
        training_sets.ScaledHeads([1, 2])
    )
    assert repr(Scale(2.0)) == "Scale(factor=2.0)"


def test_a_class_keras_does_not_know_works_but_is_not_written():
    layer = layers.PrimalDualAttention(2, 2, primal=Primal(Unregistered()))
    x = np.ones((1, 3, 4), "float32")
    assert layer(x, x).shape == (1, 3, 4)
    with pytest.raises(ValueError, match=r"Unregistered.*register_keras_serializable"):
        layer.get_config()


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_users_members_are_what_they_say(is_causal):
    """A user's feature map, transform and training set, all at once, against plain NumPy."""
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 2, 6, 2, 4)).astype("float32")
    key_mask = np.array([[True] * 6, [True] * 4 + [False] * 2])
    primal = Primal(Squares(), Scale(2.0), EvenKeys())
    output, scores = ops.attention(
        query, key, value, primal, key_mask=key_mask, is_causal=is_causal, return_scores=True
    )
    kernel = np.einsum("bthd,bshd->bhts", (2 * query) ** 2, (2 * key) ** 2)
    kernel = kernel * (key_mask & (np.arange(6) % 2 == 0))[:, None, None]
    kernel = np.tril(kernel) if is_causal else kernel
    weights = kernel / kernel.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(scores), weights, atol=1e-6)
    expected = np.einsum("bhts,bshd->bthd", weights, value)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(output), expected, atol=1e-5)


def test_a_users_transform_trains_and_is_saved(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 5, 8)).astype("float32")
    inputs = keras.Input((None, 8))
    primal = Primal(transform=[Gain(), "batch_norm"])
    outputs = layers.PrimalDualAttention(2, 4, primal=primal, name="attention")(inputs, inputs)
    model = keras.Model(inputs, outputs)
    (gain,) = (weight for weight in model.trainable_weights if "gain" in weight.path)
    assert gain.shape == (2, 4)
    model.compile("adam", "mse")
    model.fit(x, x, verbose=0)
    assert np.abs(keras.ops.convert_to_numpy(gain) - 1).max() > 0
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    assert restored.get_layer("attention").primal == primal
    np.testing.assert_allclose(restored.predict(x, verbose=0), model.predict(x, verbose=0))


def test_a_user_asks_for_weights_as_of_keras():
    """By position, with the default initialiser and name, in a layer as in the op."""
    layer = layers.PrimalDualAttention(2, 4, primal=Primal(transform=Mixing()))
    layer.build((None, 3, 8), (None, 3, 8))
    mixing = keras.ops.convert_to_numpy(layer.weights[-1])
    assert mixing.shape == (2, 4) and np.abs(mixing).min() > 0
    (weights, _) = [member.initial_weights(2, 4) for member in layer.primal.weighted_members]
    drawn = keras.ops.convert_to_numpy(weights["mixing"])
    assert drawn.shape == (2, 4) and np.abs(drawn).min() > 0


def test_layers_given_one_primal_share_nothing():
    primal = Primal(transform=transforms.BatchNorm(learn_beta=True))
    first, second = (layers.PrimalDualAttention(2, 4, primal=primal) for _ in range(2))
    for layer in (first, second):
        layer.build((None, None, 8), (None, None, 8))
    first.weights[-1].assign(0.5)
    assert float(second.weights[-1].value) == 1.0


@pytest.mark.parametrize(
    "primal",
    [
        Primal(transform=Centered(1.0)),
        Primal(Squares(), [Centered(0.5), "batch_norm"], EvenKeys()),
        Primal(transform=["batch_norm", Gain()], training_set="scaled_heads"),
    ],
    ids=repr,
)
def test_a_users_members_are_causal_by_the_prefix_law(primal):
    """Statistics included, without a word on causality in their classes."""
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 2, 20, 4, 4)).astype("float32")
    full = ops.attention(query, key, value, primal, is_causal=True)
    for end in (2, 9, 20):
        prefix = ops.attention(query[:, :end], key[:, :end], value[:, :end], primal)
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(full)[:, end - 1],
            keras.ops.convert_to_numpy(prefix)[:, -1],
            atol=2e-5,
        )


def test_a_member_that_is_not_causal_says_so():
    x = np.ones((1, 3, 2, 4), "float32")
    primal = Primal(transform=NotCausal(1.0))
    ops.attention(x, x, x, primal)
    with pytest.raises(ValueError, match="NotCausal can't be used with a causal mask.*Received"):
        ops.attention(x, x, x, primal, is_causal=True)
    layer, inputs = layers.PrimalDualAttention(2, 2, primal=primal), keras.Input((3, 8))
    with pytest.raises(ValueError, match="NotCausal can't be used with a causal mask"):
        layer(inputs, inputs, use_causal_mask=True)


def test_a_convolution_over_a_grid_needs_one():
    x, image = keras.Input((12, 8)), keras.Input((3, 4, 8))
    layers.Conv2DAttention(2, 2)(image, image)
    layers.Conv2DAttention(2, 2, grid=(3, 4))(x, x)
    with pytest.raises(ValueError, match="takes its grid from inputs with two axes.*1 attended"):
        layers.Conv2DAttention(2, 2)(x, x)
    with pytest.raises(ValueError, match="several axes to attend over have their own"):
        layers.Conv2DAttention(2, 2, grid=(3, 4))(image, image)
    short = np.ones((1, 11, 8), "float32")
    with pytest.raises(ValueError, match="the 12 positions of 0 class tokens.*a length of 11"):
        layers.Conv2DAttention(2, 2, grid=(3, 4))(short, short)


def test_a_redraw_needs_random_features():
    x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype("float32")
    with pytest.raises(ValueError, match="Only random features can be drawn anew.*Elu"):
        layers.LinearAttention(2, 4).redraw(1)
    layer = layers.LinearAttention(2, 4, feature_map="positive_random")
    with pytest.raises(ValueError, match="when it is built"):
        layer.redraw(1)
    before = keras.ops.convert_to_numpy(layer(x, x))
    layer.redraw(1)
    after = keras.ops.convert_to_numpy(layer(x, x))
    assert np.abs(after - before).max() > 1e-3
    layer.redraw(0)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(layer(x, x)), before, atol=1e-6)
    with pytest.raises(ValueError, match="Received: seed=-1"):
        layer.redraw(-1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: transforms.BatchNorm(epsilon=0), "epsilon.*positive.*Received: epsilon=0"),
        (lambda: transforms.BatchNorm(epsilon=-1e-5), "Received: epsilon=-1e-05"),
        (lambda: transforms.BatchNorm(epsilon=float("nan")), "Received: epsilon=nan"),
        (lambda: transforms.BatchNorm(epsilon="small"), "Received: epsilon='small'"),
        (lambda: transforms.BatchNorm(beta=float("inf")), "Received: beta=inf"),
        (lambda: transforms.BatchNorm(center=1), "bool. Received: center=1"),
        (lambda: transforms.BatchNorm(center=False, scale=False), "must center or scale"),
        (lambda: transforms.BatchNorm(center=False, learn_beta=True), "learn_beta=True"),
        (lambda: training_sets.ScaledHeads(()), r"Received: scales=\(\)"),
        (lambda: training_sets.ScaledHeads(2), "Received: scales=2"),
        (lambda: training_sets.ScaledHeads((1, 0)), "positive integer. Received: scales=0"),
        (lambda: training_sets.ScaledHeads((1, 2.0)), "Received: scales=2.0"),
        (lambda: training_sets.ScaledHeads((True,)), "Received: scales=True"),
        (lambda: training_sets.ScaledHeads((1,), "max"), "Received: reduction='max'"),
        (lambda: transforms.Conv1D(4), "odd integer. Received: kernel_size=4"),
        (lambda: transforms.Conv1D(0), "Received: kernel_size=0"),
        (lambda: transforms.Conv2D(3, 4), "pair of positive integers.*Received: grid=4"),
        (lambda: transforms.Conv2D(3, (4, 0)), "Received: grid=0"),
        (lambda: transforms.Conv2D(3, class_tokens=1), "class_tokens=1, grid=None"),
        (lambda: transforms.Conv2D(3, (2, 2), -1), "Received: class_tokens=-1"),
        (lambda: training_sets.SlidingWindow(0), "Received: size=0"),
        (lambda: training_sets.SlidingWindow(2, 1.0), "Received: dilation=1.0"),
        (lambda: training_sets.SlidingWindow(2, 1, -1), "Received: global_tokens=-1"),
        (lambda: feature_maps.PositiveRandom(0), "Received: num_features=0"),
        (lambda: feature_maps.PositiveRandom(8, None), "Received: seed=None"),
        (lambda: layers.LinearAttention(2, 4, feature_map="softmax"), "needs a finite feature map"),
        (
            lambda: Primal(transform=transforms.Conv2D(3, (2, 2)), training_set="scaled_heads"),
            "Windows of a flattened grid.*Received: transform=",
        ),
        (
            lambda: layers.ScaledHeadAttention(2, 4, scales=(1, 2, 4)),
            r"Received: num_heads=2, scales=\(1, 2, 4\)",
        ),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
