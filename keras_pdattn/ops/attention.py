"""Attention as the support vector expansion of a primal problem (theory: equation 2)."""

import dataclasses
import functools
from typing import Any

from keras import ops

from keras_pdattn import validation
from keras_pdattn.ops import checks, masks, native, running_means
from keras_pdattn.ops.dropout import Dropout
from keras_pdattn.ops.dtypes import cast
from keras_pdattn.ops.examples import Examples, Queries
from keras_pdattn.ops.indexing import append_axes, zero_where_masked
from keras_pdattn.ops.prefixes import prefix_by_prefix
from keras_pdattn.ops.records import replace


def attention(
    query,
    key,
    value,
    primal,
    mask=None,
    key_mask=None,
    is_causal=False,
    query_mask=None,
    sliding_window=None,
    weights=None,
    dropout=0.0,
    seed=None,
    return_scores=False,
    flash_attention=None,
    query_grid=None,
    key_grid=None,
    form=None,
    projections=None,
    query_start=None,
):
    r"""Solves a primal problem for queries, given keys and values.

    For each head, with the training set \(S_i\) of query \(i\), the feature map
    \(\Phi\) and the transform \(T\) that `primal` names:

    \[ o_i = \sum_{j \in S_i} \frac{\kappa(T(q_i), T(k_j))}{h_i} v_j, \qquad
       \kappa(x, y) = \Phi(x)^\top \Phi(y), \qquad
       h_i = \sum_{j \in S_i} \kappa(T(q_i), T(k_j)) \]

    A key that `key_mask` leaves out is in no training set: not in the
    statistics of a transform, not in the mean of a window. A causal query is
    fitted on the keys up to its own position, so that its output is that of
    the last query of a causal call on the prefix, and, but for a convolution,
    whose taps that look ahead a causal call drops for every key, of a
    non-causal call on it. `mask` and `sliding_window` restrict the sum of each
    query, and no statistics. A query that sees nothing gets zero, with zero
    gradient.

    Args:
        query: tensor of shape `(batch, queries, heads, depth)`.
        key: tensor of shape `(batch, keys, heads, depth)`.
        value: tensor of shape `(batch, keys, heads, value_depth)`.
        primal: a `Primal`, its name or its config.
        mask: boolean, or integer 0 and 1, broadcastable to
            `(batch, heads, queries, keys)`; True lets a query see a key.
        key_mask: the same, of shape `(batch, keys)`; False marks padding.
        is_causal: whether query `i` sees keys `0` to `i` only (counted from
            the start of both, also where there are more of one than the other).
        query_mask: as `key_mask`, of shape `(batch, queries)`; a query marked
            False sees nothing.
        sliding_window: positive integer, or `None`; query `i` sees key `j` only
            where `|i - j| < sliding_window`, along each axis. Heads fitted on all
            keys work in bands then, and those in a `SlidingWindow` still do;
            scaled heads, and training sets of yours without `within`, take a mask
            of queries times keys.
        weights: list with a dict of tensors for each transform of `primal` and
            one for its feature map, as their `build` returns them, or `None` for
            their initial values.
        dropout: share of the attention weights (with a finite feature map, of the
            output) that is dropped, in [0, 1).
        seed: where there is dropout, an integer in [0, 2**31) or a
            `keras.random.SeedGenerator`.
        return_scores: whether to return the weights of the keys too.
        flash_attention: as in `keras.ops.dot_product_attention`.
        query_grid: sizes of the axes that queries run over in raster order, or
            `None` for one axis. Windows are boxes on them.
        key_grid: the same for keys, with as many axes.
        form: how pairs of a query and a key are worked where all of them are:
            `"fused"` by the backend's kernel for softmax attention, `"whole"` all at
            once, `"blocks"` a block of queries at a time, in memory that grows with
            the keys and not the pairs; `None` for what is fastest here.
        projections: a pair of `ops.projection.Projection`, if `key` and `value` are
            inputs `(batch, keys, width)` that are yet to be projected by these. Scaled
            heads project the means of inputs then, and linear attention the sums of those
            that are values, of which there are fewer.
        query_start: integer or integer scalar tensor: where among the keys the first query
            stands, if not at key 0. A causal call on all keys gives its last queries, with
            their `query_start`, what it gives them among all queries.

    Returns:
        The output, `(batch, queries, heads, value_depth)`, in the dtype of
        `value`; if `return_scores`, also the scores
        `(batch, heads, queries, keys)`. Each row of them sums to 1 (0 where a
        query sees nothing), and scores times values is the output.

    Raises:
        ValueError: if tensors are not floating point, shapes, grids or weights do
            not fit, a mask is neither boolean nor made of 0 and 1, dropout has no
            seed, `query_start` comes with grids, or `primal` or `form` has no meaning
            for such a call.

    Cost:
        That of the members of `primal`, which their documentation states.

    Example:

    ```python
    import keras
    import keras_pdattn

    x = keras.random.normal((2, 10, 4, 8))
    y = keras_pdattn.ops.attention(x, x, x, "batch_norm", is_causal=True)
    y.shape  # (2, 10, 4, 8)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """
    # Names of primals are resolved one level above the ops.
    from keras_pdattn import primals

    primal = primals.get(primal)
    if sliding_window is not None:
        validation.positive_int("sliding_window", sliding_window)
    checks.check_dropout(dropout, seed)
    checks.check_form(form)
    is_one = value is key
    checks.check_tensors(query=query, key=key, value=value)
    query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
    if projections is not None:
        key, value = (ops.expand_dims(x, axis=2) for x in (key, value))
    checks.check_shapes(query, key, value, projections)
    checks.check_grids(query.shape[1], key.shape[1], query_grid, key_grid)
    query_start = checks.query_start(query_start, query_grid)
    primal.check_call(1 if key_grid is None else len(key_grid), is_causal)
    num_heads, query_length = int(query.shape[2]), native.shape(query)[1]
    groups = primal.training_set.groups(num_heads)
    if 0 in (query.shape[0], query.shape[1], key.shape[1]):
        depth = value.shape[3] if projections is None else projections[1].kernel.shape[2]
        return _nothing_to_see(query, value, depth, return_scores)
    if query_mask is not None:
        query_mask = masks.padding("query_mask", query_mask, query)
    if key_mask is not None:
        key_mask = masks.padding("key_mask", key_mask, key)
        value = zero_where_masked(value, key_mask)
        key = value if is_one else zero_where_masked(key, key_mask)
    if mask is not None:
        mask = masks.of_queries_and_keys("mask", mask, query, key)
    if weights is None:
        shape = (num_heads, query.shape[3])
        weights = [member.initial_weights(*shape) for member in primal.weighted_members]
    checks.check_weights(primal.weighted_members, weights)

    queries = Queries(query, query_mask, query_grid, start=query_start).zero_padding()
    keys = Examples.keys(
        key,
        key if is_one else value,
        query_length,
        is_causal,
        query_start,
        mask=key_mask,
        visible=mask,
        grid=key_grid,
        projections=projections,
        awaits_transform=bool(primal.transform),
    )
    # None of which running means know.
    others = mask, sliding_window, flash_attention, form, query_start, query_grid, key_grid
    if not return_scores and all(one is None for one in others):
        groups = _at_once(primal, groups, query, keys, dropout > 0) or groups
    sizes = head_counts(groups)
    problems = []
    parts = zip(groups, queries.split(sizes), keys.split(sizes))
    for group, ((heads, training_set), its_queries, its_keys) in enumerate(parts):
        if is_causal or not training_set.takes_inputs:
            its_keys = its_keys.projected()
        if sliding_window is not None:
            training_set, its_keys = _within(sliding_window, training_set, its_keys, queries)
        problems.append(
            _Problem(
                primal,
                training_set,
                weights_of_heads(weights, heads),
                its_queries,
                its_keys,
                Dropout(dropout, seed, group) if dropout > 0 else None,
                return_scores,
                flash_attention,
                form,
            )
        )
    outputs, scores = zip(*_solve_all(problems))
    output = native.concatenate(outputs, axis=2)
    if query_mask is not None:
        output = zero_where_masked(output, query_mask)
    if not return_scores:
        return output
    scores = native.concatenate(scores, axis=1)
    if query_mask is not None:
        scores = native.zero_unless(append_axes(ops.expand_dims(query_mask, axis=1), 1), scores)
    return output, cast(scores, value.dtype)


