"""Law 10: regressions as attention, attention as regressions; the numbers of both."""

import dataclasses

import backends
import keras
import numpy as np
import pytest
import reference
from keras import ops as keras_ops
from members import RANDOM, conv1d_kernel, every_member, few_where_compiled, omega
from user_members import EvenKeys

from keras_pdattn import Primal, duality, layers, transforms
from keras_pdattn.layers import PrimalDualAttention
from keras_pdattn.training_sets import ScaledHeads

SH = ScaledHeads((3,)), {"scales": (3,)}


@dataclasses.dataclass(frozen=True)
class Head:
    """A primal problem of one head, and what the oracle is told of it."""

    name: str
    primal: Primal
    oracle: reference.Primal

    def __str__(self):
        return self.name

    def weights(self, depth):
        kernels = [
            {"kernel": conv1d_kernel(1, depth)} if isinstance(one, transforms.Conv1D) else {}
            for one in self.primal.transform
        ]
        return [*kernels, {"omega": omega(1, depth)} if self.primal.feature_map == RANDOM else {}]


def head(name, feature_map="softmax", kernel=reference.softmax_kernel, transform=(), **told):
    ours = {
        "half": (transforms.BatchNorm(beta=0.5), reference.BatchNorm(beta=0.5)),
        "bn": (transforms.BatchNorm(), reference.BatchNorm()),
        "conv": (transforms.Conv1D(3), reference.Conv(conv1d_kernel)),
    }
    chain = [ours[one] for one in transform]
    training_set = ScaledHeads(told["scales"], told.get("reduction", "mean")) if told else None
    primal = Primal(feature_map, [one for one, _ in chain], training_set)
    return Head(name, primal, reference.Primal(kernel, tuple(other for _, other in chain), **told))


FINITE = [
    head("elu", "elu", reference.elu_kernel),
    head("relu", "relu", reference.relu_kernel),
    head("taylor", "taylor", reference.taylor_kernel),
    head("random", RANDOM, reference.positive_random_kernel(omega)),
    head("elu-bn", "elu", reference.elu_kernel, ["bn"]),
    head("elu-sh", "elu", reference.elu_kernel, scales=(3,)),
    head("taylor-conv-bn-sh", "taylor", reference.taylor_kernel, ["conv", "bn"], scales=(2,)),
]
HEADS = [
    head("softmax"),
    head("bn", transform=["bn"]),
    head("half-bn", transform=["half"]),
    head("sh", scales=(3,)),
    head("first", scales=(3,), reduction="first"),
    head("bn-sh", transform=["bn"], scales=(2,)),
    head("conv", transform=["conv"]),
    *FINITE,
]
every_head = few_where_compiled("head", HEADS, few=[*HEADS[4:7], *FINITE[::6]])
every_finite_head = few_where_compiled("head", FINITE, few=FINITE[::2])
with_intercept_or_not = pytest.mark.parametrize("fit_intercept", [True, False])

RNG = np.random.default_rng(0)
KEYS, QUERIES = RNG.normal(size=(31, 3)), RNG.normal(size=(17, 3))
TARGETS = np.stack([np.sin(2 * KEYS[:, 0]), KEYS[:, 1] * KEYS[:, 2]], axis=1) + 0.3


def fitted(head, **options):
    options = {"epsilon": 0.05, "weights": head.weights(3), **options}
    return duality.fit(KEYS, TARGETS, head.primal, **options)


def oracle_kernel(head, queries):
    """K(x, k_j) = kappa / (h h), its literal definition; and the targets of the examples."""
    scale, log_kernel = head.oracle.scales[0], head.oracle.log_kernel
    fit = (KEYS, TARGETS, queries, head.oracle, scale, None, None, (None, None), 0, False)
    _, keys, values, queries, _ = reference.fit(*fit)
    keys, queries = (np.array([x[at] for at in sorted(x)]) for x in (keys, queries))

    def kernel(x, y):
        return np.array([[np.exp(log_kernel(a, b, 0)) for b in y] for a in x])

    among_keys, with_queries = kernel(keys, keys), kernel(queries, keys)
    # A normaliser of zero has only kernels of zero to divide.
    h_queries, h_keys = (np.where(h > 0, h, 1.0) for h in (with_queries.sum(1), among_keys.sum(1)))
    targets = np.array([values[at] for at in sorted(values)])
    return with_queries / np.outer(h_queries, h_keys), targets


