"""`python -m keras_pdattn inspect`: what it prints is what the functions return."""

import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_pdattn import Primal, analysis, cli, duality, layers


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model with layers of ours and Keras's, padded data for it, and wide enough a screen."""
    monkeypatch.setenv("COLUMNS", "200")
    inputs = keras.Input((None, 12))
    masked = keras.layers.Masking()(inputs)
    x = layers.BatchNormAttention(4, 3, name="normal")(masked, masked)
    x = layers.PrimalDualAttention(4, 3, primal=Primal("elu", "batch_norm"), name="own")(x, x)
    x = layers.ScaledHeadAttention(4, 3, scales=(1, 2), name="causal")(x, x, use_causal_mask=True)
    x = layers.LinearAttention(1, 3, name="one")(x, x)
    x = keras.layers.MultiHeadAttention(2, 3, name="theirs")(x, x)
    model = keras.Model(inputs, x, name="stack")
    model.save(tmp_path / "model.keras")
    data = np.random.default_rng(0).normal(size=(40, 9, 12)).astype("float32")
    data[1::2, 6:] = 0
    np.save(tmp_path / "data.npy", data)
    return tmp_path, model, data


def test_inspect(saved, capsys):
    folder, model, data = saved
    cli.main(["inspect", str(folder / "model.keras"), "--data", str(folder / "data.npy")])
    printed = capsys.readouterr().out
    rows = {
        cells[0]: cells[1:]
        for cells in (
            [cell.strip() for cell in line.split("│")[1:-1]]
            for line in printed.splitlines()
            if line.startswith("│")
        )
        if cells[0]
    }
    assert list(rows) == ["normal", "own", "causal", "one", "theirs"]
    assert rows["normal"][0] == "batch_norm"
    assert rows["own"][0].startswith("Primal(feature_map=Elu()")
    assert rows["theirs"][0] == "softmax (Keras)"
    assert all(row[1] == "9 x 9" for row in rows.values())
    cost = analysis.cost(model, (1, 9, 12)).layers[0]
    heads, total = rows["normal"][2].split(" / ")
    assert float(heads.split()[0]) == round(cost.attention / 1000, 2)
    assert float(total.split()[0]) == float(f"{cost.multiply_adds / 1000:.3g}")
    scores = analysis.attention_scores(model, data[:32])["normal"]
    redundancy = analysis.head_redundancy(scores, (data[:32] != 0).any(axis=-1))
    assert rows["normal"][4] == f"{redundancy.distance:.3f}"
    assert rows["normal"][5] == f"{redundancy.cosine_similarity:.3f}"
    assert rows["normal"][6] == f"{redundancy.cka:.3f}"
    vectors = duality.support_vectors(model.get_layer("normal"), keras.layers.Masking()(data[:32]))
    assert rows["normal"][7] == f"{vectors.share.mean():.1%}"
    assert rows["causal"][7] == rows["theirs"][7] == "-"
    assert rows["one"][4:7] == ["-"] * 3 and rows["one"][7].endswith("%")


def test_inspect_as_a_command(saved):
    folder, _, data = saved
    np.savez(folder / "data.npz", data)
    command = [sys.executable, "-m", "keras_pdattn", "inspect", str(folder / "model.keras")]
    options = ["--data", str(folder / "data.npz"), "--samples", "2", "--lengths", "64", "128"]
    printed = subprocess.run(command + options, capture_output=True, text=True, check=True).stdout
    assert "Attention of stack" in printed
    assert "Cost of attention" in printed and " 128 " in printed


def test_inspect_several_inputs_and_free_axes(tmp_path, monkeypatch, capsys):
    """Arrays by name; heads over some axes of images, and with a regression for each query."""
    monkeypatch.setenv("COLUMNS", "200")
    first, second = keras.Input((3, 4, 12), name="first"), keras.Input((3, 4, 12), name="second")
    rows = layers.PrimalDualAttention(2, 3, attention_axes=2, name="rows")(first, second)
    model = keras.Model({"first": first, "second": second}, rows)
    model.save(tmp_path / "model.keras")
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=(5, 3, 4, 12)).astype("float32") for name in ("first", "second")
    }
    np.savez(tmp_path / "data.npz", **arrays)
    cli.main(["inspect", str(tmp_path / "model.keras"), "--data", str(tmp_path / "data.npz")])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ rows")]
    assert row.split("│")[3].strip() == "4 x 4"
    assert row.split("│")[6].strip() == "-" and "%" in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.keras", "--data", "data.npy"], "There is no such file. Received: .*no.keras"),
        (["model.keras", "--data", "no.npy"], "There is no such file. Received: .*no.npy"),
        (["model.keras", "--data", "model.keras"], "python -m keras_pdattn: "),
        (["data.npy", "--data", "data.npy"], "python -m keras_pdattn: "),
        (["model.keras", "--data", "empty.npz"], "with a batch axis. Received: empty.npz"),
    ],
)
def test_what_cannot_be_inspected(saved, monkeypatch, arguments, message):
    monkeypatch.chdir(saved[0])
    np.savez("empty.npz")
    with pytest.raises(SystemExit, match=message):
        cli.main(["inspect", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["inspect"],
        ["inspect", "m", "--data", "d", "--samples", "0"],
        ["inspect", "m", "--data", "d", "--tolerance", "5"],
    ],
)
def test_usage(arguments):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2


def test_a_table_over_lengths():
    layer = layers.PrimalDualAttention(2, 3)
    table = analysis.cost_table(layer, (1, 5, 12), [100, 200], use_causal_mask=True)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["100", "200"]
    assert columns[1] == ["120 k", "480 k"]
    assert columns[2] == ["", "4.00"]
    linear = analysis.cost_table(layers.LinearAttention(2, 3), (1, 5, 12), [1000, 2000])
    assert list(linear.columns[2].cells) == ["", "2.00"]
    both = analysis.cost_table(layer, [(1, 5, 12), (1, 5, 12)], [100])
    assert list(both.columns[1].cells) == ["120 k"]
