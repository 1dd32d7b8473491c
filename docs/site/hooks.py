"""Adds the repository's pages and notebooks to the site, at the paths that their links expect.

MkDocs cannot read the folder of its own configuration. So this hook adds the pages one by one. Each
keeps its path in the repository, so that a link such as ``../README.md`` works in the site and in a
plain view of the file.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import notebooks  # next to this file
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff")
RESULTS = ("*.md", "*.png", "*.svg", "*.txt", "*.jsonl", "*.json")


def on_files(files: Any, config: Any) -> Any:
    """Add all pages, the notebooks' results, the committed results and MathJax."""
    results = ROOT / "experiments" / "results"
    pages = [ROOT / name for name in PAGES]
    pages += sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "docs" / "api").glob("*.md"))
    pages += sorted(path for pattern in RESULTS for path in results.rglob(pattern))
    for path in pages:
        if path.exists():
            name = path.relative_to(ROOT).as_posix()
            files.append(_file(config, name, path))
    for path in sorted(notebooks.GALLERY.glob("*.py")):
        for file in _notebook(config, path):
            files.append(file)
    files.append(_file(config, "mathjax/tex-svg.js", mathjax()))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Highlight examples as a session of the interpreter."""
    return re.sub(r"^```python\n(?=>>> )", "```pycon\n", markdown, flags=re.M)


def mathjax() -> Path:
    """Return MathJax's script, one file without fonts, from the package that ships it."""
    spec = importlib.util.find_spec("mathjax")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the site needs MathJax: pip install 'orlomo-jax[docs]'")
    return Path(spec.origin).parent / "static" / "mathjax" / "es5" / "tex-svg.js"


class NotebookFile(File):
    """A script that becomes a page, so that links to the script lead to the page."""

    def is_documentation_page(self) -> bool:
        """Return True."""
        return True


def _notebook(config: Any, path: Path) -> list[File]:
    """Run a notebook; return its page, its pictures and the file to download."""
    page = notebooks.render(path)
    folder = path.parent.relative_to(ROOT).as_posix()
    contents = {f"{path.stem}.ipynb": page.notebook, **page.pictures}
    files = [NotebookFile.generated(config, f"{folder}/{path.name}", content=page.markdown)]
    files += [File.generated(config, f"{folder}/{n}", content=c) for n, c in contents.items()]
    for file in files:
        file.dest_uri = file.dest_uri.removeprefix("docs/")
    return files


def _file(config: Any, name: str, path: Path) -> File:
    file = File.generated(config, name, abs_src_path=str(path))
    if name.startswith("docs/"):  # docs/concepts.md becomes concepts/
        file.dest_uri = file.dest_uri.removeprefix("docs/")
    elif name == "README.md":  # docs/index.md is the front page
        file.dest_uri = "readme/index.html"
    return file
