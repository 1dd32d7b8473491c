"""The matrix script: its cells, its table, its exit status, and who calls it."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("matrix", ROOT / "tools" / "matrix.py")
matrix = sys.modules["matrix"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(matrix)
WORKFLOWS = {path.name: path.read_text("utf-8") for path in (ROOT / ".github").rglob("*.yml")}


def test_the_command_lists_its_cells():
    command = [sys.executable, str(ROOT / "tools" / "matrix.py"), "--list", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    pairs = [f"py{python}-{age}" for age in ("oldest", "newest") for python in (311, 312, 313)]
    others = ["lowest", "devices4", "bare", "docs", "sdist", "wheel"]
    assert json.loads(run.stdout) == [*pairs, *others] == list(matrix.CELLS)


def test_the_versions_are_those_of_the_project():
    assert f"jax>={matrix.OLDEST_JAX}" in matrix.PROJECT["dependencies"]
    listed = [f"Programming Language :: Python :: {python}" for python in matrix.PYTHONS]
    assert set(listed) <= set(matrix.PROJECT["classifiers"])
    assert matrix.PROJECT["requires-python"] == f">={matrix.PYTHONS[0]}"


@pytest.mark.parametrize("paths", [matrix.NEED_REPOSITORY, matrix.SMOKE])
def test_the_named_tests_exist(paths):
    assert all((ROOT / path).exists() for path in paths)


def test_tests_that_read_the_repository_are_named():
    for path in (ROOT / "tests").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(matrix.NEED_REPOSITORY):
            code = path.read_text("utf-8")
            found = re.findall(
                r"^\s*(?:from|import) experiments|\bROOT / |README\.md\"", code, re.M
            )
            assert not found or name == "tests/conftest.py", (name, found)


def one_cell(monkeypatch, tmp_path, *command):
    def run(job):
        job.found["tests"] = "1 passed"
        job.call(*command)

    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(matrix, "CELLS", {"mine": matrix.Cell("a cell", run)})
    return matrix.main(["--table", str(tmp_path / "table.md")])


def test_a_cell_that_passes(monkeypatch, tmp_path, capsys):
    assert one_cell(monkeypatch, tmp_path, sys.executable, "-c", "print('seen')") == 0
    text = (tmp_path / "table.md").read_text("utf-8")
    assert text in capsys.readouterr().out
    assert re.search(r"^\| mine \| a cell \| – \| – \| 1 passed \| 0\.\d \| passed \|$", text, re.M)
    assert "seen" in (tmp_path / "logs" / "mine.log").read_text("utf-8")


def test_a_cell_that_fails_names_its_log(monkeypatch, tmp_path, capsys):
    assert one_cell(monkeypatch, tmp_path, sys.executable, "-c", "raise SystemExit('why')") == 1
    assert "| FAILED, see logs/mine.log |" in capsys.readouterr().out
    assert "why" in (tmp_path / "logs" / "mine.log").read_text("utf-8")


def test_variables_that_change_the_tests_are_dropped(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--none")
    code = "import os; assert 'XLA_FLAGS' not in os.environ"
    assert one_cell(monkeypatch, tmp_path, sys.executable, "-c", code) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "nothing"], "CELL must be one of .*, got nothing"),
        (["--tag", "v0"], f"--tag must be v{matrix.PROJECT['version']}, the version, got v0"),
    ],
)
def test_bad_arguments_are_refused(args, message, capsys):
    with pytest.raises(SystemExit):
        matrix.main(args)
    assert re.search(message, capsys.readouterr().err)


def test_the_right_tag_is_accepted(capsys):
    assert matrix.main(["--tag", f"v{matrix.PROJECT['version']}", "--list"]) == 0
    assert "wheel" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["test.yml", "release.yml"])
def test_the_workflows_run_this_script_and_nothing_else(name):
    commands = re.findall(r"\brun: (?:>-\n\s+)?(\S+ \S+)", WORKFLOWS[name])
    assert commands
    assert all("tools/matrix.py" in c or c.startswith('echo "names=$(python3') for c in commands)
    assert "tools/matrix.py" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_a_cell_in_the_background_can_be_interrupted(monkeypatch, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does
    try:
        code = "import signal as s; assert s.getsignal(s.SIGINT) is s.default_int_handler"
        assert one_cell(monkeypatch, tmp_path, sys.executable, "-c", code) == 0
    finally:
        signal.signal(signal.SIGINT, before)
