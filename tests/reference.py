"""The oracle: attention by its literal definition, in float64 NumPy, one query at a time.

It shares no code with the package. For each query it writes down the training
set as a dict from coordinates to examples, fits the transforms to them, and sums.
The causal case *is* the prefix law: the same function on the keys up to the query.
"""

import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    epsilon: float = 1e-5
    center: bool = True
    scale: bool = True
    beta: float = 1.0

    def fit(self, keys, head, is_causal):
        keys = np.array(list(keys.values()))
        mean = keys.mean(axis=0)
        variance = ((keys - mean) ** 2).mean(axis=0)
        shift = self.beta * mean if self.center else 0.0
        deviation = np.sqrt(variance + self.epsilon) if self.scale else 1.0
        return lambda xs: {at: (x - shift) / deviation for at, x in xs.items()}


@dataclasses.dataclass(frozen=True)
class Conv:
    """`kernel(num_heads, depth)` is an array `(k, heads, depth)` or `(k, k, heads, depth)`.

    `grid` and `class_tokens` describe a flattened grid.
    """

    kernel: callable
    grid: tuple = None
    class_tokens: int = 0

    def fit(self, keys, head, is_causal):
        def convolve(xs):
            depth = len(next(iter(xs.values())))
            kernel = self.kernel(head + 1, depth)[..., head, :]
            tokens = {at: x for at, x in xs.items() if at[0] < self.class_tokens}
            patches = {self._unflatten(at): x for at, x in xs.items() if at not in tokens}
            places = itertools.product(*(range(size) for size in kernel.shape[:-1]))
            taps = {tuple(i - len(kernel) // 2 for i in place): kernel[place] for place in places}
            convolved = {}
            for at in patches:
                total = np.zeros(depth)
                for offset, tap in taps.items():
                    if is_causal and offset > (0,) * len(offset):
                        continue  # Tuples compare in raster order.
                    neighbour = tuple(map(sum, zip(at, offset)))
                    total = total + tap * patches.get(neighbour, 0.0)
                convolved[self._flatten(at)] = total
            return {**tokens, **convolved}

        return convolve

    def _unflatten(self, at):
        if self.grid is None:
            return at
        return tuple(int(x) for x in np.unravel_index(at[0] - self.class_tokens, self.grid))

    def _flatten(self, at):
        if self.grid is None:
            return at
        return (int(np.ravel_multi_index(at, self.grid)) + self.class_tokens,)


def softmax_kernel(x, y, head):
    """The logarithm of the kernel, which itself may be beyond float64."""
    return x @ y / np.sqrt(len(x))


def finite_kernel(features):
    """The logarithm of the product of features."""

    def log_kernel(x, y, head):
        with np.errstate(divide="ignore"):
            return np.log(features(x) @ features(y))

    return log_kernel


elu_kernel = finite_kernel(lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))))
relu_kernel = finite_kernel(lambda x: np.maximum(x, 0))


def taylor_kernel(x, y, head):
    z = x @ y / np.sqrt(len(x))
    return np.log(1 + z + z**2 / 2)


def positive_random_kernel(omega):
    """`omega(num_heads, depth)` is an array `(features, heads, depth)`."""

    def log_kernel(x, y, head):
        directions = omega(head + 1, len(x))[:, head]
        x, y = x * len(x) ** -0.25, y * len(x) ** -0.25
        exponents = directions @ (x + y) - (x @ x + y @ y) / 2
        largest = exponents.max()
        return largest + np.log(np.exp(exponents - largest).mean())

    return log_kernel


@dataclasses.dataclass(frozen=True)
class Primal:
    """What the oracle is told of a primal problem.

    `scales` and `reduction` describe scaled heads, `scales=(1,)` being all keys;
    `window` a sliding one, as `(size, dilation, global tokens)`.
    """

    log_kernel: callable = softmax_kernel
    transforms: tuple = ()
    scales: tuple = (1,)
    reduction: str = "mean"
    window: tuple = None


def head_scales(num_heads, scales):
    """Contiguous groups of heads, as even as possible and in order, one per scale."""
    groups = np.array_split(np.arange(num_heads), len(scales))
    return [scale for scale, group in zip(scales, groups) for _ in group]


def coordinates(position, grid):
    if grid is None:
        return (position,)
    return tuple(int(x) for x in np.unravel_index(position, grid))


