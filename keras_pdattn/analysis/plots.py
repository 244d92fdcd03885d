"""Plots of attention, of how redundant heads are, of support vectors and of cost.

Each returns a `matplotlib.figure.Figure` that belongs to no window and no global
state: show it as the last line of a notebook's cell, or `figure.savefig(path)`.
"""

import math

import numpy as np

from keras_pdattn import validation
from keras_pdattn.analysis import arrays
from keras_pdattn.analysis.redundancy import HeadRedundancy

#: Okabe and Ito's colours, which people with any colour vision tell apart, the palest left out.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#BBBBBB"
_MEASURES = {
    "distance": ("distances", "distance between heads"),
    "cosine_similarity": ("cosine_similarities", "cosine similarity of heads"),
    "cka": ("ckas", "CKA of heads"),
}


def plot_attention(
    scores,
    sequence=0,
    heads=None,
    mask=None,
    labels=None,
    key_mask=None,
    key_labels=None,
    title=None,
):
    r"""Plots where each head attends: its scores \(p_{hij}\) as an image.

    Queries \(i\) run down, keys \(j\) across, and all heads share one scale of
    colours from 0 to the largest score.

    Masking: padded positions are cropped; the ticks keep the numbers of the
    others.

    Cost: one image of queries times keys for each head.

    Args:
        scores: array or tensor of shape `(batch, heads, queries, keys)`, such as
            `attention_scores` returns; several axes of queries and keys are
            flattened.
        sequence: index of the sequence in the batch.
        heads: indices of the heads to plot; all if `None`.
        mask: boolean `(batch, queries)`, False for padding.
        labels: the queries' names, such as tokens, one for each position.
        key_mask: boolean `(batch, keys)`; `mask` if `None` and there are as many
            keys as queries.
        key_labels: the keys' names; `labels` if `None` and there are as many.
        title: title of the figure.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if shapes don't fit, an index is out of range, labels are not
            one for each position, or padding is all there is.

    Example:

    ```python
    import numpy as np
    from keras_pdattn import analysis, layers

    x = np.random.default_rng(0).normal(size=(2, 10, 32)).astype("float32")
    attention = layers.BatchNormAttention(num_heads=4, key_dim=8)
    _, scores = attention(x, x, return_attention_scores=True)
    figure = analysis.plot_attention(scores, sequence=1, title="Attention-BN")
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """
    scores, queries_shape, keys_shape = arrays.as_scores(scores)
    batch, num_heads, num_queries, num_keys = scores.shape
    sequence = _index("sequence", sequence, batch)
    heads = _indices("heads", heads, num_heads)
    if keys_shape == queries_shape:
        key_mask = mask if key_mask is None else key_mask
        key_labels = labels if key_labels is None else key_labels
    queries = _positions("mask", mask, queries_shape, sequence)
    keys = _positions("key_mask", key_mask, keys_shape, sequence)
    labels = _labels("labels", labels, num_queries)
    key_labels = _labels("key_labels", key_labels, num_keys)
    images = scores[sequence][np.ix_(heads, queries, keys)].astype("float64")

    panels = _Panels(len(heads), len(queries) / len(keys), title)
    panels.images(images, [f"head {head}" for head in heads], "attention score")
    panels.name_axes("key", keys, key_labels, "query", queries, labels)
    return panels.figure