def predicted(regression, kernel):
    """What scikit-learn's own `predict` says of a kernel."""
    kernel = regression.kernel_scale * kernel
    if regression.fit_intercept:
        return np.stack([one.predict(kernel) for one in regression.regressors], axis=1)
    kernel = np.concatenate([kernel, -kernel], axis=1)
    outputs = [one.predict(kernel) - one.intercept_ for one in regression.regressors]
    return np.stack(outputs, axis=1)


@every_head
@with_intercept_or_not
def test_the_layer_is_the_regression(head, fit_intercept):
    """On held-out queries, to 1e-10 in float64 and 1e-5 in float32."""
    with backends.float64():
        regression = fitted(head, fit_intercept=fit_intercept)
        kernel, targets = oracle_kernel(head, QUERIES)
        expected = predicted(regression, kernel)
        assert np.abs(expected - expected.mean(axis=0)).max() > 0.1
        np.testing.assert_allclose(regression.targets, targets, atol=1e-12)
        np.testing.assert_allclose(regression.predict(QUERIES), expected, atol=1e-10)
        layer = regression.to_layer(dtype="float64")
        assert isinstance(layer, PrimalDualAttention)
        output = backends.to_numpy(backends.jitted(layer)(QUERIES[np.newaxis]))
        np.testing.assert_allclose(output[0], expected, atol=1e-10)
    layer = backends.jitted(regression.to_layer())
    output = backends.to_numpy(layer(QUERIES[np.newaxis].astype("float32")))
    assert not fit_intercept or np.abs(regression.intercept).max() > 0
    np.testing.assert_allclose(output[0], expected, atol=1e-5)


@pytest.mark.parametrize("head", [HEADS[0], HEADS[5], FINITE[4]], ids=str)
def test_in_the_dtype_that_the_backend_defaults_to(head):
    """JAX has no float64 unless told to; what is fitted in float32 is the layer's function too."""
    regression = fitted(head)
    expected = predicted(regression, oracle_kernel(head, QUERIES)[0])
    output = backends.to_numpy(regression.to_layer()(QUERIES[np.newaxis].astype("float32")))
    np.testing.assert_allclose(output[0], expected, atol=1e-5)
    np.testing.assert_allclose(regression.predict(QUERIES), expected, atol=1e-5)


@every_head
@with_intercept_or_not
def test_the_solution_is_one(head, fit_intercept):
    """No gap between the objectives, and what follows from that."""
    with backends.float64():
        regression = fitted(head, fit_intercept=fit_intercept)
        kernel, targets = oracle_kernel(head, KEYS)
        if len(targets) == len(KEYS):
            coefficients = regression.dual_coefficients
            outputs = kernel @ coefficients + regression.intercept
            np.testing.assert_allclose(regression.predict(KEYS), outputs, atol=1e-8)
            error = np.abs(targets - outputs)
            inside = error < regression.epsilon - 1e-3
            outside = error > regression.epsilon + 1e-3
            assert inside.any()
            assert (coefficients[inside] == 0).all()
            np.testing.assert_allclose(np.abs(coefficients[outside]), regression.C, rtol=1e-9)
            assert ((targets - outputs) * coefficients >= 0)[error > 1e-3].all()
            norm = np.einsum("id,ij,jd->d", coefficients, kernel, coefficients)
            slack = np.maximum(error - regression.epsilon, 0).sum(axis=0)
            objective = norm / 2 + regression.C * slack
            np.testing.assert_allclose(regression.primal_objective, objective, rtol=1e-6)
    assert np.abs(regression.dual_coefficients).max() <= regression.C * (1 + 1e-12)
    sums = regression.dual_coefficients.sum(axis=0) / regression.C
    assert not fit_intercept or np.abs(sums).max() < 1e-9
    assert (regression.duality_gap >= -1e-6 * regression.primal_objective).all()
    assert (regression.duality_gap <= 1e-3 * regression.primal_objective).all()
    assert 0 < len(regression.support) == len(regression.support_vectors) <= len(regression.targets)


def test_a_wide_tube_leaves_few_support_vectors():
    counts = [len(fitted(HEADS[0], epsilon=epsilon).support) for epsilon in (0.01, 0.2, 0.6)]
    assert counts[0] > counts[1] > counts[2] > 0
    few = fitted(HEADS[0], epsilon=0.6)
    np.testing.assert_allclose(few.support_vectors, KEYS[few.support], rtol=1e-6)
    assert np.count_nonzero(few.values.any(axis=1)) == counts[2]
    assert f"support_vectors={counts[2]}" in repr(few)


