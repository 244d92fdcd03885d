"""Whole layers against `keras.layers.MultiHeadAttention`, in one process, runs interleaved.

Layers of 8 heads of 32 on one sequence of width 256, forward and training step, compiled as a
user would. A ratio is the median of our times over the median of theirs. Before a layer is
timed its output is held to the oracle of the tests, on a short sequence: a wrong one stops the run.

    KERAS_BACKEND=jax python -m benchmarks.speed --lengths 2048 4096 --members softmax
"""

import argparse
import dataclasses
import time

import keras
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine, results
from benchmarks.cases import CASES, DEPTH, HEADS, MODES, RIVALS, TOLERANCE, call_of, check, inputs
from benchmarks.compiled import PASSES, wait
from keras_pdattn import analysis

CALLS_ON_GPU = 10


def times(functions, x, rounds):
    """Seconds of each call of each of `functions`, in turn.

    A call that is counted comes after one that is not, in which what the other functions left,
    caches and memory given back to the operating system, is made up for. On a GPU, which a program
    does not wait for between its layers, several are counted at once.
    """
    calls = 1 if machine.gpu() is None else CALLS_ON_GPU
    for function in functions:
        wait(function(x))
    found = [[] for _ in functions]
    for _ in range(rounds):
        for seconds, function in zip(found, functions):
            wait(function(x))
            start = time.perf_counter()
            for _ in range(calls):
                result = function(x)
            wait(result)
            seconds.append((time.perf_counter() - start) / calls)
    return found


def compare(functions, x, rounds):
    """The ratio of the first function's median time to the second's, and what it comes from."""
    mine, theirs = (np.array(seconds) for seconds in times(functions, x, rounds))
    return {
        "ratio": round(float(np.median(mine) / np.median(theirs)), 3),
        "seconds": float(np.median(mine)),
        "seconds_against": float(np.median(theirs)),
        "spread": [round(float(x), 3) for x in np.quantile(mine / np.median(mine), [0.1, 0.9])],
    }


def matmul_rate(size=2048):
    """Multiply-adds a second of a large float32 matrix product on this machine."""
    rng = np.random.default_rng(0)
    x = keras.ops.convert_to_tensor(rng.normal(size=(1, size, size)).astype("float32"))
    layer = keras.layers.Dense(size, use_bias=False)
    layer.build(x.shape)
    (seconds,) = times([layer], x, 5)
    return size**3 / float(np.median(seconds))


def measure(name, case, length, mode, dtype, rounds, rate, compiles_torch):
    """One row of the report: ratios, spreads and the achieved share of the matmul rate."""
    x, call = inputs(length, dtype), call_of(mode, length)
    row = {"member": name, "against": case.rival, "tokens": length, "mode": mode, "dtype": dtype}
    # Short sequences take little time, of which the machine adds more or less.
    rounds = rounds if length >= 1024 else 5 * rounds
    for which, make in PASSES.items():
        pair = []
        for layer in (case.ours(dtype), case.theirs(dtype)):
            layer.build(x.shape, x.shape)
            pair.append(make(layer, compiles_torch, **call))
        row[which] = compare(pair, x, rounds)
    cost = analysis.cost(case.ours(dtype), tuple(x.shape), use_causal_mask=mode == "causal")
    row["multiply_adds"] = cost.multiply_adds
    row["share_of_matmul_rate"] = round(cost.multiply_adds / row["forward"]["seconds"] / rate, 3)
    return row


def report(rows):
    table = Table(title=f"Times over those of the other layer, on {keras.backend.backend()}")
    for column in ("member", "against", "mode", "dtype"):
        table.add_column(column)
    for column in ("tokens", *PASSES, "matmul rate"):
        table.add_column(column, justify="right")
    for row in rows:
        ratios = [f"{row[which]['ratio']:.2f}" for which in PASSES]
        names = [row[key] for key in ("member", "against", "mode", "dtype")]
        table.add_row(*names, f"{row['tokens']:,}", *ratios, f"{row['share_of_matmul_rate']:.0%}")
    Console(width=120).print(table)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 197, 1024, 2048, 4096])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["whole", "causal"])
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=["float32"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="torch.compile on torch")
    parser.add_argument("--against", choices=RIVALS, help="the layer that all are held against")
    parser.add_argument("--name", default="speed", help="of the file of results")
    parser.add_argument("--add", action="store_true", help="keep the other rows of that file")
    options = parser.parse_args(arguments)
    before = results.read_here(options.name).get("rows", []) if options.add else []
    rows = {_key(row): row for row in before}
    rate = matmul_rate()
    figures = {
        "multiply_adds_per_second": rate,
        "heads": HEADS,
        "depth": DEPTH,
        "torch_compiled": options.compile,
    }
    settings = [
        (name, mode, dtype)
        for name in options.members
        for mode in options.modes
        for dtype in options.dtypes
        if mode in CASES[name].modes
    ]
    for name, mode, dtype in track(settings, description="measuring"):
        check(name, mode, dtype)
        case = CASES[name]
        if options.against:
            case = dataclasses.replace(case, rival=options.against)
        for length in options.lengths:
            row = measure(name, case, length, mode, dtype, options.rounds, rate, options.compile)
            rows[_key(row)] = row
            # What there is, should a later one fail.
            results.write(options.name, {**figures, "rows": list(rows.values())})
    report(rows.values())


def _key(row):
    return tuple(row[name] for name in ("member", "against", "mode", "dtype", "tokens"))


if __name__ == "__main__":
    main()
