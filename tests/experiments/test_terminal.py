"""Commands print on any terminal."""

import importlib
import io
import sys

import pytest

COMMANDS = (
    "against_optax",
    "benchmarks.__main__",
    "chaos",
    "gpu_programs.__main__",
    "gpu_session",
    "merged_statistics",
    "prepare",
    "quickstart",
    "report",
    "reproduce",
    "train",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_shown_where_symbols_are_unknown(command, monkeypatch):
    module = importlib.import_module(f"experiments.{command}")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    stream.flush()
    assert ended.value.code in (0, None)
    assert b"usage" in stream.buffer.getvalue().lower()