@every_finite_head
@with_intercept_or_not
def test_the_primal_layer_is_the_dual_layer(monkeypatch, head, fit_intercept):
    """Through W, and through the kernel of all pairs; and both are the oracle's expansion."""
    with backends.float64():
        regression = fitted(head, fit_intercept=fit_intercept)
        primal, dual = (
            regression.to_primal_layer(dtype="float64"),
            regression.to_layer(dtype="float64"),
        )
        by_dual = backends.to_numpy(dual(QUERIES[np.newaxis]))[0]
        monkeypatch.delattr("keras_pdattn.feature_maps.dual_attention")
        monkeypatch.delattr("keras_pdattn.ops.states.primal_attention")
        output = backends.to_numpy(primal(QUERIES[np.newaxis]))[0]
        matrix = regression.weight_matrix
    kernel, _ = oracle_kernel(head, QUERIES)
    expected = kernel @ regression.dual_coefficients + regression.intercept
    # Not closer, as Keras's `Dense` multiplies float64 in float32 on some backends.
    np.testing.assert_allclose(output, by_dual, atol=1e-6)
    np.testing.assert_allclose(output, expected, atol=1e-6)
    assert matrix.shape == (2, primal.layers[0].normalizer.shape[0])
    assert type(primal.layers[1]) is keras.layers.Dense
    single = regression.to_primal_layer()
    output = backends.to_numpy(single(QUERIES[np.newaxis].astype("float32")))[0]
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_the_weight_matrix_is_its_definition():
    """W = sum_j beta_j phi(k_j) / h(k_j), and |W|^2 the norm in both objectives."""
    with backends.float64():
        regression = fitted(FINITE[0])
        features = np.where(KEYS > 0, KEYS + 1, np.exp(np.minimum(KEYS, 0)))
        normalizer = features @ features.sum(axis=0)
        expected = regression.dual_coefficients.T @ (features / normalizer[:, np.newaxis])
        np.testing.assert_allclose(regression.weight_matrix, expected, rtol=1e-9)
        slack = regression.primal_objective - np.square(expected).sum(axis=1) / 2
        outputs = regression.predict(KEYS)
        missed = np.maximum(np.abs(TARGETS - outputs) - regression.epsilon, 0).sum(axis=0)
        np.testing.assert_allclose(slack, regression.C * missed, rtol=1e-6)


@pytest.mark.parametrize("head", [HEADS[1], FINITE[-1]], ids=str)
def test_regressions_are_saved(head, tmp_path):
    """As attention and as an ordinary network, in a model of unknown length."""
    regression = fitted(head)
    made = [regression.to_layer()]
    if head.primal.feature_map.is_finite:
        made.append(regression.to_primal_layer())
    queries = QUERIES[np.newaxis].astype("float32")
    for layer in made:
        inputs = keras.Input((None, 3))
        model = keras.Model(inputs, layer(inputs))
        assert tuple(model.output.shape) == (None, None, 2)
        model.save(tmp_path / "model.keras")
        restored = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
        expected = model.predict(queries, verbose=0)
        np.testing.assert_allclose(restored.predict(queries, verbose=0), expected, atol=1e-6)
        np.testing.assert_allclose(expected[0], regression.predict(QUERIES), atol=1e-4)


def test_a_loaded_regression_trains():
    regression = fitted(HEADS[0])
    inputs = keras.Input((None, 3))
    layer = regression.to_layer()
    model = keras.Model(inputs, layer(inputs))
    model.compile("adam", "mse")
    x = np.repeat(QUERIES[np.newaxis].astype("float32"), 4, axis=0)
    before = keras_ops.convert_to_numpy(layer.values).copy()
    assert model.fit(x, np.zeros((4, 17, 2)), verbose=0).history["loss"][0] > 0
    assert np.abs(keras_ops.convert_to_numpy(layer.values) - before).max() > 0


def by_hand(layer, x):
    """Keys and values of a layer called on `x`, projected in float64."""
    weights = [keras_ops.convert_to_numpy(w).astype("float64") for w in layer.weights]
    return [np.einsum("btc,chd->bthd", x, weights[at]) + weights[at + 1] for at in (2, 4)]


X = np.random.default_rng(1).normal(size=(2, 7, 12)).astype("float32")
MASK = np.array([[True] * 7, [False] + [True] * 4 + [False] * 2])