def plot_redundancy(redundancy, measure="distance", title=None):
    r"""Plots how alike the heads of a layer attend, or those of several layers side by side.

    One annotated matrix of heads times heads for each layer, all on one scale of
    colours, with the mean over pairs of different heads in its title.

    Cost: heads squared cells.

    Args:
        redundancy: a `HeadRedundancy`, or a dict of them by name.
        measure: `"distance"`, `"cosine_similarity"` or `"cka"`; see
            `head_redundancy`.
        title: title of the figure.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if `redundancy` or `measure` is not one of these.

    Example:

    ```python
    import numpy as np
    from keras_pdattn import analysis, layers

    x = np.random.default_rng(0).normal(size=(2, 10, 32)).astype("float32")
    redundancy = {}
    for cls in (layers.PrimalDualAttention, layers.BatchNormAttention):
        _, scores = cls(num_heads=4, key_dim=8)(x, x, return_attention_scores=True)
        redundancy[cls.__name__] = analysis.head_redundancy(scores)
    figure = analysis.plot_redundancy(redundancy)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), redundancy of heads.
    """
    if measure not in _MEASURES:
        raise ValueError(f"`measure` must be one of {list(_MEASURES)}. Received: {measure=}")
    members = redundancy if isinstance(redundancy, dict) else {"": redundancy}
    if not members or not all(isinstance(x, HeadRedundancy) for x in members.values()):
        raise ValueError(
            "`redundancy` must be a `HeadRedundancy`, or a non-empty dict of them by name. "
            f"Received: redundancy={redundancy!r}"
        )
    attribute, label = _MEASURES[measure]
    matrices = [getattr(member, attribute) for member in members.values()]
    means = [f"mean {getattr(member, measure):.3f}" for member in members.values()]
    names = [f"{name}\n{mean}" if name else mean for name, mean in zip(members, means)]

    most = max(len(matrix) for matrix in matrices)
    is_annotated = most <= 16
    panels = _Panels(len(matrices), 1.0, title, max(2.6, 0.36 * most) if is_annotated else 4.5)
    panels.images(matrices, names, label, at_least=0.0 if measure == "distance" else 1.0)
    for axis, matrix in zip(panels.axes, matrices):
        heads = np.arange(len(matrix))
        _set_ticks(axis.xaxis, heads, None, count=16)
        _set_ticks(axis.yaxis, heads, None, count=16)
        if is_annotated:
            _annotate(axis, matrix)
    panels.figure.supxlabel("head")
    panels.figure.supylabel("head")
    return panels.figure


def plot_support_vectors(
    coefficients, sequence=0, heads=None, grid=None, mask=None, tolerance=1e-3, title=None
):
    r"""Plots the dual coefficients of each head, its support vectors highlighted.

    The coefficients of key \(j\) are the vector
    \(\alpha_j - \tilde\alpha_j\), and the key is a support vector of the
    head's regression if their norm is more than `tolerance` times the largest
    of the head. Over a sequence there is one stem for each key, over a `grid`
    an image, which leaves all but the support vectors grey.

    Masking: padded keys are left out.

    Cost: one stem or cell for each key and head.

    Args:
        coefficients: array or tensor of dual coefficients of shape
            `(batch, heads, keys, value_depth)`.
        sequence: index of the sequence in the batch.
        heads: indices of the heads to plot; all if `None`.
        grid: `(rows, columns)` of which the keys are the cells, in raster order;
            `None` for a sequence.
        mask: boolean `(batch, keys)`, False for padding.
        tolerance: number in [0, 1), the share of the largest norm up to which a
            norm counts as zero.
        title: title of the figure.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if shapes don't fit, an argument is out of range, or padding
            is all there is.

    Example:

    ```python
    import numpy as np
    from keras_pdattn import analysis

    coefficients = np.random.default_rng(0).normal(size=(1, 2, 20, 4))
    coefficients[:, :, ::3] = 0
    figure = analysis.plot_support_vectors(coefficients)
    figure = analysis.plot_support_vectors(coefficients, grid=(4, 5))
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), support vector expansion.
    """
    coefficients = arrays.as_floats("coefficients", coefficients)
    if coefficients.ndim != 4 or 0 in coefficients.shape:
        raise ValueError(
            "`coefficients` must have the shape (batch, heads, keys, value_depth), none of them "
            f"empty. Received: coefficients of shape {coefficients.shape}"
        )
    batch, num_heads, num_keys, _ = coefficients.shape
    sequence = _index("sequence", sequence, batch)
    heads = _indices("heads", heads, num_heads)
    keys = _positions("mask", mask, (batch, num_keys), sequence)
    tolerance = validation.real("tolerance", tolerance, "a number in [0, 1)", lambda x: 0 <= x < 1)
    if grid is not None:
        is_pair = isinstance(grid, (tuple, list)) and len(grid) == 2
        rows, columns = [validation.positive_int("grid", x) for x in grid] if is_pair else (0, 0)
        if rows * columns != num_keys:
            raise ValueError(
                f"`grid` must be (rows, columns) of all {num_keys} keys. Received: grid={grid!r}"
            )
    norms = np.linalg.norm(coefficients[sequence].astype("float64"), axis=-1)[heads]
    # Padding has no norm, which makes every comparison with it false.
    norms[:, np.setdiff1d(np.arange(num_keys), keys)] = np.nan
    supports = norms > tolerance * np.nanmax(norms, axis=1, keepdims=True)
    names = [
        f"head {head}: {count} of {len(keys)} keys"
        for head, count in zip(heads, supports.sum(axis=1))
    ]
    if grid is None:
        return _stems(norms, supports, keys, names, title)
    panels = _Panels(len(heads), rows / columns, title)
    images = np.ma.array(norms, mask=~supports).reshape(-1, rows, columns)
    panels.images(images, names, f"{_NORM} of support vectors")
    panels.name_axes("column", np.arange(columns), None, "row", np.arange(rows), None)
    return panels.figure