def _at_once(primal, groups, query, keys, has_dropout):
    """All heads as one group, where that is faster and as good; or `None`."""
    training_set = primal.training_set_of_all(groups)
    if training_set is None:
        return None
    if not running_means.are_faster(query, keys, training_set.scales, has_dropout):
        return None
    if not running_means.are_as_good(query, keys):
        return None
    return [(slice(0, len(training_set.scales)), training_set)]


def _within(sliding_window, training_set, keys, queries):
    """The training set and the keys of it, limited to a sliding window by either of the two."""
    from keras_pdattn import training_sets

    near = training_set.within(sliding_window)
    if near is not None:
        return near, keys
    window = training_sets.SlidingWindow(sliding_window).select(keys, queries).window
    return training_set, replace(keys, visible=masks.intersect(window.visibility(), keys.visible))


def has_causal_form(primal, training_set, key_grid):
    """Whether one call of its members serves all queries of a causal call."""
    return training_set.has_causal_form(1 if key_grid is None else len(key_grid)) and all(
        transform.has_causal_form(_is_shift_invariant_after(primal, index))
        for index, transform in enumerate(primal.transform)
    )


def _is_shift_invariant_after(primal, index):
    """Whether what comes after a transform does not notice a shift of all keys."""
    return primal.feature_map.shift_invariant and index == len(primal.transform) - 1


