"""Training sets: the choice of S, what each head and each query is fitted on."""

import dataclasses

import keras
from keras import ops

from keras_pdattn import descriptions, validation
from keras_pdattn.ops import native, pooling
from keras_pdattn.ops.records import replace
from keras_pdattn.ops.running_means import running_examples
from keras_pdattn.ops.windows import Window


class TrainingSet(descriptions.Member):
    """The examples that heads are fitted on; all keys unless a subclass selects.

    A subclass gives `select`; if heads differ, also `groups`. Masks, causal use,
    scores and saving follow from these.

    Masking: `keys.mask` is False for padding, and says what a subclass leaves out.
    Causal use: query `i` is fitted on what `select` makes of keys `0` to `i`. That
    is done anew for each query, queries times keys products of the depth, unless
    `has_causal_form` says that `select` looks at no later key.

    Example:

    ```python
    import dataclasses

    import keras
    from keras import ops
    from keras_pdattn import Primal
    from keras_pdattn.training_sets import TrainingSet

    @keras.saving.register_keras_serializable(package="my_package")
    class EvenKeys(TrainingSet):
        def select(self, keys, queries):
            even = ops.expand_dims(ops.arange(ops.shape(keys.key)[1]) % 2 == 0, axis=0)
            mask = even if keys.mask is None else ops.logical_and(keys.mask, even)
            mask = ops.broadcast_to(mask, ops.shape(keys.key)[:2])
            return dataclasses.replace(keys, mask=mask)

    Primal(training_set=EvenKeys())
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """

    #: Whether `select` makes fewer examples of the keys by taking means of them, which are
    #: projected for less than the keys are.
    takes_means = False

    @property
    def takes_inputs(self):
        """Whether `select` may get keys and values before they are projected."""
        return self.takes_means or type(self).select is TrainingSet.select

    def groups(self, num_heads):
        """Divides the heads into groups that share a training set.

        Args:
            num_heads: number of heads.

        Returns:
            List of `(heads, training_set)`, each a slice of the heads in order
            and a `TrainingSet` for them.

        Raises:
            ValueError: if there are too few heads.
        """
        return [(slice(0, num_heads), self)]

    def select(self, keys, queries):
        """Makes the training set from the keys of a group.

        Args:
            keys: `ops.examples.Examples` that are the keys themselves.
            queries: the `ops.examples.Queries`.

        Returns:
            The `ops.examples.Examples` to fit on.
        """
        return keys

    def within(self, size):
        """This training set less the keys `size` or more positions away from a query.

        Args:
            size: positive integer, along each axis.

        Returns:
            A `TrainingSet`, or `None` to have a mask of queries times keys say so.
        """
        return None

    def has_causal_form(self, num_axes):
        """Whether `select` serves all queries of a causal call at once.

        Args:
            num_axes: the number of axes that are attended over.
        """
        return type(self).select is TrainingSet.select


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
@dataclasses.dataclass(frozen=True)
class AllKeys(TrainingSet):
    """Every head is fitted on all keys, the training set of softmax and linear attention.

    Masking: padding and attention masks leave keys out. Causal use: the keys up
    to the query's position.

    Cost: queries times keys products per head.

    Example:

    ```python
    from keras_pdattn import Primal, training_sets

    Primal(training_set=training_sets.AllKeys()) == Primal("softmax")  # True
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """

    def within(self, size):
        return SlidingWindow(size)


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
@dataclasses.dataclass(frozen=True)
class ScaledHeads(TrainingSet):
    r"""Every head is fitted on its own down-sampled keys, the training set of Attention-SH.

    A head of scale \(s\) is fitted on \(N_s = \lceil N / s \rceil\) examples, the
    keys and values averaged in windows \(\mathcal{W}_m\) of \(s\):

    \[ \bar k_m = \frac{1}{|\mathcal{W}_m|}\sum_{j\in\mathcal{W}_m} k_j, \qquad
       \bar v_m = \frac{1}{|\mathcal{W}_m|}\sum_{j\in\mathcal{W}_m} v_j \]

    The heads fall into contiguous groups, as even as possible and in order, one
    per scale. Scores are those of the keys: a window's weight is shared evenly
    among its members.

    Masking: padded keys are in no mean, and a window of nothing else is masked.
    Windows are laid from the first valid key, so padding in front or behind
    changes nothing. An attention mask leaves a window visible to a query that
    sees all its valid members. Causal use: the windows that are complete at the
    query's position, and the mean of the current one up to there.

    Cost: \(1/s\) of the products of all keys; 0.469 of them for scales
    1, 2, 4 and 8 in equal shares. PyTorch, run eagerly, works all heads of a short
    causal or padded sequence at once, for the products of all keys.

    Args:
        scales: sequence of positive integers, one for each group of heads.
        reduction: `"mean"`, or `"first"` to take the first valid member of each
            window (plain subsampling).

    Raises:
        ValueError: if a scale is not a positive integer, if there are none, if
            there are more than heads, or if `reduction` is neither.

    Example:

    ```python
    from keras_pdattn import Primal, training_sets

    Primal(training_set=training_sets.ScaledHeads(scales=(1, 2)))
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), Attention-SH.
    """

    scales: tuple = (1, 2, 4, 8)
    reduction: str = "mean"

    def __post_init__(self):
        if not isinstance(self.scales, (tuple, list)) or not self.scales:
            raise ValueError(
                "`scales` must be a non-empty sequence of positive integers. "
                f"Received: scales={self.scales!r}"
            )
        scales = tuple(validation.positive_int("scales", scale) for scale in self.scales)
        object.__setattr__(self, "scales", scales)
        if self.reduction not in ("mean", "first"):
            raise ValueError(
                f"`reduction` must be 'mean' or 'first'. Received: reduction={self.reduction!r}"
            )

    def groups(self, num_heads):
        if len(self.scales) > num_heads:
            raise ValueError(
                "There must be at least one head for each scale. "
                f"Received: num_heads={num_heads}, scales={self.scales}"
            )
        size, larger = divmod(num_heads, len(self.scales))
        groups, start = [], 0
        for index, scale in enumerate(self.scales):
            stop = start + size + (index < larger)
            training_set = AllKeys() if scale == 1 else _PooledKeys(scale, self.reduction)
            groups.append((slice(start, stop), training_set))
            start = stop
        return groups


