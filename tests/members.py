"""The members that every law is tested for: ours, and what the oracle is told of each.

A new feature map, transform or training set joins every law by one line here.
"""

import dataclasses
import itertools

import reference

from keras_pdattn import Primal, transforms
from keras_pdattn.training_sets import AllKeys, ScaledHeads

FEATURE_MAPS = {
    "softmax": ("softmax", {"log_kernel": reference.softmax_kernel}),
}
TRANSFORMS = {
    "": (None, {}),
    "batch_norm": ("batch_norm", {"transforms": (reference.BatchNorm(),)}),
}
TRAINING_SETS = {
    "": (AllKeys(), {}),
    "scaled": (ScaledHeads((1, 2, 3)), {"scales": (1, 2, 3)}),
    "first": (ScaledHeads((3, 1), "first"), {"scales": (3, 1), "reduction": "first"}),
}


@dataclasses.dataclass(frozen=True)
class Member:
    name: str
    primal: Primal
    oracle: reference.Primal

    def __str__(self):
        return self.name


def _member(names):
    choices = [kind[name] for kind, name in zip((FEATURE_MAPS, TRANSFORMS, TRAINING_SETS), names)]
    ours = Primal(*(choice for choice, _ in choices))
    told = {key: value for _, telling in choices for key, value in telling.items()}
    return Member("-".join(filter(None, names)), ours, reference.Primal(**told))


MEMBERS = [_member(names) for names in itertools.product(FEATURE_MAPS, TRANSFORMS, TRAINING_SETS)]


def _batch_norm(**options):
    primal = Primal(transform=transforms.BatchNorm(**options))
    oracle = reference.Primal(transforms=(reference.BatchNorm(**options),))
    return Member(f"batch_norm-{options}", primal, oracle)


#: Members with other options than their defaults, for the first law.
VARIANTS = [
    _batch_norm(scale=False),
    _batch_norm(center=False, epsilon=1e-2),
    _batch_norm(beta=0.5),
]
