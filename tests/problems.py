"""Random attention problems: shapes, masks and values for hypothesis to search through."""

import dataclasses
import functools

import backends
import numpy as np
import reference
from hypothesis import settings
from hypothesis import strategies as st

from keras_pdattn import ops


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Arrays for `ops.attention` and for the oracle, which take the same arguments."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    options: dict

    @property
    def arrays(self):
        return self.query, self.key, self.value

    def replace(self, **changes):
        """Another problem: `query`, `key` and `value` are arrays, the rest options."""
        arrays = {name: changes.pop(name) for name in ("query", "key", "value") if name in changes}
        return dataclasses.replace(self, **arrays, options={**self.options, **changes})

    def cast(self, dtype):
        query, key, value = (x.astype(dtype) for x in self.arrays)
        return self.replace(query=query, key=key, value=value)

    def solve(self, member, **options):
        """Our output (and scores, if asked for) as float64 arrays."""
        masks, others = self.replace(**options).split_options()
        result = _attention(member, others)(*self.arrays, masks)
        if isinstance(result, tuple):
            return tuple(backends.to_numpy(x) for x in result)
        return backends.to_numpy(result)

    def oracle(self, member):
        """The oracle's output and scores."""
        return _solution(self, member)

    def gradients(self, member, cotangent):
        """Our gradients of `sum(output * cotangent)` with respect to query, key and value."""
        return self.output_and_gradients(member, cotangent)[1]

    def output_and_gradients(self, member, cotangent):
        """Our output and `gradients`, of one pass."""
        masks, others = self.split_options()
        attention = _attention(member, others)
        return backends.output_and_gradients(attention, self.arrays, cotangent, masks)

    def split_options(self):
        """The masks, a dict, and the other options, as items that can be hashed."""
        masks = {name: x for name, x in self.options.items() if isinstance(x, np.ndarray)}
        others = sorted(item for item in self.options.items() if item[0] not in masks)
        return masks, tuple(others)

    def tolerance(self, member):
        """What the numbers chapter allows: 1e-5 in float32, 1e-12 in float64, of the output.

        To that comes what the oracle itself moves by when its inputs are rounded
        once: a prefix with hardly any spread has scores no precision can hold.
        """
        return _tolerance(self, member)


# Of each problem once: several tests have the same, and the oracle takes longer than we do.
@functools.lru_cache(maxsize=2048)
def _solution(problem, member):
    return reference.attention(*problem.arrays, member.oracle, **problem.options)


@functools.lru_cache(maxsize=2048)
def _tolerance(problem, member):
    output, scores = problem.oracle(member)
    rng = np.random.default_rng(0)
    step = np.finfo("float32").eps
    moved = [x * (1 + step * rng.choice([-1, 1], x.shape)) for x in problem.arrays[:2]]
    moved_output, moved_scores = problem.replace(query=moved[0], key=moved[1]).oracle(member)
    moves = max(_largest(moved_output - output), _largest(moved_scores - scores))
    dtype = problem.query.dtype
    relative = {"float32": 1e-5, "float64": 1e-12}[dtype.name]
    rounding = moves * np.finfo(dtype).eps / step
    return relative * max(1.0, _largest(output)) + 4 * rounding


@functools.lru_cache(maxsize=64)
def _attention(member, options):
    """Our attention as a function of query, key, value and a dict of masks."""

    def function(query, key, value, masks):
        weights = member.weights(*key.shape[2:])
        return ops.attention(
            query, key, value, member.primal, weights=weights, **masks, **dict(options)
        )

    return backends.jitted(function)


def assert_close(actual, expected, tolerance):
    """Raises unless the largest difference is within `tolerance`."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def check_against_oracle(member, problem):
    """Holds outputs, with scores and without, and scores to the literal definition."""
    expected, expected_scores = problem.oracle(member)
    tolerance = problem.tolerance(member)
    assert_close(problem.solve(member), expected, tolerance)
    output, scores = problem.solve(member, return_scores=True)
    assert_close(output, expected, tolerance)
    assert_close(scores, expected_scores, tolerance)
    assert_close(scores.sum(axis=-1), expected_scores.sum(axis=-1).round(), 1e-5)
    assert_close(np.einsum("bhts,bshd->bthd", scores, problem.value), output, 2e-5)


def _largest(x):
    return np.abs(x).max(initial=0)


#: `(batch, queries, keys, heads, depth, value depth)`. Few, as JAX compiles every
#: op for every shape; the thorough profile draws any.
SHAPES = [(2, 7, 7, 4, 4, 4), (2, 5, 9, 4, 4, 3), (2, 9, 4, 4, 4, 4)]


def shapes(self_attention):
    if settings.get_current_profile_name() == "default":
        return st.sampled_from(SHAPES[:1] if self_attention else SHAPES)
    length = st.integers(1, 17)
    depth = st.integers(2, 9)
    return st.tuples(st.integers(1, 3), length, length, st.integers(3, 5), depth, depth)


@st.composite
def problems(draw, self_attention=False, causal=(False, True), masked=True):
    """Problems of many shapes with all kinds of masks; `T = S` if `self_attention`."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    batch, query_length, key_length, heads, depth, value_depth = draw(shapes(self_attention))
    query_length = key_length if self_attention else query_length
    mean = draw(st.sampled_from([0.0, 3.0]))

    def normal(length, depth):
        return rng.normal(mean, 1.0, (batch, length, heads, depth)).astype("float32")

    options = {"is_causal": draw(st.sampled_from(causal))}
    if masked and draw(st.booleans()):
        options["key_mask"] = rng.random((batch, key_length)) < 0.7
    if masked and draw(st.booleans()):
        options["query_mask"] = rng.random((batch, query_length)) < 0.7
    if masked and draw(st.booleans()):
        sizes = (batch, heads, query_length, key_length)
        broadcast = draw(st.sampled_from([(), (0, 1), (1, 2), (0, 1, 3), (0, 1, 2, 3)]))
        shape = [1 if axis in broadcast else size for axis, size in enumerate(sizes)]
        options["mask"] = rng.random(shape) < 0.8
    if masked and draw(st.booleans()):
        options["sliding_window"] = draw(st.sampled_from([1, 3, 6]))
    return Problem(
        normal(query_length, depth),
        normal(key_length, depth),
        normal(key_length, value_depth),
        options,
    )
