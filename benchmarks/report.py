"""Puts the figures of `benchmarks/results/` into the tables of `docs/cost.md`, and a plot.

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


def plot():
    """Seconds of a forward pass by length, one panel for each backend."""
    found = results.read("speed")
    figure = Figure(figsize=(4 * len(found), 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, (backend, report) in zip(panels, found.items()):
        lines = {}
        for row in report["rows"]:
            if row["mode"] == "whole":
                lines.setdefault(row["member"], {})[row["tokens"]] = row["forward"]["seconds"]
                if row["member"] == "softmax":
                    against = lines.setdefault("Keras's layer", {})
                    against[row["tokens"]] = row["forward"]["seconds_against"]
        for name, seconds in lines.items():
            style = "k--" if name == "Keras's layer" else "o-"
            panel.loglog(list(seconds), list(seconds.values()), style, label=name, markersize=3)
        panel.set_title(BACKENDS[backend])
        panel.set_xlabel("tokens")
    panels[0].set_ylabel("seconds, forward")
    panels[-1].legend(fontsize="small")
    figure.savefig(PAGE.parent / "images" / "speed.png", dpi=120)


def memory():
    """Peak memory of a training step, GiB."""
    rows = {}
    for backend, report in results.read("memory").items():
        for row in report["rows"]:
            key = row["member"], f"{row['tokens']:,}"
            peak, before = row["peak_gib"], row["before_gib"]
            rows.setdefault(key, {})[backend] = f"{peak:.1f} ({before:.1f})"
    cells = [
        [*key, *(by_backend.get(backend, "") for backend in BACKENDS)]
        for key, by_backend in rows.items()
    ]
    return table(["layer", "tokens", *BACKENDS.values()], cells)


def main():
    text = PAGE.read_text()
    gpu = speed("speed_gpu", has_dtype=True)
    for name, made in (("speed", speed()), ("gpu", gpu), ("memory", memory())):
        marked = rf"<!-- {name} -->\n.*?<!-- end -->"
        made = f"<!-- {name} -->\n{made}\n<!-- end -->"
        text = re.sub(marked, lambda _, made=made: made, text, flags=re.DOTALL)
    PAGE.write_text(text)
    plot()


if __name__ == "__main__":
    main()
