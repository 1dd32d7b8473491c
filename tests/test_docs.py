"""The API reference names every public name, and its docstrings are complete; the site builds."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import orlomo_jax

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api"
PACKAGES = ("methods", "recording", "rules", "runtimes", "server", "simulation", "traces", "worker")
OTHERS = ("adapters.Model", "inspect.describe", "testing.check_worker_pool")
IGNORED = {"self", "cls", "args", "kwargs", "extra_args"}


def public():
    """Return the shortest public path of each public object, and the object."""
    found = {f"orlomo_jax.{name}": getattr(orlomo_jax, name) for name in orlomo_jax.__all__}
    for package in PACKAGES:
        module = importlib.import_module(f"orlomo_jax.{package}")
        for name in dir(module):
            value = getattr(module, name)
            hidden = name.startswith("_") or inspect.ismodule(value)
            if not hidden and name not in orlomo_jax.__all__:
                found[f"{module.__name__}.{name}"] = value
    for path in OTHERS:
        module, _, name = f"orlomo_jax.{path}".rpartition(".")
        found[f"orlomo_jax.{path}"] = getattr(importlib.import_module(module), name)
    return found


PUBLIC = public()


def test_every_public_name_is_on_one_page_of_the_api():
    listed = []
    for page in sorted(API.glob("*.md")):
        for path in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.M):
            module, name = path.rsplit(".", 1)
            value = getattr(importlib.import_module(module), name)
            assert not inspect.ismodule(value), f"{page.name}: {path} is a module"
            listed += [public for public in names_of(name) if PUBLIC[public] is value]
    assert sorted(listed) == sorted(PUBLIC)


def names_of(name):
    """Return the public paths that end in a name."""
    return [path for path in PUBLIC if path.rsplit(".", 1)[1] == name]


def gaps(value) -> list[str]:
    """Return what the docstring of a function or class lacks."""
    text = inspect.getdoc(value) or ""
    lines = text.splitlines() or [""]
    found = [] if re.match(r"[A-Z].*[.:]$", lines[0]) else ["a summary of one line"]
    try:
        names = [name for name in inspect.signature(value).parameters if name not in IGNORED]
    except ValueError:  # an exception without a constructor of its own
        names = []
    section = re.search(r"^(Args|Attributes):\n((?: .*\n?|\n)+)", text, re.M)
    described = set(re.findall(r"\*{0,2}(\w+)(?=[^:\n]*:)", section[2] if section else ""))
    found += [f"the argument {name}" for name in names if name not in described]
    if not inspect.isfunction(value):
        members = vars(value).items() if inspect.isclass(value) else ()
        public = [(k, m) for k, m in members if not k.startswith("_")]
        functions = [(k, m) for k, m in public if inspect.isfunction(m) or isinstance(m, property)]
        return found + [f"a docstring of {k}" for k, m in functions if not inspect.getdoc(m)]
    tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    if any(isinstance(node, ast.Return) and node.value for node in ast.walk(tree)):
        if not re.search(r"^(Return\b|Returns:|Yields:)", text, re.M):
            found.append("what it returns")
    if any(isinstance(node, ast.Raise) for node in ast.walk(tree)) and "Raises:" not in text:
        found.append("what it raises")
    return found if ">>>" in text else [*found, "an example"]


@pytest.mark.parametrize("path", [path for path, value in PUBLIC.items() if callable(value)])
def test_docstrings_are_complete(path):
    assert not gaps(PUBLIC[path]), path


def test_gaps_are_noticed():
    def lazy(first, second):
        """Do something.

        Args:
            first: One.
        """
        if first:
            raise ValueError
        return second

    assert gaps(lazy) == ["the argument second", "what it returns", "what it raises", "an example"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml"]
    run = subprocess.run(
        [*command, "-d", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr + run.stdout
    for page in tmp_path.rglob("*.html"):
        text = page.read_text("utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\s\">]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|icon|preload)[^>]*", text)
        assert not [address for address in loaded if "//" in address], page
        assert not re.search(r":(?:class|func|meth|mod|data):`", text), page
    assert (tmp_path / "mathjax" / "tex-svg.js").stat().st_size > 1_000_000
    assert "arithmatex" in (tmp_path / "theory" / "index.html").read_text("utf-8")
