"""Runs the notebooks of the gallery, and renders them as pages.

A notebook is a script in jupytext's percent format: ``# %% [markdown]`` begins a cell of text and
``# %%`` a cell of code. Each runs in a new kernel, from the first cell to the last.
"""

from __future__ import annotations

import base64
import functools
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jupytext
import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "docs" / "gallery"
TIME_LIMIT = 300
"""Seconds that one cell may take."""


class Page(NamedTuple):
    """A notebook that has run.

    Attributes:
        markdown: The page.
        pictures: PNG images, by the file names that the page uses.
        notebook: The notebook with its results, as the text of an ``.ipynb`` file.
    """

    markdown: str
    pictures: dict[str, bytes]
    notebook: str


def render(path: Path) -> Page:
    """Run a notebook and return its page.

    The same text runs once in a process. So a server of the site runs a notebook again only if it
    has changed.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell raises an exception.
        ValueError: If a cell writes to stderr, for example a warning.
    """
    return _render(path.stem, path.read_text(encoding="utf-8"))


@functools.cache
def _render(stem: str, text: str) -> Page:
    notebook = jupytext.reads(text, fmt="py:percent")
    _run(notebook, stem)
    parts, pictures, title = [], {}, stem
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            title = next((line for line in cell.source.splitlines() if line[:1] == "#"), title)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            if png := output.get("data", {}).get("image/png"):
                name = f"{stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(png)
                parts.append(f"![{title.strip('# ')}]({name})")
            else:
                shown = output.text if output.output_type == "stream" else output.data["text/plain"]
                parts.append(f"``` {{ .text .output }}\n{shown.rstrip()}\n```")
    parts.append(f"Download this page as a [Jupyter notebook]({stem}.ipynb).")
    return Page("\n\n".join(parts) + "\n", pictures, nbformat.writes(notebook))


def _run(notebook: Any, stem: str) -> None:
    """Run all cells, on the CPU; the results are in the notebook then."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",  # the same page on every machine
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else the debugger, which is not used, warns
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    with tempfile.TemporaryDirectory() as folder:
        sockets = {"transport": "ipc", "ip": f"{folder}/kernel"}  # opens no port
        NotebookClient(
            notebook,
            timeout=TIME_LIMIT,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            config=Config(ConnectionFileMixin=sockets),
        ).execute(env=env)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise ValueError(
                    f"a cell of {stem} wrote to stderr: {output.text.strip()}\n{cell.source}"
                )
