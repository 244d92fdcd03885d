"""Puts the figures of `benchmarks/results/` into the tables of `docs/cost.md`.

python -m benchmarks.report
"""

import re
from pathlib import Path

from benchmarks import results

PAGE = Path(__file__).parent.parent / "docs" / "cost.md"
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def speed():
    """Ratios of forward and training step, a row for each member, mode and length."""
    found, rows = results.read("speed"), {}
    for backend, report in found.items():
        for row in report["rows"]:
            mode = "" if row["mode"] == "whole" else f", {row['mode']}"
            key = f"{row['member']}{mode}, against {row['against']}", f"{row['tokens']:,}"
            ratios = [f"{row[which]['ratio']:.2f}" for which in ("forward", "training step")]
            rows.setdefault(key, {})[backend] = " / ".join(ratios)
    cells = [
        [*key, *(by_backend.get(backend, "") for backend in BACKENDS)]
        for key, by_backend in rows.items()
    ]
    return table(["layer", "tokens", *BACKENDS.values()], cells)


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
    for name, made in (("speed", speed()), ("memory", memory())):
        marked = rf"<!-- {name} -->\n.*?<!-- end -->"
        made = f"<!-- {name} -->\n{made}\n<!-- end -->"
        text = re.sub(marked, lambda _, made=made: made, text, flags=re.DOTALL)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
