"""Show what is in a checkpoint folder, a journal or a trace: ``python -m orlomo_jax.inspect PATH``.

Nothing is changed, so a run may be writing to the folder at the same time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from orlomo_jax.recording.checkpoint import JOURNAL, read_notes
from orlomo_jax.recording.journal import Journal
from orlomo_jax.traces.trace import FORMAT_VERSION, ArrivalTrace

_WIDTH = 100
_VARYING = ("absent", "trace")  # may differ between a journal and its checkpoints


def describe(path: str | Path, *, everything: bool = False) -> str:
    """Return a text about a checkpoint folder, a journal or a trace.

    Args:
        path: A folder of checkpoints, with a journal or without; or a file: a journal or a trace.
        everything: Whether to list all settings in full, including those of the fingerprint.

    Raises:
        OSError: If the path does not exist or cannot be read.
        ValueError: If it is neither, is damaged or has a format version that is not known.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "trace.json"
        >>> ArrivalTrace.from_workers([0, 1, 0], 2).save(path)
        >>> print(describe(path).partition("/")[0] + "…")
        trace …
        >>> print(describe(path).partition("json: ")[2])
        format version 1
          3 reports of 2 workers, asynchronous, until second 3
          worker  reports  share %  rounds  mean delay  max delay
               0        2     66.7       2         0.5          1
               1        1     33.3       1         1.0          1
    """
    path = Path(path)
    if path.is_dir():
        return "\n".join(_folder(path, everything))
    content = path.read_text(encoding="utf-8", errors="replace")
    if '"orlomo_jax.Journal"' in content.partition("\n")[0]:
        return "\n".join(_journal(path, everything))
    if '"orlomo_jax.ArrivalTrace"' in content:
        trace = ArrivalTrace.load(path)
        return "\n".join([f"trace {path}: format version {FORMAT_VERSION}", *_trace(trace)])
    raise ValueError(f"{path} is neither a folder of checkpoints, nor a journal, nor a trace")


def _folder(path: Path, everything: bool) -> Iterator[str]:
    steps = [child for child in path.iterdir() if child.name.isdigit() and child.is_dir()]
    journal = path / JOURNAL
    if not steps and not journal.exists():
        raise ValueError(f"{path} contains neither checkpoints nor a journal ({JOURNAL})")
    found = read_notes(path) if steps else {}
    for step, (notes, version) in found.items():
        yield f"checkpoint {path / str(step)}: step {step}, format version {version}"
        written = ", ".join(f"{k} {v}" for k, v in notes.get("versions", {}).items())
        yield f"  written by {written or 'a loop of your own'}"
        runs = notes.get("runs", [])
        for index, run in enumerate(runs):
            yield from _server(run.get("server", {}), f"run {index}: " if len(runs) > 1 else "")
    if found and "identity" in (newest := found[max(found)][0]):
        yield from _settings(newest["identity"], everything)
    if journal.exists():
        yield from _journal(journal, everything and not found, settings=not found)


def _server(server: dict[str, Any], name: str) -> Iterator[str]:
    for worker, number, version in server.get("held", []):
        yield f"  {name}worker {worker} holds round {number} of version {version}"


def _journal(path: Path, everything: bool, settings: bool = True) -> Iterator[str]:
    journal = Journal.load(path)
    yield f"journal {path}: format version {journal.format_version}"
    yield from _trace(journal.trace())
    if journal.arrivals:
        yield f"  the newest loss is {journal.arrivals[-1].loss:.6g}"
    rejected = Counter(reason.partition(":")[0] for _, reason in journal.rejected)
    yield f"  rejected reports: {_counted(rejected)}"
    if settings:
        yield from _settings(journal.identity, everything)


def _trace(trace: ArrivalTrace) -> Iterator[str]:
    kind = "synchronous" if trace.synchronous else "asynchronous"
    until = f", until second {trace.times[-1]:.6g}" if trace.num_steps else ""
    yield f"  {trace.num_steps} reports of {trace.num_workers} workers, {kind}{until}"
    if trace.events:
        yield f"  events: {_counted(Counter(event.kind for event in trace.events))}"
    yield "  worker  reports  share %  rounds  mean delay  max delay"
    for worker in range(trace.num_workers):
        own = trace.workers == worker
        text = f"  {worker:6} {own.sum():8}"
        if own.any():
            delays, rounds = trace.delays[own], trace.rounds[own].max() + 1
            text += f" {100 * np.mean(own):8.1f} {rounds:7} {delays.mean():11.1f} {delays.max():10}"
        yield text


def _settings(identity: dict[str, Any], everything: bool) -> Iterator[str]:
    kept = {name: value for name, value in identity.items() if name not in _VARYING}
    content = json.dumps(kept, sort_keys=True).encode()
    yield f"  fingerprint {hashlib.sha256(content).hexdigest()[:16]} of {len(kept)} settings"
    for name, value in identity.items():
        text = f"    {name} = {value if isinstance(value, str) else json.dumps(value)}"
        if everything or name in ("method.num_local_steps", "method.policy"):
            yield text
        elif "." not in name and not name.startswith("jax_"):
            yield text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
    if not everything:
        yield "    … (--all shows all of them)"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "none"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m orlomo_jax.inspect", description=__doc__)
    parser.add_argument("path", help="a folder of checkpoints, a journal or a trace")
    parser.add_argument("--all", action="store_true", help="show all settings in full")
    given = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns that it only reads
    jax.config.update("jax_platforms", "cpu")  # Orbax asks for devices; leave GPUs to the run
    try:
        print(describe(given.path, everything=given.all))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
