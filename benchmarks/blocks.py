"""How many weights to hold at once, and how many queries a block: times of softmax attention.

KERAS_BACKEND=jax python -m benchmarks.blocks --lengths 2048 4096
"""

import argparse

import keras
from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES, inputs
from benchmarks.compiled import PASSES
from benchmarks.speed import times
from keras_pdattn.ops import dual

MOST_WEIGHTS = [2**19, 2**20, 2**21, 2**22, 2**23]


def step_of(which, length, most):
    """A pass of a layer, with blocks of that many weights."""
    dual.MOST_WEIGHTS = most
    x = inputs(length)
    layer = CASES["softmax"].ours()
    layer.build(x.shape, x.shape)
    function = PASSES[which](layer)
    function(x)  # Traced while `MOST_WEIGHTS` is set.
    return function


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    table = Table(title=f"Median milliseconds by most weights on {keras.backend.backend()}")
    for column in ("tokens", "pass", *(f"2^{most.bit_length() - 1}" for most in MOST_WEIGHTS)):
        table.add_column(column, justify="right")
    for length in options.lengths:
        for which in PASSES:
            functions = [step_of(which, length, most) for most in MOST_WEIGHTS]
            found = times(functions, inputs(length), options.rounds)
            medians = [f"{1000 * sorted(seconds)[len(seconds) // 2]:.0f}" for seconds in found]
            table.add_row(f"{length:,}", which, *medians)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
