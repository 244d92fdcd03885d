"""How the time of linear and sliding-window attention grows with the length.

Layers of 4 heads of 32 on one sequence, forward up to 131,072 tokens and with gradients
up to 32,768, compiled as a user would: jit on JAX and TensorFlow, eager on torch. The
exponent is the slope of log time over log length; 1 is linear.

    KERAS_BACKEND=jax python -m benchmarks.scaling
"""

import resource
import time

import keras
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import results
from benchmarks.compiled import forward_of, training_of
from keras_pdattn import layers

FORWARD = [4096, 8192, 16384, 32768, 65536, 131072]
TRAINING = [4096, 8192, 16384, 32768]
LAYERS = {
    "linear": (layers.LinearAttention, {}, False),
    "linear, causal": (layers.LinearAttention, {}, True),
    "sliding window of 64": (layers.SlidingWindowAttention, {"size": 64}, False),
    "sliding window of 64, causal": (layers.SlidingWindowAttention, {"size": 64}, True),
}


def seconds(function, x, repeats):
    """Median time of a call, the first not counted."""

    def call():
        first = keras.tree.flatten(function(x))[0]
        if not np.isfinite(keras.ops.convert_to_numpy(first[:, -1:])).all():
            raise ValueError(f"Not finite at {x.shape[1]} tokens.")

    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def exponent(times):
    """The slope of log time over log length."""
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0])


def measure(name, lengths, make):
    """Seconds by length, and the exponent."""
    cls, arguments, use_causal_mask = LAYERS[name]
    layer = cls(4, 32, **arguments)
    layer.build((None, None, 128), (None, None, 128))
    function = make(layer, use_causal_mask=use_causal_mask)
    times = {}
    for length in track(lengths, description=name):
        x = np.random.default_rng(0).normal(size=(1, length, 128)).astype("float32")
        repeats = 5 if length <= 32768 else 3
        times[length] = seconds(function, keras.ops.convert_to_tensor(x), repeats)
    return {"seconds": times, "exponent": round(exponent(times), 3)}


def main():
    rows = {
        name: {
            "forward": measure(name, FORWARD, forward_of),
            "forward and backward": measure(name, TRAINING, training_of),
        }
        for name in LAYERS
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    results.write("scaling", {"peak_memory_gib": round(peak, 2), "results": rows})
    table = Table(title=f"Seconds by length on {keras.backend.backend()}")
    table.add_column("layer")
    for length in FORWARD:
        table.add_column(f"{length:,}", justify="right")
    table.add_column("exponent", justify="right")
    for name, passes in rows.items():
        for which, result in passes.items():
            row = [f"{result['seconds'].get(length, np.nan):.3f}" for length in FORWARD]
            row = ["" if cell == "nan" else cell for cell in row]
            table.add_row(f"{name}, {which}", *row, f"{result['exponent']:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
