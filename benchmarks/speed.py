"""Whole layers against `keras.layers.MultiHeadAttention`, in one process, runs interleaved.

Layers of 8 heads of 32 on one sequence of width 256, forward and training step, compiled as a
user would. A ratio is the median of our times over the median of theirs. Before a layer is
timed its output is held to the oracle of the tests, on a short sequence: a wrong one stops the run.

    KERAS_BACKEND=jax python -m benchmarks.speed --lengths 2048 4096 --members softmax
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import keras
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine
from benchmarks.compiled import forward_of, training_of
from keras_pdattn import analysis, layers

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import reference

RESULTS = Path(__file__).parent / "results"
HEADS, DEPTH = 8, 32
WIDTH = HEADS * DEPTH
#: The length at which outputs are held to the oracle, which loops over queries.
CHECKED_LENGTH = 67
PASSES = {"forward": forward_of, "training step": training_of}
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer of ours, what the oracle is told of it, and the layer it is measured against."""

    primal: str
    oracle: reference.Primal
    rival: str = "Keras"
    rival_arguments: dict = dataclasses.field(default_factory=dict)


CASES = {
    "softmax": Case("softmax", reference.Primal()),
    "Attention-BN": Case(
        "batch_norm", reference.Primal(transforms=(reference.BatchNorm(),)), "our softmax"
    ),
    "Attention-SH": Case("scaled_head", reference.Primal(scales=(1, 2, 4, 8)), "our softmax"),
    "Attention-BN+SH": Case(
        "batch_norm_scaled_head",
        reference.Primal(transforms=(reference.BatchNorm(),), scales=(1, 2, 4, 8)),
        "our softmax",
    ),
    "linear": Case("linear", reference.Primal(reference.elu_kernel)),
    "window of 64": Case(
        "sliding_window",
        reference.Primal(window=(64, 1, 0)),
        rival_arguments={"sliding_window": 64},
    ),
    # A fresh kernel is the identity.
    "Attention-Conv1D": Case("conv1d", reference.Primal()),
}


def ours(primal, dtype):
    return layers.PrimalDualAttention(HEADS, DEPTH, primal=primal, dtype=dtype)


def rival_of(case, dtype):
    if case.rival == "our softmax":
        return ours("softmax", dtype)
    return keras.layers.MultiHeadAttention(HEADS, DEPTH, dtype=dtype, **case.rival_arguments)


def call_of(mode, length):
    """The call arguments of a mode: a causal mask, or an eighth of padding behind."""
    if mode == "causal":
        return {"use_causal_mask": True}
    if mode == "padded":
        mask = keras.ops.expand_dims(keras.ops.arange(length) < length - length // 8, axis=0)
        return {"query_mask": mask, "value_mask": mask}
    return {}


def inputs(length, dtype):
    x = np.random.default_rng(0).normal(size=(1, length, WIDTH))
    return keras.ops.cast(keras.ops.convert_to_tensor(x.astype("float32")), dtype)


def check(name, case, mode, dtype):
    """Raises unless the layer gives what the oracle does."""
    layer, x = ours(case.primal, dtype), inputs(CHECKED_LENGTH, dtype)
    output = layer(x, x, **call_of(mode, CHECKED_LENGTH))
    exact = as_float64(x)
    kernels = {
        kind: [as_float64(w) for w in getattr(layer, f"{kind}_dense").weights]
        for kind in ("query", "key", "value", "output")
    }
    projected = [
        np.einsum("btc,chd->bthd", exact, kernels[kind][0]) + kernels[kind][1]
        for kind in ("query", "key", "value")
    ]
    options = {"is_causal": mode == "causal"}
    if mode == "padded":
        mask = keras.ops.convert_to_numpy(call_of(mode, CHECKED_LENGTH)["value_mask"])
        options.update(key_mask=mask, query_mask=mask)
    expected, _ = reference.attention(*projected, case.oracle, **options)
    expected = np.einsum("bthd,hdc->btc", expected, kernels["output"][0]) + kernels["output"][1]
    error = np.abs(as_float64(output) - expected).max()
    if not error <= TOLERANCE[dtype]:
        raise ValueError(
            f"{name}, {mode}, {dtype}: {error:.1e} from the oracle. Nothing to report."
        )


def as_float64(x):
    return keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")).astype("float64")


def times(functions, x, rounds):
    """Seconds of each call of each of `functions`, in turn; the first calls are not counted."""
    for function in functions:
        wait(function(x))
    found = [[] for _ in functions]
    for _ in range(rounds):
        for seconds, function in zip(found, functions):
            start = time.perf_counter()
            wait(function(x))
            seconds.append(time.perf_counter() - start)
    return found


def wait(result):
    """Returns when `result` is there, which JAX promises only."""
    keras.ops.convert_to_numpy(keras.ops.cast(result[:, -1:], "float32"))


def matmul_rate(size=2048):
    """Multiply-adds a second of a large float32 matrix product on this machine."""
    x = inputs(size, "float32")[0] @ keras.ops.transpose(inputs(size, "float32")[0])
    x = keras.ops.expand_dims(x, axis=0)
    layer = keras.layers.Dense(size, use_bias=False)
    layer.build(x.shape)
    (seconds,) = times([lambda x: layer(x)], x, 5)
    return size**3 / float(np.median(seconds))


def measure(name, length, mode, dtype, rounds, rate):
    """One row of the report: ratios, spreads and the achieved share of the matmul rate."""
    case, x, call = CASES[name], inputs(length, dtype), call_of(mode, length)
    row = {
        "member": name,
        "against": case.rival,
        "tokens": length,
        "mode": mode,
        "dtype": dtype,
    }
    for which, make in PASSES.items():
        pair = []
        for layer in (ours(case.primal, dtype), rival_of(case, dtype)):
            layer.build(x.shape, x.shape)
            pair.append(make(layer, **call))
        mine, theirs = (np.array(seconds) for seconds in times(pair, x, rounds))
        row[which] = {
            "ratio": round(float(np.median(mine) / np.median(theirs)), 3),
            "seconds": float(np.median(mine)),
            "seconds_against": float(np.median(theirs)),
            "spread": [round(float(x), 3) for x in np.quantile(mine / np.median(mine), [0.1, 0.9])],
        }
    cost = analysis.cost(ours(case.primal, dtype), tuple(x.shape), use_causal_mask=mode == "causal")
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
    parser.add_argument(
        "--modes", nargs="+", choices=("whole", "causal", "padded"), default=["whole", "causal"]
    )
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=["float32"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    rate, rows = matmul_rate(), []
    settings = [
        (name, mode, dtype)
        for name in options.members
        for mode in options.modes
        for dtype in options.dtypes
    ]
    for setting in track(settings, description="measuring"):
        name, mode, dtype = setting
        check(name, CASES[name], mode, dtype)
        for length in options.lengths:
            rows.append(measure(name, length, mode, dtype, options.rounds, rate))
    results = {
        "machine": machine.describe(),
        "multiply_adds_per_second": rate,
        "heads": HEADS,
        "depth": DEPTH,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"speed_{keras.backend.backend()}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    report(rows)


if __name__ == "__main__":
    main()
