"""Terminal setup that all commands share."""

from __future__ import annotations

import io
import sys


def accept_any_terminal() -> None:
    """Print ``?`` for characters that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
