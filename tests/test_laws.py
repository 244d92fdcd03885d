"""Laws 1, 3, 4, 5 and 6, on problems that hypothesis finds and on special ones."""

import backends
import hypothesis
import numpy as np
import pytest
from members import (
    BY_DEFAULT,
    MEMBERS,
    VARIANTS,
    every_member,
    every_member_compiled,
    few_where_compiled,
)
from problems import Problem, assert_close, check_against_oracle, problems

from keras_pdattn import Primal, feature_maps, ops, training_sets, transforms

every_variant = few_where_compiled("member", MEMBERS + VARIANTS, BY_DEFAULT + VARIANTS)
few_examples = hypothesis.settings(max_examples=1 if backends.BACKEND == "jax" else 4)


@every_variant
@hypothesis.given(problem=problems())
def test_oracle(member, problem):
    """Laws 1 and 5: outputs, fused or not, and scores are those of the literal definition."""
    check_against_oracle(member, problem)


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
        grads = problem.gradients(member, cotangent)
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
        if all(transform.is_pointwise for transform in member.primal.transform):
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
@hypothesis.given(problem=problems(self_attention=True))
def test_padding(member, problem):
    """Law 4: padding on either side, whatever it holds, changes no output and no gradient."""
    problem = problem.cast("float64")
    cotangent = np.random.default_rng(0).normal(size=problem.oracle(member)[0].shape)
    with backends.float64():
        check_padding(member, problem, cotangent, garbage=1e200)


def check_padding(member, problem, cotangent, garbage):
    front, back = 2, 3
    inside = slice(front, -back)
    padded = pad(problem, front, back, garbage)
    padded_cotangent = np.pad(cotangent, [(0, 0), (front, back), (0, 0), (0, 0)])
    expected, grads = problem.output_and_gradients(member, cotangent)
    output, padded_grads = padded.output_and_gradients(member, padded_cotangent)
    assert_close(output[:, inside], expected, problem.tolerance(member))
    assert (output[:, :front] == 0).all() and (output[:, -back:] == 0).all()
    for gradient, padded_gradient in zip(grads, padded_grads):
        size = max(1.0, np.abs(gradient).max())
        assert_close(padded_gradient[:, inside], gradient, 1e-6 * size)
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
        outer = options["mask"].shape[:2]
        full = np.broadcast_to(options["mask"], outer + (length, length))
        options["mask"] = fill(full, True, (2, 3))
    return Problem(*(fill(x, garbage, (1,)) for x in problem.arrays), options)


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
def test_window_of_any_member(member):
    """A1, A3 and law 6: `sliding_window` acts, with causality, unless as wide as the sequence."""
    for is_causal in (False, True):
        problem = fixed_problem(is_causal=is_causal)
        plain = problem.solve(member)
        wide = problem.replace(sliding_window=7)
        assert_close(wide.solve(member), plain, 1e-5)
        if member.primal.training_set != training_sets.SlidingWindow(2):
            windowed = problem.replace(sliding_window=3)
            expected, _ = windowed.oracle(member)
            assert_close(windowed.solve(member), expected, problem.tolerance(member))
            assert np.abs(expected - plain).max() > 1e-3


@every_member
def test_values_of_one_give_one(member):
    """Law 6: the weights of a query are a partition of one, where it sees anything."""
    for options in ({}, {"is_causal": True}, {"key_mask": np.arange(7) < np.array([[5], [6]])}):
        problem = fixed_problem(**options)
        problem = problem.replace(value=np.ones_like(problem.value))
        _, scores = problem.oracle(member)
        sums = np.moveaxis(scores.sum(axis=-1), 1, 2)
        assert sums.mean() > 0.7
        assert_close(problem.solve(member), np.repeat(sums[..., None], 4, axis=-1), 1e-6)


@every_member
def test_causal_position_zero(member):
    """The first query of a causal call can only give the first value, or none."""
    problem = fixed_problem(is_causal=True)
    expected, _ = problem.oracle(member)
    output = problem.solve(member)[:, 0]
    assert_close(output, expected[:, 0], 1e-6)
    is_first = np.isclose(output, problem.value[:, 0], atol=1e-6)
    assert (is_first | (output == 0)).all()
    assert member.primal.feature_map == feature_maps.Relu() or is_first.all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "transform", ["conv1d", transforms.Conv1D(5), transforms.Conv2D(3, (2, 3), 1)]
)
def test_a_fresh_convolution_is_none(transform, is_causal):
    """Law 6: until it has learned something, a convolution is the identity."""
    problem = fixed_problem(is_causal=is_causal)
    plain = ops.attention(*problem.arrays, "softmax", is_causal=is_causal)
    convolved = ops.attention(*problem.arrays, Primal(transform=transform), is_causal=is_causal)
    assert_close(backends.to_numpy(convolved), backends.to_numpy(plain), 1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_convolution_looks_as_far_as_its_kernel(is_causal):
    """P5: a key moves the scores of its neighbours, and causally of later ones only."""
    problem = fixed_problem(is_causal=is_causal)
    kernel = np.ones((3, 4, 4), "float32")

    def scores(key):
        _, scores = ops.attention(
            problem.query,
            key,
            problem.value,
            Primal("elu", "conv1d"),
            weights=[{"kernel": kernel}, {}],
            is_causal=is_causal,
            return_scores=True,
        )
        return backends.to_numpy(scores)

    moved = problem.key.copy()
    moved[:, 3] += 1.0
    before, after = scores(problem.key), scores(moved)
    # Of the last query, whose normaliser cancels in the ratio of two keys.
    ratio = (after / after[..., :1])[:, :, -1] / (before / before[..., :1])[:, :, -1]
    changed = np.abs(ratio - 1).max(axis=(0, 1)) > 1e-5
    assert list(np.flatnonzero(changed)) == ([3, 4] if is_causal else [2, 3, 4])


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
    for is_causal in (False, True):
        same = problem.replace(key=np.ones_like(problem.key), is_causal=is_causal)
        expected, _ = same.oracle(member)
        assert_close(same.solve(member), expected, same.tolerance(member))


@every_member_compiled
@few_where_compiled(
    "shape",
    [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 1, 1), (1, 1, 9), (1, 9, 1)],
    few=[(0, 3, 3), (2, 0, 3), (2, 3, 0), (1, 1, 9)],
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


@every_member
def test_what_is_no_number_is_not_hidden(member):
    """NaN in a query or in all keys of a sequence comes out there, and in no other sequence."""
    problem = fixed_problem()
    plain = problem.solve(member)
    for name in ("query", "key"):
        broken = getattr(problem, name).copy()
        broken[0] = np.nan
        broken = problem.replace(**{name: broken})
        output, scores = broken.solve(member, return_scores=True)
        assert np.isnan(output[0]).all() and np.isnan(scores[0]).any(axis=-1).all()
        assert_close(output[1], plain[1], 1e-5)
        output = broken.solve(member)
        assert_close(output[1], plain[1], 1e-5)
        # The fused kernel of torch gives zeros here, as it does in Keras's layer.
        assert np.isnan(output[0]).all() or member.primal.feature_map == feature_maps.Softmax()