@dataclasses.dataclass(frozen=True, eq=False)
class _Problem:
    """The problem of a group of heads, and how it is to be solved."""

    primal: Any
    training_set: Any
    weights: Any
    queries: Queries
    keys: Examples
    dropout: Any = None
    return_scores: bool = False
    flash_attention: bool | None = None
    form: str | None = None

    @property
    def needs_prefixes(self):
        """Whether each causal query has to be solved on its own."""
        keys = self.keys
        return keys.is_causal and not has_causal_form(self.primal, self.training_set, keys.grid)

    @property
    def asks_for_more(self):
        """Whether more is asked for than the output, by whatever way there is to it."""
        asked = self.flash_attention, self.form, self.dropout
        return self.return_scores or any(one is not None for one in asked)

    def state(self):
        """The queries, what they are fitted on, and that transformed."""
        examples = self.training_set.select(self.keys, self.queries)
        may_wait = self.primal.may_sum_inputs(self.training_set)
        examples = examples.with_projected_keys() if may_wait else examples.projected()
        queries, transformed = transform(self.primal, self.queries, examples, self.weights)
        query = queries.asked_for()
        return query, examples, transformed.with_keys(functools.partial(cast, dtype=query.dtype))

    def attend(self, query, examples, transformed):
        """Output, and scores or `None`, of what `state` returns."""
        output, example_weights, own_weights = self.primal.feature_map.attend(
            query,
            transformed,
            self.weights[-1],
            self.dropout,
            self.return_scores,
            self.flash_attention,
            self.form,
        )
        scores = examples.spread(example_weights, own_weights) if self.return_scores else None
        return output, scores

    def solve(self):
        """Output, and scores or `None`."""
        if not self.needs_prefixes:
            return self.attend(*self.state())

        def solve(queries, keys, dropout):
            changes = {"queries": queries, "keys": keys, "dropout": dropout}
            return replace(self, **changes).solve()

        is_pointwise = all(transform.is_pointwise for transform in self.primal.transform)
        return prefix_by_prefix(solve, self.queries, self.keys, self.dropout, is_pointwise)


def _solve_all(problems):
    """Output, and scores or `None`, of each problem."""
    first = problems[0]
    is_one_by_one = len(problems) == 1 or any(problem.needs_prefixes for problem in problems)
    if is_one_by_one or first.asks_for_more or not first.primal.feature_map.attends_to_groups:
        return [problem.solve() for problem in problems]
    stated = [problem.state() for problem in problems]
    outputs = first.primal.feature_map.attend_to_groups(
        [query for query, _, _ in stated], [transformed for _, _, transformed in stated]
    )
    if outputs is None:
        return [problem.attend(*state) for problem, state in zip(problems, stated)]
    return [(output, None) for output in outputs]


def transform(primal, queries, examples, weights, exactly=False):
    """Applies the transforms of `primal` to the queries and the examples of some heads.

    Args:
        primal: a `Primal`.
        queries: `Queries`.
        examples: `Examples`, untransformed.
        weights: those of these heads, for each transform and the feature map.
        exactly: whether keys are wanted as they are, and not up to a shift of all
            of them that the feature map does not notice.

    Returns:
        The queries and the examples, transformed.
    """
    for index, (one, its_weights) in enumerate(zip(primal.transform, weights)):
        if index:
            # What comes before need not leave padding at zero.
            queries, examples = queries.zero_padding(), examples.zero_padding()
        shift_invariant = not exactly and _is_shift_invariant_after(primal, index)
        queries, examples = one(queries, examples, its_weights, shift_invariant)
    return queries, examples


def _nothing_to_see(query, value, depth, return_scores):
    """The output, and scores, where there is no query or no key."""
    batch, length, num_heads, _ = native.shape(query)
    output = ops.zeros((batch, length, num_heads, depth), dtype=value.dtype)
    scores = ops.zeros((batch, num_heads, length, native.shape(value)[1]), dtype=value.dtype)
    return (output, scores) if return_scores else output


def head_counts(groups):
    """How many heads each of the groups of a training set has."""
    return [heads.stop - heads.start for heads, _ in groups]


def weights_of_heads(weights, heads):
    """The weights of some heads: all but scalars have the layout `(..., heads, depth)`."""
    return [
        {
            name: weight[..., heads, :] if len(weight.shape) > 1 else weight
            for name, weight in of_member.items()
        }
        for of_member in weights
    ]
