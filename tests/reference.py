"""The oracle: attention by its literal definition, in float64 NumPy, one query at a time.

It shares no code with the package. For each query it writes down the training
set as a list of examples, fits the transform to them, and sums. The causal case
*is* the prefix law: the same function on the keys up to the query.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    epsilon: float = 1e-5
    center: bool = True
    scale: bool = True
    beta: float = 1.0

    def fit(self, keys):
        keys = np.array(keys)
        mean = keys.mean(axis=0)
        variance = ((keys - mean) ** 2).mean(axis=0)
        shift = self.beta * mean if self.center else 0.0
        deviation = np.sqrt(variance + self.epsilon) if self.scale else 1.0
        return lambda x: (x - shift) / deviation


def softmax_kernel(x, y):
    """The logarithm of the kernel, which itself may be beyond float64."""
    return x @ y / np.sqrt(len(x))


@dataclasses.dataclass(frozen=True)
class Primal:
    """What the oracle is told of a primal problem.

    `scales` and `reduction` describe scaled heads; `scales=(1,)` is all keys.
    """

    log_kernel: callable = softmax_kernel
    transforms: tuple = ()
    scales: tuple = (1,)
    reduction: str = "mean"


def head_scales(num_heads, scales):
    """Contiguous groups of heads, as even as possible and in order, one per scale."""
    groups = np.array_split(np.arange(num_heads), len(scales))
    return [scale for scale, group in zip(scales, groups) for _ in group]


def training_set(positions, scale, reduction):
    """The members of each example, for the valid `positions` that may be seen, in order."""
    if not positions:
        return []
    start = positions[0]
    windows = {}
    for position in positions:
        windows.setdefault((position - start) // scale, []).append(position)
    members = [windows[index] for index in sorted(windows)]
    return [window[:1] for window in members] if reduction == "first" else members


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
    for b, h, i in np.ndindex(batch, num_heads, query_length):
        if query_mask is not None and not query_mask[b, i]:
            continue
        prefix = range(min(i + 1, key_length) if is_causal else key_length)
        valid = [j for j in prefix if key_mask is None or key_mask[b, j]]
        examples = training_set(valid, scales[h], primal.reduction)
        if not examples:
            continue
        keys = [key[b, members, h].mean(axis=0) for members in examples]
        values = [value[b, members, h].mean(axis=0) for members in examples]
        x = query[b, i, h]
        for transform in primal.transforms:
            apply = transform.fit(keys)
            keys, x = [apply(y) for y in keys], apply(x)
        seen = [
            all(
                mask[b, h, i, j] and (sliding_window is None or abs(i - j) < sliding_window)
                for j in members
            )
            for members in examples
        ]
        logs = np.array([primal.log_kernel(x, y) if see else -np.inf for y, see in zip(keys, seen)])
        if np.isneginf(logs).all():
            continue
        kernel = np.exp(logs - logs.max())
        weights = kernel / kernel.sum()
        output[b, i, h] = weights @ np.array(values)
        for weight, members in zip(weights, examples):
            scores[b, h, i, members] = weight / len(members)
    return output, scores
