"""Reads GPU kernels from a JAX profile, and measures the share of gradients in their time."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.benchmarks.measure import Row

GRADIENT = "jvp("
"""Part of the name of each operation of a loss or its gradient, added by jax.grad."""


class Kernel(NamedTuple):
    """A kernel's name, its seconds, and XLA's notes on it."""

    name: str
    seconds: float
    notes: str


def rows(name: str, run: Callable[[], Any], seconds: float) -> Iterator[Row]:
    """Yield the share of kernels in ``seconds``, the time of a run without a profile.

    During a profile XLA launches each kernel separately instead of in graphs, so the duration of
    the profile itself is meaningless.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        found = kernels(Path(folder))
    if not found:
        print(f"{name}: the profile has no kernel of a GPU")
        return
    busy = sum(kernel.seconds for kernel in found)
    yield Row(f"{name}, kernels", busy, seconds, "s", "the run's time", busy / seconds)
    if spent := sum(kernel.seconds for kernel in found if GRADIENT in kernel.notes):
        against = "all kernels"
        yield Row(f"{name}, kernels of gradients", spent, busy, "s", against, spent / busy)


def kernels(folder: Path) -> list[Kernel]:
    """Return the kernels on a GPU's streams from the trace files in a folder."""
    for path in sorted(folder.rglob("*trace.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        if found := _kernels(events):
            return found
    return []


def _kernels(events: list[dict[str, Any]]) -> list[Kernel]:
    names = {
        (event["name"], event.get("pid"), event.get("tid", 0)): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event.get("name") in ("process_name", "thread_name")
    }
    gpus = {
        pid for (kind, pid, _), name in names.items() if kind == "process_name" and "GPU" in name
    }
    streams = {
        (pid, tid)
        for (kind, pid, tid), name in names.items()
        if kind == "thread_name" and pid in gpus and name.startswith("Stream")
    }
    return [
        Kernel(event["name"], 1e-6 * event["dur"], json.dumps(event.get("args", {})))
        for event in events
        if event.get("ph") == "X" and (event.get("pid"), event.get("tid")) in streams
    ]