def plot_cost(
    lengths,
    costs,
    memory=None,
    cost_label="multiply-adds",
    memory_label="memory in bytes",
    title=None,
):
    r"""Plots what attention costs as sequences grow, on logarithmic axes.

    There softmax attention, \(O(N^2)\), climbs twice as steeply as linear
    attention or a sliding window, \(O(N)\), and scaled heads run below it in
    parallel.

    Cost: one line for each name.

    Args:
        lengths: positive sequence lengths, in order.
        costs: dict from a name to its cost at each length, positive or `None`
            where there is no number.
        memory: another such dict, for a second panel; `None` for none.
        cost_label: what `costs` count.
        memory_label: what `memory` counts.
        title: title of the figure.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to plot, a number is missing or not
            positive.

    Example:

    ```python
    from keras_pdattn import analysis

    lengths = [256, 512, 1024]
    figure = analysis.plot_cost(
        lengths,
        {"softmax": [n * n for n in lengths], "linear": [64 * n for n in lengths]},
    )
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), cost of scaled heads.
    """
    lengths = _positive("lengths", lengths)
    series = {cost_label: _series("costs", costs, lengths)}
    if memory is not None:
        series[memory_label] = _series("memory", memory, lengths)
    names = list(dict.fromkeys(name for lines in series.values() for name in lines))
    figure = _figure(4.2 * len(series) + 1.8, 3.6, title)
    axes = figure.subplots(1, len(series), squeeze=False)[0]
    lines = {}
    for axis, (label, values) in zip(axes, series.items()):
        for name, numbers in values.items():
            index = names.index(name)
            (lines[name],) = axis.loglog(
                lengths,
                numbers,
                color=_COLORS[index % len(_COLORS)],
                marker=_MARKERS[index % len(_MARKERS)],
                # Dashes let a line show that lies below another.
                linestyle=("-", "--", "-.", ":")[index % 4],
                markersize=5,
                label=name,
            )
        axis.set(xlabel="sequence length", ylabel=label)
        axis.grid(which="major", color=_GREY, linewidth=0.5, alpha=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if len(lengths) <= 6:
            axis.set_xticks(lengths, [f"{length:,.0f}" for length in lengths])
            axis.minorticks_off()
    # In the order in which the lines end.
    ends = {name: next(iter(series.values())).get(name, [np.nan])[-1] for name in names}
    names.sort(key=lambda name: -np.nan_to_num(ends[name], nan=np.inf))
    figure.legend([lines[name] for name in names], names, loc="outside right upper", frameon=False)
    return figure


_NORM = r"$\Vert \alpha_j - \tilde{\alpha}_j \Vert$"


class _Panels:
    """Small multiples: panels of one size in rows, that share a scale of colours and their axes."""

    def __init__(self, count, ratio, title, side=None):
        """`ratio` is that of a panel's height to its width, `side` the longer one in inches."""
        side = side or {1: 4.5, 2: 3.4}.get(count, 2.4)
        # Beyond this cells are stretched, so that a few queries of many keys are seen at all.
        self._is_square = 2 / 5 <= ratio <= 5 / 2
        ratio = min(max(ratio, 2 / 5), 5 / 2)
        side = max(side, 1.4 * max(ratio, 1 / ratio))
        self.width, self.height = side * min(1, 1 / ratio), side * min(1, ratio)
        self.rows = math.ceil(count / min(4, int(10.5 / self.width)))
        self.columns = math.ceil(count / self.rows)
        self.figure = _figure(
            self.columns * (self.width + 0.1) + 1.6, self.rows * (self.height + 0.3) + 0.7, title
        )
        axes = self.figure.subplots(self.rows, self.columns, squeeze=False).ravel()
        self.axes = list(axes[:count])
        for axis in axes[count:]:
            axis.remove()

    def images(self, images, names, label, at_least=0.0):
        """Draws an image and a name into each panel, and one bar of colours."""
        largest = max(at_least, *(np.ma.filled(image, 0.0).max() for image in images))
        # Where a cell has no pixel to itself, blending is better than dropping some.
        has_room = max(images[0].shape) <= 90 * max(self.width, self.height)
        for axis, image, name in zip(self.axes, images, names):
            drawn = axis.imshow(
                image,
                cmap="YlGnBu",
                vmin=0.0,
                vmax=largest or 1.0,
                aspect="equal" if self._is_square else "auto",
                interpolation="nearest" if has_room else "auto",
            )
            axis.set_facecolor(_GREY)
            axis.set_title(name, fontsize="medium")
        length = min(5.0, self.rows * self.height)
        self.figure.colorbar(
            drawn,
            ax=self.axes,
            label=label,
            shrink=length / (self.rows * self.height),
            aspect=length / 0.16,
            fraction=0.16 / (self.columns * self.width),
            # What equal cells leave of the width goes right; left, it would pass for room of ticks.
            panchor=(0.0, 0.5),
        )

    def name_axes(self, across, columns, column_labels, down, rows, row_labels):
        """Puts ticks at the outer axes, and says what runs across and down."""
        for index, axis in enumerate(self.axes):
            is_left, is_lowest = index % self.columns == 0, index + self.columns >= len(self.axes)
            count = _tick_count(self.width, column_labels)
            _set_ticks(axis.xaxis, columns, column_labels, count, is_lowest)
            _set_ticks(axis.yaxis, rows, row_labels, _tick_count(self.height, row_labels), is_left)
            if column_labels is not None:
                axis.tick_params(axis="x", rotation=90)
        self.figure.supxlabel(across)
        self.figure.supylabel(down)


def _figure(width, height, title):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Plots need matplotlib. Install it with `pip install "keras-pdattn[plot]"`.'
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    if title is not None:
        figure.suptitle(title)
    return figure


def _stems(norms, supports, keys, names, title):
    """One row of stems for each head."""
    heads = len(norms)
    figure = _figure(8.0, 1.1 + (1.3 if heads <= 4 else 0.95) * heads, title)
    axes = figure.subplots(heads, 1, sharex=True, squeeze=False)[:, 0]
    for axis, norm, support, name in zip(axes, norms, supports, names):
        (chosen,) = np.nonzero(support)
        others = np.setdiff1d(keys, chosen)
        axis.vlines(chosen, 0, norm[chosen], color=_COLORS[0], linewidth=1.2)
        size = min(5.0, max(2.5, 350 / len(norm)))
        # Dots at zero are drawn whole; an empty set of them must not upset the layout.
        dots = {"linestyle": "none", "markersize": size, "clip_on": False, "in_layout": False}
        axis.plot(chosen, norm[chosen], "o", color=_COLORS[0], label="support vector", **dots)
        axis.plot(others, norm[others], "o", color=_GREY, label="other key", **dots)
        axis.set_title(name, loc="left", fontsize="medium")
        axis.set_ylim(bottom=0)
        axis.locator_params(axis="y", nbins=3)
        axis.spines[["top", "right"]].set_visible(False)
    margin = 0.5 + 0.01 * (keys[-1] - keys[0])
    axes[-1].set_xlim(keys[0] - margin, keys[-1] + margin)
    axes[-1].locator_params(axis="x", integer=True)
    axes[-1].set_xlabel("key")
    figure.supylabel(_NORM)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False
    )
    return figure


