"""Laws 1, 3, 4, 5, 6 and 11 of every combination of feature map, transform and training set.

Over a sequence and over a grid, each on one problem with all kinds of masks;
`test_laws.py` searches through problems, for fewer members. Every combination on torch; on
TensorFlow and JAX, where every test waits for compilers, some for each law, of those in which
any two choices meet. The rest are slow (`make test-family`).
"""

import dataclasses
import functools

import backends
import numpy as np
import pytest
from members import EVERY_MEMBER, PAIRS
from problems import Problem, assert_close, check_against_oracle

from keras_pdattn import Primal, ops, transforms
from keras_pdattn.training_sets import AllKeys, ScaledHeads, SlidingWindow


def family(on_jax, on_tensorflow=PAIRS[::4]):
    """Runs a test for every member; those named are not slow on these backends."""
    few = {"torch": EVERY_MEMBER, "tensorflow": on_tensorflow, "jax": on_jax}
    by_default = few[backends.BACKEND]
    params = []
    for member in EVERY_MEMBER:
        marks = [] if member in by_default else [pytest.mark.slow]
        params.append(pytest.param(member, marks=marks, id=str(member)))
    return pytest.mark.parametrize("member", params)


causal_or_not = pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])

GRID = (3, 3)


#: One for each scale of the members with three.
HEADS = 3


@functools.cache
def problem_of(member, masked=True, dtype="float32", **options):
    """Queries, keys and values for attention over 7 positions or a grid of 3 x 3."""
    rng = np.random.default_rng(3)
    length = 7
    if member.num_axes == 2:
        length = GRID[0] * GRID[1]
        options = {"query_grid": GRID, "key_grid": GRID, **options}
    if masked:
        options["key_mask"] = rng.random((2, length)) < 0.7
        options["query_mask"] = rng.random((2, length)) < 0.8
        options["mask"] = rng.random((2, HEADS, length, length)) < 0.9
    query, key = rng.normal(size=(2, 2, length, HEADS, 4)).astype("float32")
    value = rng.normal(size=(2, length, HEADS, 3)).astype("float32")
    return Problem(query, key, value, options).cast(dtype)


@family(on_jax=PAIRS[1::6], on_tensorflow=PAIRS[::2])
@causal_or_not
def test_oracle(member, is_causal):
    """Laws 1 and 5: outputs and scores are those of the literal definition."""
    check_against_oracle(member, problem_of(member, masked=False, is_causal=is_causal))
    check_against_oracle(member, problem_of(member, is_causal=is_causal))


@family(on_jax=PAIRS[::6], on_tensorflow=PAIRS[1::2])
@causal_or_not
def test_gradients_and_float64(member, is_causal):
    """Law 1: outputs to 1e-12, and the slope of a loss along a random direction."""
    problem = problem_of(member, dtype="float64", is_causal=is_causal)
    rng = np.random.default_rng(0)
    expected, _ = problem.oracle(member)
    cotangent = rng.normal(size=expected.shape)
    with backends.float64():
        output, gradients = problem.output_and_gradients(member, cotangent)
    assert_close(output, expected, problem.tolerance(member))
    directions = [rng.normal(size=x.shape) for x in problem.arrays]
    slopes = []
    for step in (1e-5, 1e-6):
        ends = []
        for sign in (1, -1):
            moved = [x + sign * step * d for x, d in zip(problem.arrays, directions)]
            there = Problem(*moved, problem.options)
            ends.append((there.oracle(member)[0] * cotangent).sum())
        slopes.append((ends[0] - ends[1]) / (2 * step))
    # Where the oracle's two estimates differ, so may ours.
    tolerance = 1e-6 * max(1.0, abs(slopes[1])) + 10 * abs(slopes[0] - slopes[1])
    assert_close(sum((g * d).sum() for g, d in zip(gradients, directions)), slopes[1], tolerance)


@family(on_jax=PAIRS[::9])
def test_prefix(member):
    """Law 3: a causal output is that of a call on the prefix, and the future has no gradient."""
    problem = problem_of(member, is_causal=True)
    full, tolerance = problem.solve(member), problem.tolerance(member)
    end = 4 if member.num_axes == 1 else 2 * GRID[1]
    options = dict(problem.options)
    for name in ("key_mask", "query_mask"):
        options[name] = options[name][:, :end]
    options["mask"] = options["mask"][:, :, :end, :end]
    if member.num_axes == 2:
        options.update(query_grid=(2, GRID[1]), key_grid=(2, GRID[1]))
    prefix = Problem(*(x[:, :end] for x in problem.arrays), options)
    assert_close(prefix.solve(member)[:, -1], full[:, end - 1], tolerance)
    if all(transform.is_pointwise for transform in member.primal.transform):
        whole = prefix.replace(is_causal=False)
        assert_close(whole.solve(member)[:, -1], full[:, end - 1], tolerance)
    cotangent = np.zeros(full.shape, "float32")
    cotangent[:, :end] = 1.0
    for gradient in problem.gradients(member, cotangent):
        assert np.isfinite(gradient).all()
        assert (gradient[:, end:] == 0).all()


def pad(x, num_axes, axis, front, back, fill):
    """Adds `fill` around the positions of `x`, which begin at `axis`."""
    grid = GRID if num_axes == 2 else x.shape[axis : axis + 1]
    x = x.reshape(x.shape[:axis] + tuple(grid) + x.shape[axis + 1 :])
    around = range(axis, axis + num_axes)
    width = [(front, back) if at in around else (0, 0) for at in range(x.ndim)]
    x = np.pad(x, width, constant_values=fill)
    return x.reshape(x.shape[:axis] + (-1,) + x.shape[axis + num_axes :])


