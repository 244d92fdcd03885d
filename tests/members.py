"""The members that every law is tested for: ours, and what the oracle is told of each.

A new feature map, transform or training set joins every law by one line here.
"""

import dataclasses
import functools
import itertools

import backends
import numpy as np
import pytest
import reference

from keras_pdattn import Primal, feature_maps, transforms
from keras_pdattn.training_sets import AllKeys, ScaledHeads, SlidingWindow

RANDOM = feature_maps.PositiveRandom(num_features=6, seed=1)


@functools.cache
def omega(num_heads, depth):
    """What `RANDOM` draws; for any number of heads the first are the same."""
    return RANDOM.draw(8, depth, RANDOM.seed)[:, :num_heads].astype("float64")


@functools.cache
def conv_kernel(rank, num_heads, depth):
    """A kernel of size 3 near the identity; for any number of heads the first are the same."""
    rng = np.random.default_rng(rank)
    kernel = 0.3 * rng.normal(size=(num_heads,) + (3,) * rank + (depth,))
    kernel[(slice(None),) + (1,) * rank] += 1.0
    return np.moveaxis(kernel, 0, -2)


conv1d_kernel = functools.partial(conv_kernel, 1)
conv2d_kernel = functools.partial(conv_kernel, 2)
BATCH_NORM = (transforms.BatchNorm(), reference.BatchNorm())
CONV1D = (transforms.Conv1D(3), reference.Conv(conv1d_kernel))
CONV2D = (transforms.Conv2D(3), reference.Conv(conv2d_kernel))

FEATURE_MAPS = {
    "softmax": ("softmax", reference.softmax_kernel),
    "elu": ("elu", reference.elu_kernel),
    "relu": ("relu", reference.relu_kernel),
    "taylor": ("taylor", reference.taylor_kernel),
    "random": (RANDOM, reference.positive_random_kernel(omega)),
}
#: By the number of axes that are attended over.
TRANSFORMS = {
    1: {
        "": [],
        "bn": [BATCH_NORM],
        "conv": [CONV1D],
        "conv_bn": [CONV1D, BATCH_NORM],
        "bn_conv": [BATCH_NORM, CONV1D],
    },
    2: {
        "": [],
        "bn": [BATCH_NORM],
        "conv": [CONV2D],
        "conv_bn": [CONV2D, BATCH_NORM],
    },
}
TRAINING_SETS = {
    "": (AllKeys(), {}),
    "scaled": (ScaledHeads((1, 2, 3)), {"scales": (1, 2, 3)}),
    "first": (ScaledHeads((3, 1), "first"), {"scales": (3, 1), "reduction": "first"}),
    "window": (SlidingWindow(2), {"window": (2, 1, 0)}),
    "dilated": (SlidingWindow(2, 2, 1), {"window": (2, 2, 1)}),
}


@dataclasses.dataclass(frozen=True)
class Member:
    name: str
    primal: Primal
    oracle: reference.Primal
    num_axes: int = 1

    def __str__(self):
        return self.name

    def weights(self, num_heads, depth):
        """Weights for `ops.attention` that are not their initial values."""
        kernels = {transforms.Conv1D: conv1d_kernel, transforms.Conv2D: conv2d_kernel}
        of_transforms = [
            {"kernel": kernels[type(one)](num_heads, depth)} if type(one) in kernels else {}
            for one in self.primal.transform
        ]
        of_map = {"omega": omega(num_heads, depth)} if self.primal.feature_map == RANDOM else {}
        return [*of_transforms, of_map]


def _member(num_axes, feature_map, transform, training_set):
    name = "-".join(filter(None, [feature_map, transform, training_set, "2d" * (num_axes == 2)]))
    (ours, log_kernel), chain = FEATURE_MAPS[feature_map], TRANSFORMS[num_axes][transform]
    ours_set, told = TRAINING_SETS[training_set]
    return Member(
        name,
        Primal(ours, [one for one, _ in chain], ours_set),
        reference.Primal(log_kernel, tuple(other for _, other in chain), **told),
        num_axes,
    )