def _annotate(axis, matrix):
    """Writes the numbers of a matrix into the cells of its image."""
    image = axis.images[0]
    for (row, column), value in np.ndenumerate(matrix):
        red, green, blue, _ = image.cmap(image.norm(value))
        is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        color = "black" if is_light else "white"
        axis.text(column, row, f"{value:.2f}", color=color, ha="center", va="center", fontsize=8)


def _tick_count(inches, labels):
    """How many ticks an axis of this length has room for: numbers are sparse, names one a line."""
    return 6 if labels is None else int(inches * 72 / 9)


def _set_ticks(axis, positions, labels, count, is_shown=True):
    """At most about `count` ticks, that name the positions of which some may have been cropped."""
    from matplotlib.ticker import MaxNLocator

    if labels is None:
        ticks = MaxNLocator(count, steps=[1, 2, 5, 10], integer=True)
        ticks = ticks.tick_values(0, len(positions) - 1)
        ticks = [int(tick) for tick in ticks if 0 <= tick < len(positions)]
    else:
        ticks = range(0, len(positions), math.ceil(len(positions) / count))
    names = [positions[tick] if labels is None else labels[positions[tick]] for tick in ticks]
    axis.set_ticks(ticks, names if is_shown else [], fontsize=8)


def _index(name, value, count):
    if validation.natural(name, value) >= count:
        raise ValueError(f"`{name}` must be less than {count}. Received: {name}={value}")
    return int(value)


