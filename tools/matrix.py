"""Run the tests on several versions of Python and JAX, and the checks of a release.

``python tools/matrix.py`` runs every cell of the matrix, each in a new environment, and prints a
table. ``--list`` names the cells. It needs Python ≥ 3.11 and uv (``python -m pip install uv``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "matrix"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ("3.11", "3.12", "3.13")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
"""The Python of the cells that need only one: the one that runs this script."""
OLDEST_JAX = re.findall(r"'jax>=([\d.]+)'", str(PROJECT["dependencies"]))[0]
NEED_REPOSITORY = (
    "tests/experiments",
    "tests/test_docs.py",
    "tests/test_gallery.py",
    "tests/test_layout.py",
    "tests/test_matrix.py",
    "tests/test_readme.py",
)
"""Tests of what is not in the wheel: experiments, docs, tools, and the text of the code."""
SMOKE = (
    "tests/proofs/test_controls.py",
    "tests/recording/test_checkpoint.py",
    "tests/rules/test_rules.py",
    "tests/runtimes/test_threads.py",
    "tests/simulation/test_simulate.py",
    "tests/traces/test_trace.py",
)
"""The tests of ``--smoke``: one file of each package."""
DROPPED = ("JAX_PLATFORMS", "PYTHONPATH", "VIRTUAL_ENV", "XLA_FLAGS")
"""Variables that would change what a cell tests."""


@dataclass
class Job:
    """A cell that runs: its folder, its environment and its log.

    Attributes:
        folder: A temporary folder.
        log: The file that gets all output.
        options: The arguments of the command line.
        found: What the table shows: ``python``, ``jax`` and ``tests``.
    """

    folder: Path
    log: Path
    options: argparse.Namespace
    found: dict[str, str] = field(default_factory=dict)

    def call(
        self, *command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None
    ) -> None:
        """Run a command; raise CalledProcessError if it fails."""
        kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
        with open(self.log, "a", encoding="utf-8") as log:
            print("+", *command, file=log, flush=True)
            subprocess.run(
                [str(part) for part in command],
                cwd=cwd,
                env=kept | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )

    def environment(self, python: str, *requirements: str, name: str = "venv") -> Path:
        """Make an environment, install requirements, and return its Python."""
        self.call(find_uv(), "venv", "--quiet", "--python", interpreter(python), self.folder / name)
        path = self.folder / name / "bin" / "python"
        self.call(find_uv(), "pip", "install", "--quiet", "--python", path, *requirements)
        code = "import platform as p, importlib.metadata as m; print(p.python_version(), end=' ');"
        code += "print(*[d.version for d in m.distributions() if d.name == 'jax'])"
        run = subprocess.run([path, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        self.found |= dict(zip(("python", "jax"), run.stdout.split(), strict=False))
        return path

    def pytest(
        self,
        python: Path,
        *args: str,
        smoke: Sequence[str] = SMOKE,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
    ) -> None:
        """Run the quick tests, or those of ``--smoke``."""
        args = tuple(smoke) if self.options.smoke else args
        if self.options.processes is not None:
            args += ("-n", str(self.options.processes))
        try:
            self.call(python, "-m", "pytest", "-q", *args, cwd=cwd, env=env)
        finally:
            text = self.log.read_text(encoding="utf-8")
            ends = re.findall(r"^=* ?(\d+ (?:passed|failed).*) in [\d.]+s", text, re.M)
            self.found["tests"] = ends[-1] if ends else "none ran"


def suite(
    python: str,
    *requirements: str,
    env: dict[str, str] | None = None,
    job: Job,
) -> None:
    """Run the tests of the repository."""
    job.pytest(job.environment(python, *requirements, "--editable", ".[test]"), env=env)


def bare(job: Job) -> None:
    """Import the package without any extra."""
    python = job.environment(PYTHON, str(ROOT))
    modules = "orlomo_jax, orlomo_jax.inspect, orlomo_jax.testing, proofs_check"
    job.call(python, "-W", "error", "-c", f"import {modules}", cwd=job.folder)


def docs(job: Job) -> None:
    """Build the site."""
    python = job.environment(PYTHON, "--editable", ".[docs]")
    job.call(python, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml",
             "-d", job.folder / "site")  # fmt: skip


def distribution(kind: str, job: Job) -> None:
    """Build sdist and wheel, check both, and run the tests on one of them.

    The tests come from the sdist, and are alone in their folder: without a repository.
    """
    built = job.folder / "dist"
    tools = job.environment(PYTHON, "build", "twine", name="tools")
    job.call(tools, "-m", "build", "--outdir", built, ROOT)
    files = {"sdist": next(built.glob("*.tar.gz")), "wheel": next(built.glob("*.whl"))}
    job.call(tools, "-m", "twine", "check", "--strict", *files.values())
    python = job.environment(PYTHON, f"{PROJECT['name']}[test] @ {files[kind].as_uri()}")
    with tarfile.open(files["sdist"]) as archive:
        archive.extractall(job.folder / "source", filter="data")
    source, alone = next((job.folder / "source").iterdir()), job.folder / "alone"
    shutil.copytree(source / "tests", alone / "tests")
    shutil.copy(source / "pyproject.toml", alone)
    where = "import orlomo_jax as o, sys; assert o.__file__.startswith(sys.prefix), o.__file__"
    job.call(python, "-c", where, cwd=alone)
    ignored = [f"--ignore={path}" for path in NEED_REPOSITORY]
    job.pytest(python, "tests", "--pyargs", "orlomo_jax", "proofs_check", *ignored, cwd=alone)
    if job.options.dist is not None:
        job.options.dist.mkdir(parents=True, exist_ok=True)
        for path in files.values():
            shutil.copy(path, job.options.dist)


class Cell(NamedTuple):
    """A cell of the matrix: what it does, in words, and its function of a job."""

    says: str
    run: Callable[..., None]


CELLS = {
    f"py{python.replace('.', '')}-{age}": Cell(
        f"tests, Python {python}, {age} JAX", partial(suite, python, *pins)
    )
    for age, pins in (("oldest", (f"jax=={OLDEST_JAX}",)), ("newest", ()))
    for python in PYTHONS
} | {
    "lowest": Cell(
        "tests, the lower bounds of pyproject.toml",
        partial(suite, PYTHONS[0], "--resolution", "lowest-direct"),
    ),
    "devices4": Cell(
        "tests, four forced host devices",
        partial(suite, PYTHON, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}),
    ),
    "bare": Cell("import of the package without extras", bare),
    "docs": Cell("build of the site, warnings are errors", docs),
    "sdist": Cell("sdist: build, twine, tests without repository", partial(distribution, "sdist")),
    "wheel": Cell("wheel: build, twine, tests without repository", partial(distribution, "wheel")),
}


def find_uv() -> str:
    """Return the path of uv: next to this Python, or on the path."""
    own = Path(sys.executable).with_name("uv")
    found = str(own) if own.exists() else shutil.which("uv")
    if found is None:
        raise SystemExit("uv is missing: python -m pip install uv")
    return found


def interpreter(version: str) -> str:
    """Return pyenv's newest Python of a version; without one the version, which uv looks for."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = list(root.glob(f"{version}.*/bin/python"))
    patch = lambda path: int("0" + re.sub(r"\D.*", "", path.parts[-3].split(".")[2]))  # noqa: E731
    return str(max(found, key=patch)) if found else version


