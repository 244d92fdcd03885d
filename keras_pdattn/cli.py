"""The command line: `python -m keras_pdattn inspect model.keras --data inputs.npy`."""

import argparse
import sys
from pathlib import Path

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from keras_pdattn import analysis, duality, primals
from keras_pdattn.analysis.calls import attention_calls
from keras_pdattn.analysis.tables import readable
from keras_pdattn.duality.problem import NoRegressionError
from keras_pdattn.layers import PrimalDualAttention


def main(arguments=None):
    """Runs the command that `arguments`, those of the process if `None`, name."""
    parser = argparse.ArgumentParser(prog="python -m keras_pdattn", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect", help="describe the attention layers of a saved model", description=_INSPECT
    )
    inspect.add_argument("model", type=Path, help="a .keras file")
    inspect.add_argument(
        "--data",
        type=Path,
        required=True,
        help="inputs: an array as .npy, or several as .npz, named as the model names its inputs",
    )
    inspect.add_argument(
        "--samples", type=_count, default=32, help="how many sequences to run on (default: 32)"
    )
    inspect.add_argument(
        "--tolerance",
        type=_share,
        default=1e-3,
        help="share of a head's largest coefficient below which a key is no support vector "
        "(default: 0.001)",
    )
    inspect.add_argument(
        "--lengths", type=_count, nargs="+", default=(), help="also count the cost at these lengths"
    )
    options = parser.parse_args(arguments)
    try:
        _inspect(**vars(options))
    except (OSError, TypeError, ValueError) as error:  # What Keras raises for a bad file.
        sys.exit(f"{parser.prog}: {error}")


_INSPECT = (
    "Loads a model, runs it on data, and prints a row for each call of an attention layer: its "
    "primal problem, what it costs for one sequence, how much its heads repeat each other, and "
    "which share of the keys are their support vectors."
)


def _count(text):
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {count}")
    return count


def _share(text):
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), not {share}")
    return share


def _inspect(model, data, samples, tolerance, lengths):
    for path in (model, data):
        if not path.is_file():
            raise ValueError(f"There is no such file. Received: {path}")
    model, inputs = keras.saving.load_model(model), _load(data, samples)
    shape = _shape_of_one(inputs)
    console = Console()
    console.print(_table_of_layers(model, inputs, analysis.cost(model, shape), tolerance))
    console.print(_LEGEND, style="dim")
    if lengths:
        console.print(analysis.cost_table(model, shape, lengths))


_LEGEND = (
    "Multiply-adds, of the heads and with projections, and bytes: for one sequence. Distance, "
    "cosine and CKA: between two heads; a large distance means little redundancy. Support vectors: "
    "mean share of keys with a dual coefficient; none where queries see different keys, as under a "
    "causal or attention mask, or where the layer is Keras's."
)


def _load(path, samples):
    """The first `samples` sequences of the arrays in a file."""
    arrays = np.load(path, allow_pickle=False)
    arrays = (
        {"": arrays}
        if isinstance(arrays, np.ndarray)
        else {name: arrays[name] for name in arrays.files}
    )
    are_batches = [isinstance(array, np.ndarray) and array.ndim for array in arrays.values()]
    if not arrays or not all(are_batches):
        raise ValueError(
            f"The data must be a .npy or .npz file of arrays with a batch axis. Received: {path}"
        )
    arrays = {name: array[:samples] for name, array in arrays.items()}
    return arrays if len(arrays) > 1 else next(iter(arrays.values()))


def _shape_of_one(inputs):
    """The shape of one sequence of `inputs`."""
    if isinstance(inputs, dict):
        return {name: _shape_of_one(array) for name, array in inputs.items()}
    return (1, *inputs.shape[1:])


def _table_of_layers(model, inputs, cost, tolerance):
    table = Table(title=f"Attention of {model.name}")
    table.add_column("layer", overflow="fold")
    table.add_column("primal", overflow="fold")
    columns = ("queries x keys", "multiply-adds", "bytes", "distance", "cosine", "CKA", "support")
    for column in columns:
        table.add_column(column, justify="right")
    # Of Keras's other attention layers no cost is counted.
    calls = attention_calls(model, inputs)
    calls = [call for call in calls if isinstance(call.layer, keras.layers.MultiHeadAttention)]
    for call, its_cost in zip(calls, cost.layers, strict=True):
        table.add_row(
            call.layer.path,
            _name(call.layer),
            f"{its_cost.queries} x {its_cost.keys}",
            f"{readable(its_cost.attention)} / {readable(its_cost.multiply_adds)}",
            readable(its_cost.activation_bytes),
            *_redundancy(call),
            _support(call, tolerance),
        )
    return table


def _name(layer):
    """The primal problem of a layer by its name, or written out."""
    if not isinstance(layer, PrimalDualAttention):
        return "softmax (Keras)"
    return primals.name_of(layer.primal) or repr(layer.primal)


def _redundancy(call):
    has_free_axes = len(call.arguments["query"].shape) - 2 > len(call.layer.attention_axes)
    if call.layer.num_heads < 2 or has_free_axes:
        return ["-"] * 3
    found = analysis.head_redundancy(call.scores, call.arguments["query_mask"])
    return [f"{x:.3f}" for x in (found.distance, found.cosine_similarity, found.cka)]


def _support(call, tolerance):
    if not isinstance(call.layer, PrimalDualAttention):
        return "-"
    try:
        vectors = duality.support_vectors(call.layer, call.arguments, tolerance)
    except NoRegressionError:
        return "-"
    return f"{vectors.share.mean():.1%}"
