"""Primal problems: attention as a choice of feature map, transform and training set."""

import dataclasses

import keras

from keras_pdattn import descriptions, feature_maps, training_sets, transforms
from keras_pdattn.feature_maps import FeatureMap
from keras_pdattn.training_sets import ScaledHeads, TrainingSet
from keras_pdattn.transforms import Transform


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
@dataclasses.dataclass(frozen=True)
class Primal(descriptions.Description):
    r"""The primal problem whose support vector expansion is an attention layer.

    Support vector regression of the values on the keys, with the neural-network
    layer

    \[ f(x) = W\,\Phi(T(x)) / h(T(x)) + b \]

    as its model, has the solution

    \[ f(x) = \sum_{j \in S} v_j\, \Phi(T(x))^\top \Phi(T(k_j)) / h(T(x)) + b, \qquad
       h(x) = \sum_{j \in S} \Phi(x)^\top \Phi(T(k_j)) \]

    which with \(b = 0\) is attention. Choosing \(\Phi\), \(T\) and \(S\) chooses the
    attention mechanism. A `Primal` is an immutable description: it holds no
    weights, and layers that are given the same one share nothing.

    | paper | here |
    |---|---|
    | \(\Phi\), \(\kappa\) | `feature_map` |
    | \(T\) | `transform`, a list being applied in order |
    | \(S\) | `training_set` |

    Args:
        feature_map: a `FeatureMap`, its name or config.
        transform: a `Transform`, its name or config, a list of these, or `None`.
        training_set: a `TrainingSet`, its name or config, or `None` for all keys.

    Raises:
        ValueError: if an argument stands for no such member, or a combination has
            no meaning: `Conv2D` with a `grid` and `ScaledHeads`, whose windows
            leave no grid.

    Example:

    ```python
    from keras_pdattn import Primal, training_sets

    primal = Primal(
        transform="batch_norm",
        training_set=training_sets.ScaledHeads(scales=(1, 2)),
    )
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """

    feature_map: FeatureMap = "softmax"
    transform: tuple[Transform, ...] = None
    training_set: TrainingSet = None

    def __post_init__(self):
        transform = () if self.transform is None else self.transform
        if not isinstance(transform, (list, tuple)):
            transform = (transform,)
        training_set = "all_keys" if self.training_set is None else self.training_set
        object.__setattr__(self, "feature_map", feature_maps.get(self.feature_map))
        object.__setattr__(self, "transform", tuple(transforms.get(one) for one in transform))
        object.__setattr__(self, "training_set", training_sets.get(training_set))
        self._check_meaning()

    def _check_meaning(self):
        flattened = [one for one in self.transform if getattr(one, "grid", None) is not None]
        if flattened and isinstance(self.training_set, ScaledHeads):
            raise ValueError(
                "Windows of a flattened grid hold keys of one row and the next, so what "
                "`ScaledHeads` pools is no grid that Conv2D could run over. Give the layer inputs "
                "with two axes to attend over, and Conv2D no `grid`. "
                f"Received: transform={self.transform}, training_set={self.training_set}"
            )

    @property
    def weighted_members(self):
        """The members that may have weights, in the order they act in."""
        return (*self.transform, self.feature_map)

    def may_sum_inputs(self, training_set):
        """Whether heads fitted on `training_set` may sum inputs, to project the sums to values."""
        keep_values = all(transform.keeps_values for transform in self.transform)
        return self.feature_map.has_states and training_set.takes_inputs and keep_values

    def training_set_of_all(self, groups):
        """One training set for all heads, where `ops.running_means` gives what `groups` do.

        Returns:
            A `TrainingSet`, or `None`. Members of a user are given what they know.
        """
        are_known = len(self.transform) < 2 and type(self.feature_map) is feature_maps.Softmax
        if not are_known or any(type(one) is not transforms.BatchNorm for one in self.transform):
            return None
        return training_sets.RunningMeans.of_groups(groups)

    def check_call(self, num_axes, is_causal=False):
        """Raises a `ValueError` if attention over `num_axes` axes, or causal, has no meaning."""
        for transform in self.transform:
            transform.check_axes(num_axes)
        for member in (*self.weighted_members, self.training_set):
            if is_causal and not member.supports_causal:
                raise ValueError(
                    f"{type(member).__name__} can't be used with a causal mask, as its "
                    f"`supports_causal` says. Received: {member!r} in a causal call"
                )

    def get_config(self):
        return {
            "feature_map": feature_maps.serialize(self.feature_map),
            "transform": [transforms.serialize(one) for one in self.transform],
            "training_set": training_sets.serialize(self.training_set),
        }


_registry = descriptions.Registry(
    "primal problem",
    Primal,
    {
        "softmax": Primal(),
        "linear": Primal("elu"),
        "sliding_window": Primal(training_set="sliding_window"),
        "batch_norm": Primal(transform="batch_norm"),
        "scaled_head": Primal(training_set="scaled_heads"),
        "batch_norm_scaled_head": Primal(transform="batch_norm", training_set="scaled_heads"),
        "conv1d": Primal(transform="conv1d"),
        "conv2d": Primal(transform="conv2d"),
    },
)


def get(identifier):
    """Returns the `Primal` that a name, config dict or instance stands for.

    Args:
        identifier: `"softmax"`, `"linear"`, `"sliding_window"`, `"batch_norm"`,
            `"scaled_head"`, `"batch_norm_scaled_head"`, `"conv1d"`, `"conv2d"`, a
            config dict of a `Primal` (with or without its class name), or a
            `Primal`.

    Raises:
        ValueError: if it stands for none; lists the names.

    Example:

    ```python
    from keras_pdattn import primals

    primals.get("batch_norm").transform  # (BatchNorm(epsilon=1e-05, ...),)
    ```
    """
    if isinstance(identifier, dict) and "class_name" not in identifier:
        return Primal.from_config(identifier)
    return _registry.get(identifier)


def name_of(primal):
    """Returns the name under which `get` knows a `Primal`, or `None`."""
    return next((name for name, one in _registry.members.items() if one == primal), None)


def serialize(primal):
    """Returns the config dict of a `Primal`, which `get` and Keras read back."""
    return descriptions.serialize(primal)
