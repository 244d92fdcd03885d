"""Peak memory and time of one call of a layer, each in a process of its own.

The peak is that of the whole process, of which importing Keras and its backend and building the
layer take what `before` says.

    KERAS_BACKEND=jax python -m benchmarks.memory --lengths 8192 32768 --members softmax
"""

import argparse
import json
import resource
import subprocess
import sys
import time

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import results

MEMBERS = ("softmax", "Attention-BN", "Attention-SH", "linear", "window of 64")
LAYERS = ("ours", "theirs")


def peak():
    """The most memory this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_here(name, layer, length, mode, which):
    """Calls a layer once in this process."""
    from benchmarks import cases, compiled

    case, x = cases.CASES[name], cases.inputs(length)
    layer = getattr(case, layer)()
    layer.build(x.shape, x.shape)
    function = compiled.PASSES[which](layer, **cases.call_of(mode, length))
    before, start = peak(), time.perf_counter()
    compiled.wait(function(x))
    return {
        "peak_gib": round(peak(), 3),
        "before_gib": round(before, 3),
        "seconds_with_compilation": round(time.perf_counter() - start, 2),
    }


def measure(name, layer, length, mode, which):
    """Calls it in a process of its own; `None` where that died, of too little memory."""
    arguments = json.dumps([name, layer, length, mode, which])
    command = [sys.executable, "-m", "benchmarks.memory", "--here", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", nargs="+", default=MEMBERS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--modes", nargs="+", default=["whole"])
    parser.add_argument("--passes", nargs="+", default=["training step"])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["ours"])
    parser.add_argument("--here", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(measure_here(*options.here)))
        return
    settings = [
        dict(zip(("member", "layer", "tokens", "mode", "pass"), setting))
        for setting in [
            (name, layer, length, mode, which)
            for name in options.members
            for layer in options.layers
            for length in options.lengths
            for mode in options.modes
            for which in options.passes
        ]
    ]
    rows = [
        {**setting, **(measure(*setting.values()) or {"peak_gib": None})}
        for setting in track(settings, description="measuring memory")
    ]
    results.write("memory", {"rows": rows})
    table = Table(title="Peak memory, GiB")
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
