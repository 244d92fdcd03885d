"""Classifies speakers by their vowels with softmax, Attention-BN, Attention-SH and BN+SH.

Trains the same small transformer four times on JapaneseVowels (UEA archive, 12 channels, series
of 7 to 29 steps, 9 speakers), saves each model, reloads it in fresh processes under the other
backends, and draws learning curves and attention maps.

    KERAS_BACKEND=jax python examples/japanese_vowels.py
    PRIMAL=linear python examples/japanese_vowels.py
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib
import numpy as np
from aeon.datasets import load_japanese_vowels
from keras import layers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import keras_pdattn
from keras_pdattn import analysis, primals, training_sets

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BACKENDS = ("tensorflow", "jax", "torch")
PRIMALS = {
    "softmax": "softmax",
    "linear": "linear",
    "sliding_window": "sliding window",
    "conv1d": "Attention-Conv1D",
    "batch_norm": "Attention-BN",
    "scaled_head": "Attention-SH",
    "batch_norm_scaled_head": "Attention-BN+SH",
}
COMPARED = ("softmax", "batch_norm", "scaled_head", "batch_norm_scaled_head")
LONGEST = 29
#: What suits series of 7 to 29 steps. Scales of 4 or 8 would leave a head with an example
#: or two: too few to normalise.
TRAINING_SETS = {
    training_sets.ScaledHeads: training_sets.ScaledHeads(scales=(1, 2)),
    training_sets.SlidingWindow: training_sets.SlidingWindow(size=4),
}
console = Console(width=110)


def load(split):
    """Series padded with zeros behind, `(series, steps, channels)`, and speakers `0` to `8`."""
    series, speakers = load_japanese_vowels(split=split)
    padded = np.zeros((len(series), LONGEST, 12), "float32")
    for row, one in zip(padded, series):
        row[: one.shape[1]] = one.T
    return padded, speakers.astype("int32") - 1


def choose(name):
    """The primal problem of that name, its training set suited to the length of the series."""
    primal = primals.get(name)
    training_set = TRAINING_SETS.get(type(primal.training_set), primal.training_set)
    return dataclasses.replace(primal, training_set=training_set)


def build(name, width=64, num_heads=8, num_blocks=2):
    """A transformer encoder whose attention solves that primal problem, padding masked."""
    inputs = keras.Input((None, 12))
    x = layers.Masking()(inputs)
    x = layers.Dense(width)(x)
    for block in range(num_blocks):
        attention = keras_pdattn.layers.PrimalDualAttention(
            num_heads,
            width // num_heads,
            primal=choose(name),
            dropout=0.1,
            name=f"attention_{block}",
        )
        normal = layers.LayerNormalization()(x)
        x = x + attention(normal, normal)
        normal = layers.LayerNormalization()(x)
        hidden = layers.Dropout(0.1)(layers.Dense(2 * width, activation="gelu")(normal))
        x = x + layers.Dense(width)(hidden)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(9, activation="softmax")(x), name=name)


class Advance(keras.callbacks.Callback):
    """Moves a progress bar on by one each epoch, and times the epochs."""

    def __init__(self, progress, task):
        super().__init__()
        self.progress, self.task, self.seconds = progress, task, []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)
        self.progress.update(self.task, advance=1, accuracy=f"{logs['val_accuracy']:.3f}")


def train(primal, train_data, test_data, epochs, progress):
    """Trains one model; returns it, its history and the median seconds per epoch."""
    keras.utils.set_random_seed(0)
    model = build(primal)
    model.compile(
        keras.optimizers.AdamW(2e-3, weight_decay=1e-2),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    task = progress.add_task(PRIMALS.get(primal, primal), total=epochs, accuracy="")
    advance = Advance(progress, task)
    history = model.fit(
        *train_data,
        batch_size=30,
        epochs=epochs,
        validation_data=test_data,
        callbacks=[advance],
        verbose=0,
    )
    return model, history.history, float(np.median(advance.seconds))


def reload_elsewhere(folder, names, x):
    """Predicts with the saved models in a fresh process for each other backend.

    Returns:
        Dict from a primal and a backend to the largest difference of a probability.
    """
    np.save(folder / "inputs.npy", x)
    processes = {}
    for backend in BACKENDS:
        if backend != keras.backend.backend():
            command = [sys.executable, __file__, "--predict", str(folder), *names]
            environment = {**os.environ, "KERAS_BACKEND": backend}
            processes[backend] = subprocess.Popen(command, env=environment)
    differences = {}
    for backend, process in processes.items():
        if process.wait() != 0:
            raise RuntimeError(f"Reloading under {backend} failed.")
        for primal in names:
            here, there = (
                np.load(folder / f"{primal}.{name}.npy")
                for name in (keras.backend.backend(), backend)
            )
            differences[primal, backend] = float(np.abs(here - there).max())
    return differences


def predict(folder, names):
    """Loads saved models under this backend and writes their predictions beside them."""
    x = np.load(folder / "inputs.npy")
    for primal in names:
        model = keras.saving.load_model(folder / f"{primal}.keras")
        # Called, as `predict` would compile what runs once.
        predictions = keras.ops.convert_to_numpy(model(x))
        np.save(folder / f"{primal}.{keras.backend.backend()}.npy", predictions)


def draw(path, histories, maps, lengths):
    """Learning curves above, the attention of four heads for one test series below."""
    heads = (0, 2, 5, 7)
    figure = plt.figure(figsize=(11, 4 + 2.3 * len(maps)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[4, 2.3 * len(maps)])
    axes = top.subplots(1, 2)
    for primal, history in histories.items():
        label = PRIMALS.get(primal, primal)
        epochs = np.arange(1, len(history["loss"]) + 1)
        axes[0].plot(epochs, history["loss"], label=label)
        axes[1].plot(epochs, history["val_accuracy"], label=label)
    axes[0].set(title="Training loss", xlabel="epoch", yscale="log")
    axes[1].set(title="Test accuracy", xlabel="epoch", ylim=(0.5, 1.005))
    axes[1].legend(frameon=False, loc="lower right")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    grid = bottom.subplots(len(maps), len(heads), squeeze=False)
    for row, (primal, scores) in zip(grid, maps.items()):
        for axis, head in zip(row, heads):
            shown = scores[head, :lengths, :lengths]
            axis.imshow(shown, cmap="magma", vmin=0, aspect="auto")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(PRIMALS.get(primal, primal))
    for axis, head in zip(grid[0], heads):
        axis.set_title(f"head {head + 1}")
    bottom.suptitle("Attention of one test series (query down, key across, first block)")
    figure.savefig(path, dpi=110)


def report(results):
    """Prints the table."""
    table = Table(title=f"JapaneseVowels on {keras.backend.backend()}")
    table.add_column("attention", no_wrap=True)
    for column in ("test accuracy", "parameters", "s / epoch", "head distance"):
        table.add_column(column, justify="right")
    table.add_column("reloaded", no_wrap=True)
    for primal, result in results.items():
        table.add_row(
            PRIMALS.get(primal, primal),
            f"{result['accuracy']:.3f}",
            f"{result['parameters']:,}",
            f"{result['seconds_per_epoch']:.2f}",
            f"{result['head_distance']:.3f}",
            "\n".join(f"{name} {d:.0e}" for name, d in result["differences"].items()),
        )
    console.print(table)
    console.print(
        "head distance: mean distance between two heads' scores, larger is less redundant; "
        "reloaded: largest difference of a probability under the other backends"
    )


def main(folder, names, epochs):
    folder.mkdir(parents=True, exist_ok=True)
    train_data, test_data = load("train"), load("test")
    mask = np.any(test_data[0] != 0, axis=-1)
    histories, maps, results = {}, {}, {}
    progress = Progress(
        TextColumn("{task.description:16}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} epochs, test accuracy {task.fields[accuracy]}"),
        TimeRemainingColumn(),
        console=console,
    )
    with progress:
        for primal in names:
            model, history, seconds = train(primal, train_data, test_data, epochs, progress)
            scores = analysis.attention_scores(model, test_data[0])["attention_0"]
            histories[primal], maps[primal] = history, scores[0]
            results[primal] = {
                "accuracy": history["val_accuracy"][-1],
                "parameters": model.count_params(),
                "seconds_per_epoch": seconds,
                "head_distance": analysis.head_redundancy(scores, mask).distance,
            }
            model.save(folder / f"{primal}.keras")
            predictions = model.predict(test_data[0], verbose=0)
            np.save(folder / f"{primal}.{keras.backend.backend()}.npy", predictions)
    with console.status("Reloading the models under the other backends"):
        differences = reload_elsewhere(folder, names, test_data[0])
    for (primal, backend), difference in differences.items():
        results[primal].setdefault("differences", {})[backend] = difference
    report(results)
    draw(folder / "japanese_vowels.png", histories, maps, lengths=int(mask[0].sum()))
    (folder / "japanese_vowels.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"Models, figure and numbers are in {folder}/")
    worst = max(differences.values())
    # Trained heads of Attention-BN have scores of 100, on which float32 rounds by 1e-5
    # before the softmax: each backend is that far from a computation in float64.
    if worst > 1e-4:
        sys.exit(f"A reloaded model differs by {worst:.1e}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chosen = os.environ.get("PRIMAL")
    parser.add_argument("names", nargs="*", default=[chosen] if chosen else list(COMPARED))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("outputs"))
    parser.add_argument("--predict", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in arguments.names:
        # Says which names there are, and that a series is no grid.
        primals.get(name).check_call(num_axes=1)
    if arguments.predict:
        predict(arguments.predict, arguments.names)
    else:
        main(arguments.folder, arguments.names, arguments.epochs)