@every_member
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_dual_coefficients_are_their_definition(member, masked):
    """alpha_j = v_j h(T(k_j)), by loops over examples, for every kind of member."""
    layer = PrimalDualAttention(4, 4, value_dim=3, primal=member.primal)
    layer.build(X.shape, X.shape)
    drawn = [w for one in member.weights(4, 4) for w in one.values()]
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=w.shape) / 3 for w in layer.weights]
    layer.set_weights(weights[: len(weights) - len(drawn)] + drawn)
    mask = MASK if masked else np.ones_like(MASK)
    inputs = {"value": X, "value_mask": MASK} if masked else X
    found = duality.dual_coefficients(layer, inputs)
    assert found.shape == (2, 4, 7, 3)
    assert (found[~np.broadcast_to(mask[:, np.newaxis], (2, 4, 7))] == 0).all()
    keys, values = by_hand(layer, X)
    scales = reference.head_scales(4, member.oracle.scales)
    for b, h in np.ndindex(2, 4):
        taken_in = set()
        options = (scales[h], mask[b], mask[b], (None, None), h, False)
        fit = (keys[b, :, h], values[b, :, h], keys[b, :, h], member.oracle, *options)
        examples, transformed, pooled, _, valid = reference.fit(*fit)
        for at, members in examples.items():
            window = member.oracle.window
            normalizer = sum(
                np.exp(member.oracle.log_kernel(transformed[at], transformed[other], h))
                for other in examples
                if window is None
                or reference.in_window(at[0], other[0], None, None, valid, *window)
            )
            taken_in.update(members)
            for key in members:
                np.testing.assert_allclose(
                    found[b, h, key], pooled[at] * normalizer, rtol=2e-4, atol=1e-4
                )
        assert (found[b, h, sorted(set(range(7)) - taken_in)] == 0).all()


def test_attention_is_the_expansion_of_its_dual_coefficients():
    """What a trained head computes, from its coefficients and the normalised kernel alone."""
    layer = layers.BatchNormAttention(2, 4)
    output, scores = layer(X, X, return_attention_scores=True)
    coefficients = duality.dual_coefficients(layer, X)
    _, values = by_hand(layer, X)
    # alpha_j / h_j = v_j: scores times these is the heads' output.
    normalizer = coefficients[:, :, :, 0] / np.moveaxis(values[..., 0], 1, 2)
    shares = backends.to_numpy(scores) / normalizer[:, :, np.newaxis]
    heads = np.einsum("bhts,bhsd->bthd", shares, coefficients)
    kernel, bias = (keras_ops.convert_to_numpy(w) for w in layer.weights[6:8])
    expected = np.einsum("bthd,hdc->btc", heads, kernel) + bias
    np.testing.assert_allclose(backends.to_numpy(output), expected, atol=1e-4)


def test_a_regression_keeps_its_coefficients_as_a_layer():
    """Loaded into a layer, `dual_coefficients` reads back what scikit-learn solved."""
    with backends.float64():
        for head in (HEADS[0], HEADS[5], FINITE[0]):
            regression = fitted(head)
            layer = regression.to_layer(dtype="float64")
            found = duality.dual_coefficients(layer, None)[0, 0]
            scale = head.oracle.scales[0]
            example = np.arange(len(KEYS)) // scale
            expected = regression.dual_coefficients[example]
            np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8 * regression.C)
            vectors = duality.support_vectors(layer, None, tolerance=1e-9)
            np.testing.assert_array_equal(
                np.flatnonzero(vectors.mask[0, 0]),
                np.flatnonzero(np.isin(example, regression.support)),
            )


def layer_with_values(values, key_scale=1.0, **arguments):
    """One head whose values are `values`, `(1, N, 1)`, called on them."""
    layer = PrimalDualAttention(1, 1, use_bias=False, **arguments)
    layer.build((None, None, 2), (None, None, 2))
    kernels = [np.array([[[0.0]], [[key_scale]]]) for _ in range(2)]
    layer.set_weights([*kernels, np.array([[[1.0]], [[0.0]]]), np.ones((1, 1, 2))])
    keys = np.ones_like(values)
    return layer, np.concatenate([values, keys], axis=-1).astype("float32")