def run_cell(name: str, options: argparse.Namespace) -> dict[str, str]:
    """Run a cell and return its row of the table."""
    log = LOGS / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"matrix-{name}-") as folder:
        job = Job(Path(folder), log, options)
        try:
            CELLS[name].run(job=job)
            outcome = "passed"
        except (subprocess.CalledProcessError, OSError, StopIteration) as error:
            outcome = f"FAILED, see {log.relative_to(ROOT)}"
            with open(log, "a", encoding="utf-8") as file:
                print(f"{type(error).__name__}: {error}", file=file)
    minutes = f"{(time.monotonic() - begin) / 60:.1f}"
    row = {"cell": name, "what": CELLS[name].says, "python": "–", "jax": "–", "tests": "–"}
    return row | job.found | {"minutes": minutes, "outcome": outcome}


def table(rows: Iterable[dict[str, str]]) -> str:
    """Return the outcomes as a Markdown table."""
    rows = list(rows)
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog="python tools/matrix.py", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="CELL", help="the cells to run")
    parser.add_argument("--list", action="store_true", help="name the cells and end")
    parser.add_argument("--json", action="store_true", help="with --list: a JSON list of names")
    parser.add_argument("--smoke", action="store_true", help=f"run {', '.join(SMOKE)} alone")
    parser.add_argument("--processes", type=int, metavar="N", help="processes of pytest")
    parser.add_argument("--table", type=Path, metavar="FILE", help="append the table to a file")
    parser.add_argument("--dist", type=Path, metavar="DIR", help="copy sdist and wheel here")
    parser.add_argument("--tag", help=f"fail unless it is v{PROJECT['version']}, the version")
    options = parser.parse_args(args)
    names = list(CELLS) if options.only is None else options.only
    if unknown := [name for name in names if name not in CELLS]:
        parser.error(f"CELL must be one of {', '.join(CELLS)}, got {unknown[0]}")
    if options.tag is not None and options.tag != f"v{PROJECT['version']}":
        parser.error(f"--tag must be v{PROJECT['version']}, the version, got {options.tag}")
    if options.list:
        lines = [f"{name:14} {CELLS[name].says}" for name in names]
        print(json.dumps(names) if options.json else "\n".join(lines))
        return 0
    # A shell lets background commands ignore SIGINT, and they pass that on; some tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows = []
    for name in names:
        print(f"{name}: {CELLS[name].says} …", flush=True)
        rows.append(run_cell(name, options))
        print(f"  {rows[-1]['tests']}; {rows[-1]['outcome']}", flush=True)
    print("\n" + table(rows))
    if options.table is not None:
        with open(options.table, "a", encoding="utf-8") as file:
            file.write(table(rows))
    return int(any(row["outcome"] != "passed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
