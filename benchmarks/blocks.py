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

#: Constants of `dual`, and values of them, as exponents of 2; no head has 2^40 weights.
NAMES = ("MOST_WEIGHTS", "MOST_ROWS", "LEAST_APART", "MOST_OF_HEAD")
SETTINGS = [
    *((21, 11, 40, 20), (22, 10, 40, 20), (22, 11, 40, 20)),
    *((22, 11, 16, 20), (22, 11, 18, 20), (22, 11, 20, 20)),
    *((22, 11, 18, 19), (22, 11, 18, 21)),
]


def step_of(member, which, length, setting):
    """A pass of a layer with these constants."""
    for name, exponent in zip(NAMES, setting):
        setattr(dual, name, 2**exponent)
    x = inputs(length)
    layer = CASES[member].ours()
    layer.build(x.shape, x.shape)
    function = PASSES[which](layer)
    function(x)  # Traced while the constants are set.
    return function


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", nargs="+", default=["softmax", "Attention-SH"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    title = f"Median milliseconds by {', '.join(NAMES)} on {keras.backend.backend()}"
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
