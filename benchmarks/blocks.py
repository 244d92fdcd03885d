"""How many weights to hold at once, of all heads or of one: times of softmax attention in blocks.

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

#: Values of `MOST_WEIGHTS`, `MOST_ROWS` and `MOST_OF_HEAD`, as exponents of 2.
SETTINGS = [(21, 11, 40), (22, 10, 40), (22, 11, 40), (22, 11, 19), (22, 11, 20), (22, 11, 21)]


def step_of(member, which, length, setting):
    """A pass of a layer, in blocks of so many weights and rows, and weights of one head."""
    dual.MOST_WEIGHTS, dual.MOST_ROWS, dual.MOST_OF_HEAD = (2**exponent for exponent in setting)
    x = inputs(length)
    layer = CASES[member].ours()
    layer.build(x.shape, x.shape)
    function = PASSES[which](layer)
    function(x)  # Traced while the constants are set.
    return function


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", nargs="+", default=["softmax", "Attention-SH"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    title = (
        f"Median milliseconds by weights, rows, weights of one head on {keras.backend.backend()}"
    )
    table = Table(title=title)
    for column in ("member", "pass"):
        table.add_column(column)
    exponents = [", ".join(f"2^{exponent}" for exponent in setting) for setting in SETTINGS]
    for column in ("tokens", *exponents):
        table.add_column(column, justify="right")
    for member in options.members:
        for length in options.lengths:
            for which in PASSES:
                functions = [step_of(member, which, length, setting) for setting in SETTINGS]
                found = times(functions, inputs(length), options.rounds)
                medians = [f"{1000 * sorted(seconds)[len(seconds) // 2]:.0f}" for seconds in found]
                table.add_row(member, which, f"{length:,}", *medians)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
