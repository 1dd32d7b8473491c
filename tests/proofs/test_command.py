"""Tests ``python -m proofs_check``: its output, its error messages and its exit status."""

import importlib.util
import io
import json
import sys

import pytest

import proofs_check
from proofs_check.__main__ import main
from proofs_check.optional import MissingPackage

FAULT = "proofs_check.mutants.faulty_rules:without_past_descent"


def test_command_passes_and_writes_json(tmp_path, capsys):
    path = tmp_path / "table.json"
    status = main(["--lemma", "3", "--check", "induction", "--json", str(path)])
    assert status == 0
    assert "Lemma 3" in capsys.readouterr().out
    (row,) = json.loads(path.read_text())
    assert (row["statement"], row["passed"], row["residual"]) == ("lemma-3", True, 0.0)


def test_command_fails_with_a_counterexample_that_replays(tmp_path, capsys):
    path = tmp_path / "counterexample.json"
    arguments = ["--rule", FAULT, "--check", "every-order", "--exhaustive", "2", "3"]
    assert main([*arguments, "--counterexample", str(path)]) == 1
    out = capsys.readouterr().out
    assert "FAILS" in out
    printed = json.loads(out.splitlines()[-1])
    assert printed == json.loads(path.read_text())
    assert printed["case"]["trace"]["workers"] == [0, 1]
    assert main(["--replay", str(path)]) == 1
    assert "Lemma 2 FAILS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lemma", "99"], "--lemma"),
        (["--rule", "proofs_check"], "MODULE:FACTORY"),
        (["--rule", "orlomo_jax:make_method"], "must name a factory(num_workers, momentum,"),
        (["--rule", "orlomo_jax:delay_adaptive"], "got 'orlomo_jax:delay_adaptive'"),
        (["--replay", "no such file"], "no such file"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def without_sympy(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "sympy" else find(name)
    )


@pytest.mark.parametrize("arguments", [[], ["--lemma", "4"], ["--map"]])
def test_command_names_a_missing_package_at_once(arguments, without_sympy, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert "missing sympy" in captured.err
    assert "orlomo-jax[proofs]" in captured.err
    assert captured.out == ""


@pytest.mark.usefixtures("without_sympy")
def test_checks_that_do_not_need_a_missing_package_run():
    assert main(["--check", "synchronous-rounds"]) == 0
    with pytest.raises(MissingPackage):
        list(proofs_check.run(proofs_check.Subject(), proofs_check.SMALL, checks=["induction"]))


def narrow(monkeypatch, name: str, content: bytes = b"") -> io.BytesIO:
    """Replace a standard stream by one with an encoding that lacks the paper's symbols."""
    buffer = io.BytesIO(content)
    monkeypatch.setattr(sys, name, io.TextIOWrapper(buffer, encoding="ascii", write_through=True))
    return buffer


@pytest.mark.parametrize(
    "arguments",
    [["--lemma", "eq-6"], pytest.param(["--lemma", "eq-6", "--json", "-"], marks=pytest.mark.slow)],
)
def test_command_prints_to_a_terminal_that_is_not_utf_8(arguments, monkeypatch):
    written = narrow(monkeypatch, "stdout")
    assert main(arguments) == 0
    text = written.getvalue().decode("ascii")
    if "--json" in arguments:
        assert json.loads(text)[0]["note"] == "every τ < 5K, to the bit"
    else:
        assert "every ? < 5K" in text


def test_counterexamples_are_utf_8_whatever_the_terminal(tmp_path, monkeypatch):
    path = tmp_path / "counterexample.json"
    narrow(monkeypatch, "stdout")
    arguments = ["--rule", FAULT, "--check", "every-order", "--exhaustive", "2", "3"]
    assert main([*arguments, "--counterexample", str(path)]) == 1
    content = json.loads(path.read_bytes())
    content["note"] = "β"
    narrow(monkeypatch, "stdin", json.dumps(content, ensure_ascii=False).encode())
    assert main(["--replay", "-"]) == 1


@pytest.mark.slow
def test_map_prints_to_a_terminal_that_is_not_utf_8(monkeypatch):
    monkeypatch.setattr("proofs_check.coverage.controls", dict)
    written = narrow(monkeypatch, "stdout")
    assert main(["--map"]) == 0
    assert b"Lemma 3" in written.getvalue()
