"""Projections of keys and values that may wait until after averages of inputs are taken."""

import dataclasses
from typing import Any

from keras import ops


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """x W + b, for each head, of tensors.

    Attributes:
        kernel: `(width, heads, depth)`.
        bias: `(heads, depth)`, or `None`.
    """

    kernel: Any
    bias: Any = None

    def of(self, heads):
        """The projection of some heads."""
        bias = None if self.bias is None else self.bias[heads]
        return type(self)(self.kernel[:, heads], bias)

    def __call__(self, x):
        """Turns inputs `(batch, time, 1, width)` into `(batch, time, heads, depth)`."""
        x = ops.einsum("bmc,chd->bmhd", ops.cast(x[:, :, 0], self.kernel.dtype), self.kernel)
        return x if self.bias is None else x + self.bias
