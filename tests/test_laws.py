"""Laws 1, 3, 4, 5, 6 and 11 of every member, at the level of `ops.attention`."""

import backends
import hypothesis
import numpy as np
import pytest
from keras import ops as keras_ops
from members import MEMBERS, VARIANTS
from problems import Problem, problems

from keras_pdattn import Primal, ops, training_sets, transforms

every_member = pytest.mark.parametrize("member", MEMBERS, ids=str)
every_variant = pytest.mark.parametrize("member", MEMBERS + VARIANTS, ids=str)
few_examples = hypothesis.settings(max_examples=2 if backends.BACKEND == "jax" else 5)


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@every_variant
@hypothesis.given(problem=problems())
def test_oracle(member, problem):
    """Laws 1 and 5: outputs, fused or not, and scores are those of the literal definition."""
    expected, expected_scores = problem.oracle(member)
    tolerance = problem.tolerance(member)
    assert_close(problem.solve(member), expected, tolerance)
    output, scores = problem.solve(member, return_scores=True)
    assert_close(output, expected, tolerance)
    assert_close(scores, expected_scores, tolerance)
    sums = scores.sum(axis=-1)
    assert_close(sums, expected_scores.sum(axis=-1).round(), 1e-5)
    assert_close(np.einsum("bhts,bshd->bthd", scores, problem.value), output, 2e-5)


@every_variant
@few_examples
@hypothesis.given(problem=problems())
def test_oracle_in_float64(member, problem):
    """Law 1 to 1e-12, so that no formula hides behind float32."""
    problem = problem.cast("float64")
    expected, expected_scores = problem.oracle(member)
    with backends.float64():
        output, scores = problem.solve(member, return_scores=True)
    assert_close(output, expected, problem.tolerance(member))
    assert_close(scores, expected_scores, problem.tolerance(member))


def loss_gradients(member, problem, cotangent):
    """Gradients of `sum(output * cotangent)` with respect to query, key and value."""

    def loss(query, key, value):
        output = ops.attention(query, key, value, member.primal, **problem.options)
        return keras_ops.sum(output * keras_ops.convert_to_tensor(cotangent))

    return backends.gradients(loss, problem.arrays)


@every_member
@few_examples
@hypothesis.given(problem=problems())
def test_gradients(member, problem):
    """Law 1 for gradients: each equals the oracle's slope along a random direction."""
    problem = problem.cast("float64")
    rng = np.random.default_rng(0)
    output, _ = problem.oracle(member)
    cotangent = rng.normal(size=output.shape)
    with backends.float64():
        grads = loss_gradients(member, problem, cotangent)
    for name, array, gradient in zip(("query", "key", "value"), problem.arrays, grads):
        direction = rng.normal(size=array.shape)
        slopes = []
        for step in (1e-5, 1e-6):
            ends = [
                problem.replace(**{name: array + sign * step * direction}).oracle(member)[0]
                for sign in (1, -1)
            ]
            slopes.append(((ends[0] - ends[1]) * cotangent).sum() / (2 * step))
        # Where the oracle's two estimates differ, so may ours.
        tolerance = 1e-6 * max(1.0, abs(slopes[1])) + 10 * abs(slopes[0] - slopes[1])
        assert_close((gradient * direction).sum(), slopes[1], tolerance)


