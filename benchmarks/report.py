"""Puts the figures of `benchmarks/results/` into the tables of `docs/cost.md`, and plots.

python -m benchmarks.report
"""

import re
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import results

PAGE = Path(__file__).parent.parent / "docs" / "cost.md"
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def speed(name="speed", has_dtype=False):
    """Ratios of forward and training step, a row for each member, mode and length."""
    found, rows = results.read(name), {}
    for backend, report in found.items():
        for row in report["rows"]:
            mode = "" if row["mode"] == "whole" else f", {row['mode']}"
            dtype = f", {row['dtype']}" if has_dtype else ""
            key = f"{row['member']}{mode}{dtype}, against {row['against']}", row["tokens"]
            ratios = [f"{row[which]['ratio']:.2f}" for which in ("forward", "training step")]
            rows.setdefault(key, {})[backend] = " / ".join(ratios)
    backends = [backend for backend in BACKENDS if backend in found]
    cells = [
        [name, f"{tokens:,}", *(by_backend.get(backend, "") for backend in backends)]
        for (name, tokens), by_backend in rows.items()
    ]
    return table(["layer", "tokens", *(BACKENDS[backend] for backend in backends)], cells)


def scaling():
    """Time at the largest length and the exponent, a row for each layer and pass."""
    found, rows = results.read("scaling"), {}
    for backend, report in found.items():
        for name, passes in report["results"].items():
            for which, result in passes.items():
                length, seconds = list(result["seconds"].items())[-1]
                key = f"{name}, {int(length):,} tokens {which}"
                rows.setdefault(key, {})[backend] = f"{seconds:.2f} s, {result['exponent']:.2f}"
    return table(["layer", *BACKENDS.values()], _cells(rows))


def memory():
    """Peak memory of a training step, GiB."""
    rows = {}
    for backend, report in results.read("memory").items():
        for row in report["rows"]:
            peak, before = row["peak_gib"], row["before_gib"]
            key = _layer_of(row), f"{row['tokens']:,}"
            rows.setdefault(key, {})[backend] = f"{peak:.1f} ({before:.1f})"
    return table(["layer", "tokens", *BACKENDS.values()], _cells(rows))


def _layer_of(row):
    return "Keras's layer" if row["layer"] == "theirs" else row["member"]


def _cells(rows):
    """A line for each of `rows`, a dict from a name or names to figures by backend."""
    return [
        [*([key] if isinstance(key, str) else key), *(one.get(backend, "") for backend in BACKENDS)]
        for key, one in rows.items()
    ]


def plot_time():
    """Seconds of a forward pass by length."""
    lines = {}
    for backend, report in results.read("speed").items():
        for row in report["rows"]:
            if row["mode"] == "whole":
                line = lines.setdefault(backend, {}).setdefault(row["member"], {})
                line[row["tokens"]] = row["forward"]["seconds"]
                if row["member"] == "softmax":
                    against = lines[backend].setdefault("Keras's layer", {})
                    against[row["tokens"]] = row["forward"]["seconds_against"]
    _plot("speed.png", "seconds, forward", lines)


def plot_memory():
    """Peak memory of a training step by length, less what there is before."""
    lines = {}
    for backend, report in results.read("memory").items():
        for row in report["rows"]:
            line = lines.setdefault(backend, {}).setdefault(_layer_of(row), {})
            line[row["tokens"]] = row["peak_gib"] - row["before_gib"]
    _plot("memory.png", "GiB, training step", lines)


def _plot(name, label, by_backend):
    """A panel for each backend, a line for each layer."""
    figure = Figure(figsize=(4 * len(by_backend), 3.6), layout="constrained")
    panels = figure.subplots(1, len(by_backend), sharey=True, squeeze=False)[0]
    for panel, (backend, lines) in zip(panels, by_backend.items()):
        for layer, line in lines.items():
            style = "k--" if layer == "Keras's layer" else "o-"
            panel.loglog(list(line), list(line.values()), style, label=layer, markersize=3)
        panel.set_title(BACKENDS[backend])
        panel.set_xlabel("tokens")
    panels[0].set_ylabel(label)
    panels[-1].legend(fontsize="small")
    figure.savefig(PAGE.parent / "images" / name, dpi=120)


def main():
    text = PAGE.read_text()
    tables = {
        "scaling": scaling(),
        "speed": speed(),
        "epyc": speed("speed_epyc"),
        "padded": speed("speed_padded"),
        "bfloat16": speed("speed_bfloat16"),
        "compiled": speed("speed_compiled"),
        "gpu h200": speed("speed_gpu_h200", has_dtype=True),
        "gpu h100": speed("speed_gpu_h100", has_dtype=True),
        "gpu single": speed("speed_gpu_single", has_dtype=True),
        "memory": memory(),
    }
    for name, made in tables.items():
        marked = rf"<!-- {name} -->\n.*?<!-- end -->"
        made = f"<!-- {name} -->\n{made}\n<!-- end -->"
        text = re.sub(marked, lambda _, made=made: made, text, flags=re.DOTALL)
    PAGE.write_text(text)
    plot_time()
    plot_memory()


if __name__ == "__main__":
    main()
