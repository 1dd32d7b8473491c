"""What every command does to the terminal first."""

from __future__ import annotations

import io
import sys


def accept_any_terminal() -> None:
    """Let output that a terminal's encoding lacks become ``?``, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
