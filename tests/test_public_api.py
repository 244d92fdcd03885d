"""What the package shows: names, imports, and documentation that runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from members import slow_where_compiled

import keras_pdattn

ROOT = Path(keras_pdattn.__file__).parent
DOCUMENTED = [
    getattr(module, name)
    for module, names in (
        (keras_pdattn.layers, keras_pdattn.layers.__all__),
        (keras_pdattn.ops, keras_pdattn.ops.__all__),
        (
            keras_pdattn.duality,
            ["SupportVectorRegression", "dual_coefficients", "fit", "support_vectors"],
        ),
        (keras_pdattn.analysis, keras_pdattn.analysis.__all__),
        (keras_pdattn, ["Primal", "convert", "register_block"]),
        (keras_pdattn.distribution, ["layout_map"]),
        (
            keras_pdattn.feature_maps,
            ["FeatureMap", "Softmax", "Elu", "Relu", "Taylor", "PositiveRandom"],
        ),
        (keras_pdattn.transforms, ["Transform", "BatchNorm", "Conv1D", "Conv2D"]),
        (
            keras_pdattn.training_sets,
            ["TrainingSet", "AllKeys", "ScaledHeads", "SlidingWindow"],
        ),
    )
    for name in names
]


def test_names():
    assert set(keras_pdattn.__all__) == {
        "Primal",
        "analysis",
        "convert",
        "distribution",
        "duality",
        "feature_maps",
        "layers",
        "ops",
        "primals",
        "register_block",
        "training_sets",
        "transforms",
    }
    assert set(keras_pdattn.layers.__all__) == {
        "BatchNormAttention",
        "BatchNormScaledHeadAttention",
        "Conv1DAttention",
        "Conv2DAttention",
        "LinearAttention",
        "NormalizedFeatures",
        "PrimalDualAttention",
        "ScaledHeadAttention",
        "SlidingWindowAttention",
        "SupportVectorAttention",
        "TransformerDecoder",
        "TransformerEncoder",
    }


def test_importing_needs_keras_and_its_backend_only():
    script = (
        "import sys, keras; before = set(sys.modules); import keras_pdattn;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    imported = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"keras_hub", "keras_nlp", "sklearn", "matplotlib", "aeon", "rich", "pandas"}
    assert "keras_pdattn" in imported
    assert not heavy & set(imported)


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: file.name)
def test_sources(file):
    """Backends are imported in their own place; no axis by indexing with None (for LiteRT)."""
    source = file.read_text()
    imported = re.findall(r"^\s*(?:import|from) (torch|jax|tensorflow)\b", source, re.MULTILINE)
    own, _, suffix = file.stem.partition("_")
    assert set(imported) == ({own} if suffix == "native" else set())
    assert not re.search(r"\[[^\]\n]*(: *, *None|None *, *:)[^\]\n]*\]", source)


@pytest.mark.parametrize("thing", DOCUMENTED, ids=lambda thing: thing.__name__)
def test_documentation(thing):
    """Each public thing has an example that runs, and names its source."""
    text = thing.__doc__
    assert "arXiv:2406.13781" in text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        lines = [line[4:] if line.startswith("    ") else line for line in block.splitlines()]
        namespace = {}
        exec("\n".join(lines), namespace)
        for line in lines:  # `expression  # value` says what comes out.
            expression, comment, value = line.partition("  # ")
            if comment and value.startswith(("(", "True")) and "..." not in value:
                result = eval(expression.split(" = ")[-1], namespace)
                assert repr(tuple(result) if value.startswith("(") else result) == value


def test_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (ROOT.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 5
    exec("\n".join(blocks), {})


def test_start_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT.parent / "docs" / "index.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    exec("\n".join(blocks), {})


def test_duality_page_runs(tmp_path, monkeypatch, capsys):
    """And draws its figures, which the page shows."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT.parent / "docs" / "duality.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec("\n".join(blocks), {})
    assert float(re.search(r"accuracy (\S+)", capsys.readouterr().out).group(1)) > 0.85
    shown = re.findall(r"\(images/(.*?)\)", page)
    assert sorted(shown) == sorted(path.name for path in tmp_path.glob("*.png"))


def test_existing_models_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("keras_hub")
    monkeypatch.chdir(tmp_path)
    page = (ROOT.parent / "docs" / "existing_models.md").read_text()
    namespace = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), namespace)
    to_numpy = namespace["keras"].ops.convert_to_numpy
    for one, other in (("converted", "loaded"), ("theirs", "ours")):
        inputs = namespace["inputs" if one == "converted" else "x"]
        results = [namespace[name](inputs) for name in (one, other)]
        flat = [namespace["keras"].tree.flatten(result)[-1] for result in results]
        difference = to_numpy(flat[0]) - to_numpy(flat[1])
        assert abs(difference).max() < 1e-5
    assert to_numpy(namespace["generated"]["token_ids"]).shape == (1, 8)


def test_extending_page_runs():
    page = (ROOT.parent / "docs" / "extending.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})


@slow_where_compiled
def test_a_new_member_gets_everything_from_an_example():
    """`examples/new_member.py`: causal use, masks, scores, files under three backends.

    It goes through all of these by itself, whichever it begins with.
    """
    example = ROOT.parent / "examples" / "new_member.py"
    printed = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, check=True
    ).stdout
    differences = re.findall(r"(?:differs by|changes outputs by) (\S+)", printed)
    assert len(differences) == 5
    assert all(float(difference) < 1e-5 for difference in differences)
    assert "scores: (2, 4, 12, 12), rows sum to 1.0000 to 1.0000" in printed
    definition = re.search(r"@keras.saving.*?\n\n\n", example.read_text(), re.DOTALL).group()
    assert len(definition.splitlines()) < 30
