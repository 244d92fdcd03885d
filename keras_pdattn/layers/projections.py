"""The projections of an attention layer, at the cost of their formula alone."""

import math

import keras

from keras_pdattn.ops import native
from keras_pdattn.ops.projection import Projection


def project(dense, x, compute_dtype):
    """`dense(x)`; where that is nothing but `x W + b`, without what else `__call__` looks after.

    On short sequences, run eagerly, that is a quarter of an attention layer's time.
    """
    return projection(dense)(x) if is_plain(dense, compute_dtype) else dense(x)


def projection(dense):
    """What a plain `dense` computes."""
    inputs, kernel = dense.equation.split("->")[0].split(",")
    num_widths = len(set(inputs) & set(kernel))
    bias = None if dense.bias is None else native.value(dense.bias)
    return Projection(native.value(dense.kernel), bias, num_widths)


def is_plain(dense, compute_dtype):
    """Whether calling `dense` inside a layer of `compute_dtype` does nothing beyond its formula.

    It does where it has an activation, is quantised, regularises its output, is worked again in the
    backward pass, is watched by hooks of torch, or lays out tensors over devices.
    """
    return (
        type(dense) is keras.layers.EinsumDense
        and dense.quantization_mode is None
        and dense.activation is keras.activations.linear
        and dense.activity_regularizer is None
        and dense.compute_dtype == compute_dtype
        and not any(getattr(dense, name, None) for name in ("_remat_mode", *_TORCH_HOOKS))
        and keras.distribution.distribution() is None
    )


#: The least number of keys that torch is faster at projecting once means or sums are taken of
#: them, some operations more for each group of heads.
LEAST_LATE = 2048


def are_better_late(weight, sizes):
    """Whether means or sums of inputs, over axes of these sizes, are better projected than they.

    It is fewer products, and more operations, for which a GPU, and torch on a short sequence,
    wait longer. `weight` is one of the layer, and where that is.
    """
    if native.runs_on_gpu() or native.is_cuda(native.value(weight)):
        return False
    is_known = all(isinstance(size, int) for size in sizes)
    return not (native.IS_TORCH and is_known) or math.prod(sizes) >= LEAST_LATE


_TORCH_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