@every_member
@few_examples
@hypothesis.given(problem=problems(self_attention=True, causal=(True,)))
def test_prefix(member, problem):
    """Law 3: a causal output is that of a call, causal or not, on the prefix."""
    full = problem.solve(member)
    tolerance = problem.tolerance(member)
    length = problem.query.shape[1]
    for end in (1, length // 2 + 1):
        prefix = cut(problem, end)
        assert_close(prefix.solve(member)[:, -1], full[:, end - 1], tolerance)
        whole = prefix.replace(is_causal=False)
        assert_close(whole.solve(member)[:, -1], full[:, end - 1], tolerance)


def cut(problem, end):
    """The problem of the first `end` queries and keys."""
    options = dict(problem.options)
    for name in ("key_mask", "query_mask"):
        if name in options:
            options[name] = options[name][:, :end]
    if "mask" in options:
        options["mask"] = options["mask"][:, :, :end, :end]
    return Problem(*(x[:, :end] for x in problem.arrays), options)


@every_member
@few_examples
@hypothesis.given(problem=problems(self_attention=True, causal=(True,)))
def test_future_has_no_gradient(member, problem):
    """Law 3: the gradient of the first outputs is exactly zero at later keys."""
    seen = 2
    output, _ = problem.oracle(member)
    cotangent = np.zeros(output.shape, "float32")
    cotangent[:, :seen] = 1.0
    grads = loss_gradients(member, problem, cotangent)
    for gradient in grads:
        assert np.isfinite(gradient).all()
        assert (gradient[:, seen:] == 0).all()


@every_member
@few_examples
@hypothesis.given(problem=problems(self_attention=True))
def test_padding(member, problem):
    """Law 4: padding on either side, whatever it holds, changes no output and no gradient."""
    problem = problem.cast("float64")
    cotangent = np.random.default_rng(0).normal(size=problem.oracle(member)[0].shape)
    with backends.float64():
        check_padding(member, problem, cotangent, garbage=1e200, gradient_tolerance=1e-6)


@every_member
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_in_float32(member, is_causal):
    problem = fixed_problem(is_causal=is_causal)
    cotangent = np.random.default_rng(0).normal(size=problem.value.shape).astype("float32")
    cotangent[:, :3] = 0  # Prefixes of two keys have gradients that float32 hardly holds.
    check_padding(member, problem, cotangent, garbage=1e30, gradient_tolerance=1e-4)


def check_padding(member, problem, cotangent, garbage, gradient_tolerance):
    front, back = 2, 3
    inside = slice(front, -back)
    padded = pad(problem, front, back, garbage)
    expected, output = problem.solve(member), padded.solve(member)
    assert_close(output[:, inside], expected, problem.tolerance(member))
    assert (output[:, :front] == 0).all() and (output[:, -back:] == 0).all()
    padded_cotangent = np.pad(cotangent, [(0, 0), (front, back), (0, 0), (0, 0)])
    grads = loss_gradients(member, problem, cotangent)
    padded_grads = loss_gradients(member, padded, padded_cotangent)
    for gradient, padded_gradient in zip(grads, padded_grads):
        size = max(1.0, np.abs(gradient).max())
        assert_close(padded_gradient[:, inside], gradient, gradient_tolerance * size)
        assert (padded_gradient[:, :front] == 0).all()
        assert (padded_gradient[:, -back:] == 0).all()


def pad(problem, front, back, garbage):
    """Adds padded positions in front and behind, to queries and keys alike."""

    def fill(x, value, axes):
        width = [(front, back) if axis in axes else (0, 0) for axis in range(x.ndim)]
        return np.pad(x, width, constant_values=value)

    options = dict(problem.options)
    batch, length = problem.query.shape[:2]
    for name in ("key_mask", "query_mask"):
        mask = options.get(name, np.ones((batch, length), bool))
        options[name] = fill(mask, False, (1,))
    if "mask" in options:
        options["mask"] = fill(options["mask"], True, (2, 3))
    return Problem(*(fill(x, garbage, (1,)) for x in problem.arrays), options)


@every_member
@few_examples
@hypothesis.given(problem=problems(self_attention=True))
def test_seeing_nothing_gives_zero(member, problem):
    """Law 11: a query that may see nothing outputs exactly zero, with finite gradients."""
    length, key_length = problem.query.shape[1], problem.key.shape[1]
    mask = np.ones((1, 1, length, key_length), bool)
    mask[:, :, 1] = False
    problem = problem.replace(mask=mask)
    output, scores = problem.solve(member, return_scores=True)
    for result in (problem.solve(member), output):
        assert (result[:, 1] == 0).all()
    assert (scores[:, :, 1] == 0).all()
    for gradient in loss_gradients(member, problem, np.ones_like(output, "float32")):
        assert np.isfinite(gradient).all()


@every_member
def test_no_valid_key_gives_zero(member):
    """Law 11 for a batch whose second sequence is all padding."""
    problem = fixed_problem()
    key_mask = np.array([[True] * 7, [False] * 7])
    for is_causal in (False, True):
        blind = problem.replace(key_mask=key_mask, is_causal=is_causal)
        output = blind.solve(member)
        assert (output[1] == 0).all()
        alone = Problem(*(x[:1] for x in problem.arrays), {"is_causal": is_causal})
        assert_close(output[:1], alone.solve(member), problem.tolerance(member))
        for gradient in loss_gradients(member, blind, np.ones_like(output, "float32")):
            assert np.isfinite(gradient).all()
            assert (gradient[1] == 0).all()


@every_member
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_inside_windows(member, is_causal):
    """Windows that start with padding, hold nothing else, or end with it."""
    key_mask = np.array([[1, 1, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 1, 1]], bool)
    problem = fixed_problem(key_mask=key_mask, is_causal=is_causal)
    expected, expected_scores = problem.oracle(member)
    output, scores = problem.solve(member, return_scores=True)
    assert_close(output, expected, problem.tolerance(member))
    assert_close(scores, expected_scores, problem.tolerance(member))


def fixed_problem(**options):
    rng = np.random.default_rng(3)
    query, key, value = rng.normal(size=(3, 2, 7, 4, 4)).astype("float32")
    return Problem(query, key, value, options)


@every_member
def test_every_mask_acts(member):
    """Law 11: no mask argument is inert, and one that hides nothing is as good as none."""
    rng = np.random.default_rng(0)
    problem = fixed_problem()
    plain = problem.solve(member)
    hiding = {
        "mask": rng.random((2, 1, 7, 7)) < 0.6,
        "key_mask": np.arange(7) < np.array([[5], [6]]),
        "query_mask": np.arange(7) < np.array([[5], [6]]),
    }
    for name, mask in hiding.items():
        masked = problem.replace(**{name: mask}).solve(member)
        assert np.abs(masked - plain).max() > 1e-3, name
        as_integers = problem.replace(**{name: mask.astype("int32")}).solve(member)
        assert_close(as_integers, masked, 0)
        nothing = problem.replace(**{name: np.ones_like(mask)}).solve(member)
        assert_close(nothing, plain, 1e-6)
    causal = problem.replace(is_causal=True).solve(member)
    assert np.abs(causal - plain).max() > 1e-3
    windowed = problem.replace(sliding_window=3).solve(member)
    assert np.abs(windowed - plain).max() > 1e-3
    assert np.abs(windowed - problem.replace(sliding_window=4).solve(member)).max() > 1e-3


@every_member
def test_mask_and_causality_are_both_kept(member):
    """A mask under a causal call hides what it hides, and the future too."""
    mask = np.random.default_rng(0).random((2, 4, 7, 7)) < 0.6
    past = np.tril(np.ones((7, 7), bool))
    problem = fixed_problem(is_causal=True)
    both = problem.replace(mask=mask).solve(member)
    assert_close(both, problem.replace(mask=mask & past).solve(member), 0)
    assert np.abs(both - problem.solve(member)).max() > 1e-3


@every_member
def test_wide_window_is_none(member):
    """Law 6: a window as wide as the sequence restricts nothing."""
    for is_causal in (False, True):
        problem = fixed_problem(is_causal=is_causal)
        wide = problem.replace(sliding_window=7)
        assert_close(wide.solve(member), problem.solve(member), 1e-6)


@every_member
def test_values_of_one_give_one(member):
    """Law 6: the weights of a query are a partition of one."""
    for options in ({}, {"is_causal": True}, {"key_mask": np.arange(7) < np.array([[5], [6]])}):
        problem = fixed_problem(**options)
        problem = problem.replace(value=np.ones_like(problem.value))
        assert_close(problem.solve(member), np.ones((2, 7, 4, 4)), 1e-6)


@every_member
def test_causal_position_zero(member):
    """The first query of a causal call can only give the first value."""
    problem = fixed_problem(is_causal=True)
    assert_close(problem.solve(member)[:, 0], problem.value[:, 0], 1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_scale_one_is_the_plain_head(is_causal):
    """Law 6: scaled heads of scale 1, averaged or sampled, are plain heads."""
    problem = fixed_problem(is_causal=is_causal)
    plain = ops.attention(*problem.arrays, "batch_norm", is_causal=is_causal)
    for scales, reduction in (((1,), "mean"), ((1, 1, 1), "first")):
        primal = Primal(
            transform="batch_norm", training_set=training_sets.ScaledHeads(scales, reduction)
        )
        scaled = ops.attention(*problem.arrays, primal, is_causal=is_causal)
        assert_close(backends.to_numpy(scaled), backends.to_numpy(plain), 1e-6)


@pytest.mark.parametrize("training_set", ["all_keys", "scaled_heads"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_batch_norm_is_invariant(training_set, is_causal):
    """Law 6: shift all keys and queries, or (without epsilon) scale a feature: no change."""
    primal = Primal(transform=transforms.BatchNorm(epsilon=1e-12), training_set=training_set)
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 2, 40, 4, 8)).astype("float32")
    shift = rng.normal(size=(4, 8)).astype("float32") * 3
    scale = rng.uniform(0.5, 2.0, size=(4, 8)).astype("float32")

    def solve(query, key):
        output = ops.attention(query, key, value, primal, is_causal=is_causal)
        return backends.to_numpy(output)

    # From the tenth position on: before, a prefix may have hardly any spread.
    plain = solve(query, key)[:, 10:]
    assert_close(solve(query + shift, key + shift)[:, 10:], plain, 1e-4)
    assert_close(solve(query * scale, key * scale)[:, 10:], plain, 1e-4)
    assert np.abs(solve(query + shift, key)[:, 10:] - plain).max() > 1e-2


@every_member
def test_identical_keys(member):
    """Keys without any spread share their weight evenly, for any member, and stay finite."""
    problem = fixed_problem()
    problem = problem.replace(key=np.ones_like(problem.key))
    for is_causal in (False, True):
        expected, _ = problem.replace(is_causal=is_causal).oracle(member)
        output = problem.replace(is_causal=is_causal).solve(member)
        assert_close(output, expected, 1e-5)


@every_member
@pytest.mark.parametrize(
    "shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 1, 1), (1, 1, 9), (1, 9, 1)], ids=str
)
def test_empty_and_single(member, shape):
    """No queries, keys or sequences give an empty or zero output; one of each works."""
    batch, queries, keys = shape
    rng = np.random.default_rng(0)
    problem = Problem(
        *(rng.normal(size=(batch, n, 4, 4)).astype("float32") for n in (queries, keys, keys)), {}
    )
    for is_causal in (False, True):
        output, scores = problem.replace(is_causal=is_causal).solve(member, return_scores=True)
        expected, expected_scores = problem.replace(is_causal=is_causal).oracle(member)
        assert_close(output, expected, 1e-5)
        assert_close(scores, expected_scores, 1e-5)
        assert_close(problem.replace(is_causal=is_causal).solve(member), expected, 1e-5)