@family(on_jax=PAIRS[1::9])
@causal_or_not
def test_padding(member, is_causal):
    """Law 4: padding on every side, whatever it holds, changes no output and no gradient."""
    problem = problem_of(member, dtype="float64", is_causal=is_causal)
    front, back = 1, 2

    def padded(x, fill, axis=1):
        return pad(x, member.num_axes, axis, front, back, fill)

    options = dict(problem.options)
    for name in ("key_mask", "query_mask"):
        options[name] = padded(options[name], False)
    options["mask"] = padded(padded(options["mask"], True, axis=2), True, axis=3)
    if member.num_axes == 2:
        grid = tuple(size + front + back for size in GRID)
        options.update(query_grid=grid, key_grid=grid)
    fills = (1e200, 1e200, np.nan)
    wider = Problem(*(padded(x, fill) for x, fill in zip(problem.arrays, fills)), options)
    inside = padded(np.ones(problem.query.shape[:2], bool), False)
    rng = np.random.default_rng(0)
    cotangent = rng.normal(size=problem.value.shape)
    with backends.float64():
        output, gradients = problem.output_and_gradients(member, cotangent)
        wider_output, wider_gradients = wider.output_and_gradients(member, padded(cotangent, 1.0))
    assert_close(wider_output[inside], output.reshape(-1, HEADS, 3), problem.tolerance(member))
    assert (wider_output[~inside] == 0).all()
    for gradient, wider_gradient in zip(gradients, wider_gradients):
        size = max(1.0, np.abs(gradient).max())
        gradient = gradient.reshape(-1, *gradient.shape[2:])
        assert_close(wider_gradient[inside], gradient, 1e-6 * size)
        assert (wider_gradient[~inside] == 0).all()


@family(on_jax=PAIRS[2::9])
@causal_or_not
def test_reductions(member, is_causal):
    """Law 6: a window over all, windows of one and a fresh convolution change nothing; V = 1."""
    problem, primal = problem_of(member, is_causal=is_causal), member.primal
    expected, tolerance = problem.solve(member), problem.tolerance(member)
    if primal.training_set == AllKeys():
        for training_set in (SlidingWindow(9), ScaledHeads((1,)), ScaledHeads((1,), "first")):
            other = Primal(primal.feature_map, primal.transform, training_set)
            other = dataclasses.replace(member, primal=other)
            assert_close(problem.solve(other), expected, tolerance)
    convolution = (transforms.Conv1D if member.num_axes == 1 else transforms.Conv2D)(5)
    convolved = Primal(primal.feature_map, [convolution, *primal.transform], primal.training_set)
    sizes = problem.key.shape[2:]
    weights = [convolution.initial_weights(*sizes), *member.weights(*sizes)]

    @backends.jitted
    def attention(*arrays):
        return ops.attention(*arrays, convolved, weights=weights, **problem.options)

    assert_close(backends.to_numpy(attention(*problem.arrays)), expected, tolerance)
    _, scores = problem.oracle(member)
    sums = np.moveaxis(scores.sum(axis=-1), 1, 2)[..., None]
    assert set(sums.round(6).ravel()) <= {0.0, 1.0} and sums.mean() > 0.1
    ones = problem.replace(value=np.ones_like(problem.value))
    assert_close(ones.solve(member), np.broadcast_to(sums, expected.shape), 1e-5)


def check_broadcasting(member, problem):
    """A mask with sizes of 1 does what its broadcast does, whichever they are."""
    length = problem.query.shape[1]
    rng = np.random.default_rng(0)
    for shape in ((1, 1, length, 1), (2, HEADS, 1, length), (2, 1, 1, 1)):
        mask = rng.random(shape) < 0.6
        full = np.broadcast_to(mask, (2, HEADS, length, length))
        output = problem.replace(mask=mask).solve(member)
        assert_close(output, problem.replace(mask=full).solve(member), 1e-5)


@family(on_jax=PAIRS[3::9])
@causal_or_not
def test_masks(member, is_causal):
    """Law 11: true hides nothing, false hides, and who sees nothing gets zero."""
    problem = problem_of(member, masked=False, is_causal=is_causal)
    length = problem.query.shape[1]
    plain = problem.solve(member)
    shapes = {"mask": (2, 1, length, length), "key_mask": (2, length), "query_mask": (2, length)}
    transparent = {name: np.ones(shape, "int32") for name, shape in shapes.items()}
    assert_close(problem.replace(**transparent).solve(member), plain, 1e-5)
    hiding = {name: np.ones(shape, bool) for name, shape in shapes.items()}
    hiding["mask"][:, :, -1, -3:] = False
    hiding["key_mask"][1, -2:] = False
    hiding["query_mask"][1, 3] = False
    for name, mask in hiding.items():
        assert np.abs(problem.replace(**{name: mask}).solve(member) - plain).max() > 1e-4, name
    check_broadcasting(member, problem)
    blind = transparent["mask"].astype(bool)
    blind[:, :, 1] = False
    no_keys = np.array([[True] * length, [False] * length])
    problem = problem.replace(mask=blind, key_mask=no_keys)
    output, scores = problem.solve(member, return_scores=True)
    for result in (problem.solve(member), output):
        assert (result[:, 1] == 0).all() and (result[1] == 0).all()
    assert (scores[:, :, 1] == 0).all() and (scores[1] == 0).all()
    for gradient in problem.gradients(member, np.ones_like(output, "float32")):
        assert np.isfinite(gradient).all()
        assert (gradient[1] == 0).all()
