"""Draws the figures of pages by running their code, before the site is built."""

import contextlib
import os
import re
from pathlib import Path


def on_pre_build(config):
    """Runs the code of pages whose images are made by it, in the folder of images."""
    images = Path(config["docs_dir"]) / "images"
    images.mkdir(exist_ok=True)
    page = Path(config["docs_dir"]) / "duality.md"
    text = page.read_text()
    shown = [images / name for name in re.findall(r"\(images/(.*?)\)", text)]
    if all(one.exists() and one.stat().st_mtime > page.stat().st_mtime for one in shown):
        return  # `mkdocs serve` watches this folder, too.
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    before = Path.cwd()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            os.chdir(images)
            exec("\n".join(blocks), {})
        finally:
            os.chdir(before)
