"""The notebooks of the gallery run without an error or a warning, and show results."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from nbclient.exceptions import CellExecutionError

SITE = Path(__file__).parent.parent / "docs" / "site"
SPEC = importlib.util.spec_from_file_location("notebooks", SITE / "notebooks.py")
notebooks = sys.modules["notebooks"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(notebooks)
NOTEBOOKS = sorted(notebooks.GALLERY.glob("*.py"))


def rendered(tmp_path, *cells):
    path = tmp_path / "cells.py"
    path.write_text("\n\n".join(f"# %%{cell}" for cell in cells), encoding="utf-8")
    return notebooks.render(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path):
    page = notebooks.render(path)
    assert page.markdown.startswith("# ")
    assert len(page.pictures) >= 2
    assert "{ .text .output }" in page.markdown
    assert all(name in page.markdown for name in page.pictures)
    assert all(picture.startswith(b"\x89PNG") for picture in page.pictures.values())
    assert json.loads(page.notebook)["nbformat"] == 4


def test_the_navigation_has_every_notebook():
    listed = re.findall(
        r": docs/(gallery/\w+\.py)$", (SITE.parent / "mkdocs.yml").read_text(), re.M
    )
    assert len(NOTEBOOKS) == 4
    assert sorted(listed) == [f"gallery/{path.name}" for path in NOTEBOOKS]
    index = (SITE.parent / "index.md").read_text("utf-8")
    assert all(f"({name})" in index for name in listed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_step_is_explained_in_few_sentences(path):
    text = path.read_text("utf-8")
    assert text.startswith("# %% [markdown]\n# # ")
    assert max(len(line) for line in text.splitlines()) <= 100
    for cell in re.findall(r"^# %% \[markdown\]\n((?:#.*\n)*)", text, re.M):
        words = re.sub(r"\$\$.*?\$\$", "", cell, flags=re.S).split()
        assert len(words) < 110, cell


def test_a_cell_and_its_results_become_a_page(tmp_path):
    page = rendered(tmp_path, " [markdown]\n# # A title", "\nprint('seen')\n6 * 7")
    code = "```python\nprint('seen')\n6 * 7\n```"
    results = "``` { .text .output }\nseen\n```\n\n``` { .text .output }\n42\n```"
    assert page.markdown.startswith(f"# A title\n\n{code}\n\n{results}\n\n")


def test_an_error_or_a_warning_ends_the_build(tmp_path):
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        rendered(tmp_path, "\n1 / 0")
    with pytest.raises(ValueError, match=r"cells wrote to stderr: .*UserWarning: beware"):
        rendered(tmp_path, "\nimport warnings\nwarnings.warn('beware')")