@dataclasses.dataclass(frozen=True)
class _PooledKeys(TrainingSet):
    """The training set of one group of `ScaledHeads`."""

    scale: int
    reduction: str

    takes_means = True

    def select(self, keys, queries):
        query_length = native.shape(queries.x)[1]
        return pooling.pooled_examples(keys, query_length, self.scale, self.reduction)

    def has_causal_form(self, num_axes):
        # On a grid a query stands behind a part of every window of its row.
        return num_axes == 1


@dataclasses.dataclass(frozen=True)
class RunningMeans(TrainingSet):
    """The training set of all heads of `ScaledHeads` at once, see `ops.running_means`.

    Args:
        scales: that of each head.
    """

    scales: tuple

    @classmethod
    def of_groups(cls, groups):
        """In place of those of `groups`, or `None` if theirs are not all keys or means of them."""
        scales = []
        for heads, one in groups:
            is_pooled = type(one) is _PooledKeys and one.reduction == "mean"
            if not is_pooled and type(one) is not AllKeys:
                return None
            scales += [one.scale if is_pooled else 1] * (heads.stop - heads.start)
        return cls(tuple(scales)) if max(scales) > 1 else None

    def select(self, keys, queries):
        return running_examples(keys, self.scales)

    def has_causal_form(self, num_axes):
        return num_axes == 1


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
@dataclasses.dataclass(frozen=True)
class SlidingWindow(TrainingSet):
    r"""Every query sees the keys near it, the training set of sparse attention.

    \[ M_i = \{ j : |i - j| < \text{size} \cdot \text{dilation},\;
       \text{dilation} \mid i - j \} \cup \{\text{global tokens}\} \]

    With several attended axes the window is a box: the condition holds along each.
    The first `global_tokens` keys that are not padding are seen by all queries, and
    a query that stands where one of them does sees all keys. The window restricts
    the kernel's sum; the statistics of a transform stay those of the whole
    sequence.

    Masking: padding is left out; padding in front changes nothing. Causal use: the
    keys of the window, and the global tokens, up to the query's position.

    Cost: `size` times queries products per head (twice that if not causal), in
    bands: time and memory grow with the length, not its square. Attention masks
    and scores have an entry for each query and key, and with them, so has this.

    Args:
        size: positive integer, steps to either side, its own position counted.
        dilation: positive integer, the stride of these steps.
        global_tokens: the number of global tokens, 0 for none.

    Raises:
        ValueError: if `size` or `dilation` is not a positive integer, or
            `global_tokens` is negative.

    Example:

    ```python
    from keras_pdattn import Primal, training_sets

    Primal(training_set=training_sets.SlidingWindow(size=64, global_tokens=1))
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), sparse attention.
    """

    size: int = 64
    dilation: int = 1
    global_tokens: int = 0

    def __post_init__(self):
        validation.positive_int("size", self.size)
        validation.positive_int("dilation", self.dilation)
        validation.natural("global_tokens", self.global_tokens)

    def select(self, keys, queries):
        length = ops.shape(keys.key)[1]
        valid = ops.ones((1, length), dtype="bool") if keys.mask is None else keys.mask
        window = Window(
            self.size,
            self.dilation,
            self.global_tokens,
            queries.position,
            queries.grid,
            keys.grid,
            length,
            valid,
        )
        return replace(keys, window=window)

    def within(self, size):
        steps = -(-size // self.dilation)
        near = dataclasses.replace(self, size=min(self.size, steps))
        return _WindowWithin(near, size) if self.global_tokens else near

    def has_causal_form(self, num_axes):
        return True


@dataclasses.dataclass(frozen=True)
class _WindowWithin(TrainingSet):
    """A sliding window of which even global tokens see, and are seen, less than `reach` away."""

    window: SlidingWindow
    reach: int

    def select(self, keys, queries):
        examples = self.window.select(keys, queries)
        window = replace(examples.window, reach=self.reach)
        return replace(examples, window=window)

    def has_causal_form(self, num_axes):
        return True


_registry = descriptions.Registry(
    "training set",
    TrainingSet,
    {
        "all_keys": AllKeys(),
        "scaled_heads": ScaledHeads(),
        "sliding_window": SlidingWindow(),
    },
)


def get(identifier):
    """Returns the training set that a name, config dict, class or instance stands for.

    Args:
        identifier: `"all_keys"`, `"scaled_heads"`, `"sliding_window"`, the registered
            name of a class, a config dict, a `TrainingSet` or a subclass of it.

    Raises:
        ValueError: if it stands for none; lists the names.
    """
    return _registry.get(identifier)


def serialize(training_set):
    """Returns the config dict of a training set; see `get`."""
    return descriptions.serialize(training_set)