def _indices(name, values, count):
    values = range(count) if values is None else np.ravel(values).tolist()
    if not values:
        raise ValueError(f"`{name}` must name one at least. Received: {name}={values!r}")
    return [_index(name, value, count) for value in values]


def _positions(name, mask, shape, sequence):
    """The positions of a sequence that are not padding."""
    (positions,) = np.nonzero(arrays.as_mask(name, mask, shape)[sequence])
    if not len(positions):
        raise ValueError(
            f"`{name}` must leave something to plot. Received: {name} without True for "
            f"sequence={sequence}"
        )
    return positions


def _labels(name, labels, count):
    if labels is not None and len(labels) != count:
        raise ValueError(
            f"`{name}` must have one item for each of {count} positions. "
            f"Received: {name} of length {len(labels)}"
        )
    return labels


def _positive(name, values):
    """Numbers as a float array; `None` becomes NaN."""
    array = np.array(values, dtype="float64")
    if array.ndim != 1 or not len(array) or (array <= 0).any():
        raise ValueError(
            f"`{name}` must be a non-empty sequence of positive numbers. Received: {name}={values}"
        )
    return array


def _series(name, series, lengths):
    """Checks a dict from names to numbers, one for each length."""
    if not isinstance(series, dict) or not series:
        raise ValueError(f"`{name}` must be a non-empty dict. Received: {name}={series!r}")
    series = {key: _positive(f"{name}[{key!r}]", values) for key, values in series.items()}
    for key, values in series.items():
        if len(values) != len(lengths):
            raise ValueError(
                f"`{name}` must have one number for each of {len(lengths)} lengths. "
                f"Received: {len(values)} for {key!r}"
            )
    return series
