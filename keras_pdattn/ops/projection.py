"""Projections, of which those of keys and values may wait until inputs are averaged."""

import dataclasses
from typing import Any

from keras_pdattn.ops import native
from keras_pdattn.ops.dtypes import cast


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """x W + b, of the last axes of tensors.

    Attributes:
        kernel: `(*widths, *units)`; units are `(heads, depth)` but for a layer's outputs.
        bias: `(*units)`, or `None`.
        num_widths: the number of `widths`.
    """

    kernel: Any
    bias: Any = None
    num_widths: int = 1

    def split(self, sizes):
        """Projections, from one width, of groups of so many heads each."""
        kernels = native.split(self.kernel, sizes, axis=1)
        biases = [None] * len(sizes)
        if self.bias is not None:
            biases = native.split(self.bias, sizes, axis=0)
        return [type(self)(*weights) for weights in zip(kernels, biases)]

    def __call__(self, x):
        """Turns `(*lead, *widths)` into `(*lead, *units)`."""
        return native.linear(cast(x, self.kernel.dtype), self.kernel, self.bias, self.num_widths)