def test_support_vectors_are_counted():
    values = np.array([[[3.0], [0.0], [-0.1], [0.002], [0.0]]])
    layer, x = layer_with_values(values)
    vectors = duality.support_vectors(layer, x)
    np.testing.assert_array_equal(vectors.mask, [[[True, False, True, False, False]]])
    np.testing.assert_array_equal(vectors.count, [[2]])
    np.testing.assert_allclose(vectors.share, [[0.4]])
    assert duality.support_vectors(layer, x, tolerance=1e-4).count == 3
    assert duality.support_vectors(layer, x, tolerance=0.0).count == 3
    assert duality.support_vectors(layer, x, tolerance=0.5).count == 1
    masked = {"value": x, "value_mask": np.array([[False, True, True, True, True]])}
    vectors = duality.support_vectors(layer, masked)
    np.testing.assert_array_equal(vectors.mask, [[[False, False, True, True, False]]])
    np.testing.assert_allclose(vectors.share, [[0.5]])
    attached = keras.layers.Masking()(x * [[[0.0], [1], [1], [1], [1]]])
    implicit = duality.support_vectors(layer, attached)
    np.testing.assert_array_equal(implicit.mask, vectors.mask)
    assert duality.support_vectors(layer, 0 * x).count == 0


def test_support_vectors_of_heads_whose_normalizer_no_float_holds():
    values = np.array([[[3.0], [0.0], [-0.1]]])
    layer, x = layer_with_values(values, key_scale=40.0)
    np.testing.assert_array_equal(duality.support_vectors(layer, x).mask, [[[True, False, True]]])


def test_windows_and_pooled_keys():
    """Each key of a pooled window carries its coefficient; a window limits the normaliser."""
    values = np.array([[[1.0], [3.0], [0.0], [0.0], [5.0]]])
    layer, x = layer_with_values(values, primal=Primal(training_set=ScaledHeads((2,))))
    h = 3 * np.e
    np.testing.assert_allclose(
        duality.dual_coefficients(layer, x)[0, 0, :, 0], h * np.array([2, 2, 0, 0, 5]), rtol=1e-5
    )
    layer, x = layer_with_values(values, sliding_window=2)
    counts = np.array([2, 3, 3, 3, 2])
    np.testing.assert_allclose(
        duality.dual_coefficients(layer, x)[0, 0, :, 0], np.e * counts * values[0, :, 0], rtol=1e-5
    )


def test_a_users_training_set():
    """Keys that it leaves out have no coefficient, in a trained head as in a regression."""
    primal = Primal("elu", "batch_norm", EvenKeys())
    with backends.float64():
        regression = duality.fit(KEYS, TARGETS, primal, epsilon=0.05)
        chosen = duality.fit(KEYS[::2], TARGETS[::2], Primal("elu", "batch_norm"), epsilon=0.05)
        expected = chosen.predict(QUERIES)
        np.testing.assert_allclose(regression.predict(QUERIES), expected, atol=1e-6)
        np.testing.assert_allclose(regression.support_vectors, chosen.support_vectors)
        for layer in (regression.to_layer(dtype="float64"), regression.to_primal_layer("float64")):
            output = backends.to_numpy(layer(QUERIES[np.newaxis]))[0]
            np.testing.assert_allclose(output, expected, atol=1e-6)
    layer = PrimalDualAttention(2, 4, primal=primal)
    layer(X, X)
    found = duality.dual_coefficients(layer, X)
    assert (found[:, :, 1::2] == 0).all() and (found[:, :, ::2] != 0).all()


def test_a_flattened_grid():
    """A convolution over a grid, in both layers."""
    primal = Primal("elu", transforms.Conv2D(3, (4, 5)))
    with backends.float64():
        regression = duality.fit(KEYS[:20], TARGETS[:20], primal, epsilon=0.05)
        queries = RNG.normal(size=(20, 3))
        for layer in (regression.to_layer(dtype="float64"), regression.to_primal_layer("float64")):
            output = backends.to_numpy(layer(queries[np.newaxis]))[0]
            np.testing.assert_allclose(output, regression.predict(queries), atol=1e-6)