def training_set(positions, scale, reduction="mean", grid=None):
    """Dict from the coordinates of each example to its members.

    For the valid `positions` that may be seen, in order.
    """
    if scale == 1:
        return {coordinates(position, grid): [position] for position in positions}
    start = np.min([coordinates(position, grid) for position in positions], axis=0, initial=2**30)
    windows = {}
    for position in positions:
        window = (np.array(coordinates(position, grid)) - start) // scale
        windows.setdefault(tuple(int(x) for x in window), []).append(position)
    if reduction == "first":
        return {at: windows[at][:1] for at in sorted(windows)}
    return {at: windows[at] for at in sorted(windows)}


def near(i, j, query_grid, key_grid, size, dilation=1):
    """Whether `j` is in the window, a box on grids, around `i`."""
    differences = np.subtract(coordinates(i, query_grid), coordinates(j, key_grid))
    return all(abs(d) < size * dilation and d % dilation == 0 for d in differences)


def in_window(i, j, query_grid, key_grid, valid, size, dilation, global_tokens):
    """Whether `i` sees `j`: near it, or one of them among the first of `valid`."""
    everywhere = valid[:global_tokens]
    is_near = near(i, j, query_grid, key_grid, size, dilation)
    return is_near or i in everywhere or j in everywhere


def attention(
    query,
    key,
    value,
    primal=Primal(),
    mask=None,
    key_mask=None,
    query_mask=None,
    is_causal=False,
    sliding_window=None,
    query_grid=None,
    key_grid=None,
):
    """Returns `(output, scores)` for `(batch, time, heads, depth)` arrays."""
    query, key, value = (np.asarray(x, "float64") for x in (query, key, value))
    batch, query_length, num_heads, _ = query.shape
    key_length = key.shape[1]
    output = np.zeros((batch, query_length, num_heads, value.shape[-1]))
    scores = np.zeros((batch, num_heads, query_length, key_length))
    shape = (batch, num_heads, query_length, key_length)
    mask = np.broadcast_to(True if mask is None else mask, shape)
    scales = head_scales(num_heads, primal.scales)
    for b, h in np.ndindex(batch, num_heads):
        fitted = {}
        for i in range(query_length):
            if query_mask is not None and not query_mask[b, i]:
                continue
            end = i + 1 if is_causal else max(query_length, key_length)
            if end not in fitted:
                fitted[end] = fit(
                    key[b, :end, h],
                    value[b, :end, h],
                    query[b, :end, h],
                    primal,
                    scales[h],
                    None if key_mask is None else key_mask[b],
                    None if query_mask is None else query_mask[b],
                    (query_grid, key_grid),
                    h,
                    is_causal,
                )
            examples, keys, values, queries, valid = fitted[end]
            grids = query_grid, key_grid
            seen = {
                j
                for j in valid
                if mask[b, h, i, j]
                and (sliding_window is None or near(i, j, *grids, sliding_window))
                and (primal.window is None or in_window(i, j, *grids, valid, *primal.window))
            }
            logs = np.full(len(examples), -np.inf)
            for m, (at, members) in enumerate(examples.items()):
                if seen.issuperset(members):
                    x = queries[coordinates(i, query_grid)]
                    logs[m] = primal.log_kernel(x, keys[at], h)
            if np.isneginf(logs).all():
                continue
            kernel = np.exp(logs - logs.max())
            weights = kernel / kernel.sum()
            output[b, i, h] = weights @ np.array(list(values.values()))
            for weight, members in zip(weights, examples.values()):
                for j in members:
                    scores[b, h, i, j] = weight / len(members)
    return output, scores


def fit(key, value, query, primal, scale, key_mask, query_mask, grids, head, is_causal):
    """The training set of one head, and it and the queries transformed.

    Returns:
        Dicts from coordinates to the members of each example, its transformed key,
        its value, and to each transformed query; and the positions of valid keys.
    """
    query_grid, key_grid = grids
    valid = [j for j in range(len(key)) if key_mask is None or key_mask[j]]
    examples = training_set(valid, scale, primal.reduction, key_grid)
    keys = {at: key[members].mean(axis=0) for at, members in examples.items()}
    values = {at: value[members].mean(axis=0) for at, members in examples.items()}
    queries = {
        coordinates(i, query_grid): query[i]
        for i in range(len(query))
        if query_mask is None or query_mask[i]
    }
    if examples:
        for transform in primal.transforms:
            apply = transform.fit(keys, head, is_causal)
            keys, queries = apply(keys), apply(queries)
    return examples, keys, values, queries, valid
