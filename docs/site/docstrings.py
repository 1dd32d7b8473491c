"""Adapts the docstrings to mkdocstrings: references of Sphinx, and sections of one example."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension

PAGES = sorted((Path(__file__).parents[1] / "api").glob("*.md"))
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?\.?([\w.]+)`")


def documented() -> dict[str, str]:
    """Return the path of each documented name, by its last part."""
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    return {path.rsplit(".", 1)[-1]: path for path in re.findall(r"^::: ([\w.]+)", text, re.M)}


class Docstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def __init__(self) -> None:
        """Read the names that have a page."""
        self._paths = documented()

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            text = ROLE.sub(self._link, obj.docstring.value)
            text = text.replace("``", "`")
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.M)

    def _link(self, match: re.Match) -> str:
        name = match[1].rsplit(".", 1)[-1]
        path = self._paths.get(name)
        return f"`{name}`" if path is None else f"[`{name}`][{path}]"