def test_masks_pass_through():
    regression = fitted(FINITE[0])
    masked = keras.layers.Masking()(QUERIES[np.newaxis].astype("float32"))
    for layer in (regression.to_layer(), regression.to_primal_layer()):
        assert layer(masked)._keras_mask is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keys": -np.abs(KEYS), "primal": Primal("relu")}, "beyond floats, or zero.*Relu"),
        ({"keys": 40 * KEYS}, "beyond floats, or zero.*Received: keys of size"),
        ({"primal": "conv1d", "weights": [{}, {}]}, "`weights` of Conv1D must have the shapes"),
        ({"keys": KEYS[:-1]}, r"`keys` must have the shape.*keys.shape=\(30, 3\)"),
        ({"keys": KEYS[np.newaxis]}, "`keys` must have the shape"),
        ({"keys": np.full_like(KEYS, np.nan)}, "`keys` must be finite"),
        ({"keys": None}, "`keys` must be a tensor of numbers. Received: keys=None"),
        ({"C": 0}, "`C`.*Received: C=0"),
        ({"C": "auto"}, "Received: C='auto'"),
        ({"epsilon": -1}, "`epsilon`.*Received: epsilon=-1"),
        ({"tolerance": 0}, "Received: tolerance=0"),
        ({"fit_intercept": 1}, "bool. Received: fit_intercept=1"),
        ({"primal": "sliding_window"}, "no one regression.*Received: training_set=SlidingWindow"),
        ({"primal": "conv2d"}, "takes its grid from inputs with two axes"),
        ({"primal": "scaled_head"}, "at least one head for each scale"),
        ({"weights": []}, "`weights` must hold"),
    ],
    ids=str,
)
def test_bad_arguments_of_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        duality.fit(**{"keys": KEYS, "values": TARGETS, **arguments})


def test_what_has_no_matrix_or_coefficients_says_why():
    regression = fitted(HEADS[0])
    with pytest.raises(ValueError, match="no matrix to write down.*Softmax"):
        regression.to_primal_layer()
    with pytest.raises(ValueError, match="no matrix to write down"):
        _ = regression.weight_matrix
    with pytest.raises(ValueError, match="has no end"):
        layers.NormalizedFeatures("softmax")
    layer = PrimalDualAttention(2, 4)
    with pytest.raises(ValueError, match="must be a built PrimalDualAttention"):
        duality.dual_coefficients(layer, X)
    with pytest.raises(ValueError, match="must be a built PrimalDualAttention"):
        duality.dual_coefficients(keras.layers.MultiHeadAttention(2, 4), X)
    layer(X, X)
    with pytest.raises(ValueError, match="regression, of its own. Received: inputs with `use_caus"):
        duality.dual_coefficients(layer, {"value": X, "use_causal_mask": True})
    with pytest.raises(ValueError, match="Received: inputs with `attention_mask`"):
        duality.support_vectors(layer, {"value": X, "attention_mask": np.ones((7, 7), bool)})
    with pytest.raises(ValueError, match="Received: tolerance=1"):
        duality.support_vectors(layer, X, tolerance=1)
    pooled = layers.ScaledHeadAttention(2, 4, scales=(1, 2), sliding_window=3)
    pooled(X, X)
    with pytest.raises(ValueError, match="a regression of its own.*sliding_window=3"):
        duality.dual_coefficients(pooled, X)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X, X), "must be an array or a tensor, or a dict"),
        ({"query": X}, "or a dict of call arguments with `value`"),
        (keras.Input((7, 12)), "must be an array or a tensor"),
        (X.astype("int32"), "`value` must be floating point"),
        (X[..., :5], "built for a `value` with 12 features"),
        (X[0], "must have the shape"),
        ({"value": X, "key": X[:, :5]}, "must be equal"),
    ],
)
def test_inputs_of_trained_heads(inputs, message):
    layer = PrimalDualAttention(2, 4)
    layer(X, X)
    with pytest.raises(ValueError, match=message):
        duality.dual_coefficients(layer, inputs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fitted(HEADS[0]).predict(KEYS[:, :2]), r"of shape \(T, 3\). Received: queries="),
        (lambda: fitted(HEADS[0]).predict(KEYS[0]), "`queries` must be finite numbers"),
        (lambda: fitted(HEADS[0]).predict(KEYS * np.nan), "`queries` must be finite numbers"),
        (
            lambda: fitted(HEADS[0]).to_layer()(X),
            "for a `query` with 3 features. Received: query.shape",
        ),
        (lambda: layers.SupportVectorAttention(5, 3, 2, "sliding_window"), "a window has no mean"),
        (lambda: layers.SupportVectorAttention(0, 3, 2), "Received: num_examples=0"),
        (lambda: layers.NormalizedFeatures(Primal("elu", "conv2d")), "takes its grid from inputs"),
    ],
)
def test_bad_queries_and_layers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_queries():
    assert fitted(HEADS[0]).predict(KEYS[:0]).shape == (0, 2)