def product(num_axes):
    """Every combination for attention over `num_axes` axes."""
    names = itertools.product(FEATURE_MAPS, TRANSFORMS[num_axes], TRAINING_SETS)
    return [_member(num_axes, *choice) for choice in names]


#: Over a sequence, and over a grid.
SEQUENCE_MEMBERS, GRID_MEMBERS = product(1), product(2)
EVERY_MEMBER = SEQUENCE_MEMBERS + GRID_MEMBERS


def pairs(members):
    """A fifth of `members`, among which any two choices meet."""
    kinds = itertools.product(range(5), range(len(members) // 25), range(5))
    return [member for member, kind in zip(members, kinds) if sum(kind) % 5 == 0]


PAIRS = pairs(SEQUENCE_MEMBERS) + pairs(GRID_MEMBERS)


def _named(*names):
    return next(m for m in SEQUENCE_MEMBERS if m.name == "-".join(filter(None, names)))


#: One of each kind, and each of the paper's combinations: for laws of layers.
MEMBERS = [
    _named("softmax"),
    _named("softmax", "bn"),
    _named("softmax", "scaled"),
    _named("softmax", "bn", "scaled"),
    _named("softmax", "first"),
    _named("softmax", "bn", "first"),
    _named("softmax", "conv"),
    _named("softmax", "bn", "dilated"),
    _named("elu"),
    _named("relu", "bn", "scaled"),
    _named("taylor", "window"),
    _named("random", "conv_bn", "scaled"),
]

#: Some of those: with every transform, and with caches by position, with queries, of a state and
#: in a ring.
FEW = [
    _named("softmax", "bn", "scaled"),
    _named("softmax", "conv"),
    _named("softmax", "bn", "dilated"),
    _named("elu"),
    _named("random", "conv_bn", "scaled"),
]
if backends.BACKEND == "torch":
    FEW += [_named("softmax"), _named("taylor", "window")]


def slow_where_compiled(test):
    """Marks a test that is slow where ops compile, and shows no more there than on torch."""
    return test if backends.BACKEND == "torch" else pytest.mark.slow(test)


def few_where_compiled(name, values, few):
    """Runs a test for all `values`; those that are not of `few` are slow where ops compile.

    Of a dict the keys name the values, in `few` too.
    """
    named = values if isinstance(values, dict) else {value: value for value in values}
    params = []
    for key, value in named.items():
        is_slow = backends.BACKEND != "torch" and key not in few
        marks = [pytest.mark.slow] if is_slow else []
        params.append(pytest.param(value, marks=marks, id=str(key)))
    return pytest.mark.parametrize(name, params)


#: All but on JAX, where every test waits for a compiler.
BY_DEFAULT = FEW if backends.BACKEND == "jax" else MEMBERS
every_member = few_where_compiled("member", MEMBERS, BY_DEFAULT)
#: All on torch; `FEW` where ops compile.
every_member_compiled = few_where_compiled("member", MEMBERS, FEW)


def _batch_norm(feature_map="softmax", **options):
    ours, log_kernel = FEATURE_MAPS[feature_map]
    oracle = reference.Primal(log_kernel, (reference.BatchNorm(**options),))
    primal = Primal(ours, transforms.BatchNorm(**options))
    return Member(f"{feature_map}-batch_norm-{options}", primal, oracle)


#: Members with other options than their defaults, for the first law.
VARIANTS = [
    _batch_norm(scale=False),
    _batch_norm(center=False, epsilon=1e-2),
    _batch_norm(beta=0.5),
    # A kernel that notices what is left of the mean on keys; of a prefix of one key so little
    # that its features stay within float32 (`Elu` says where they end).
    _batch_norm("elu", beta=0.5, epsilon=1e-2),
]
