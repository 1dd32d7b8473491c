"""The kernels of a GPU in a profile of JAX, and how much of their time is gradients."""

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
"""In the name of each operation of a loss or its gradient: jax.grad puts it there."""


class Kernel(NamedTuple):
    """A kernel's name, its seconds, and what XLA says about it."""

    name: str
    seconds: float
    notes: str


def rows(name: str, run: Callable[[], Any], seconds: float) -> Iterator[Row]:
    """Yield what share of ``seconds``, a run's without a profile, its kernels take.

    While it is profiled XLA runs no graphs but launches each kernel, so that the profile's own
    length says nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        found = kernels(Path(folder))
    if not found:
        print(f"{name}: the profile holds no kernel of a GPU")
        return
    busy = sum(kernel.seconds for kernel in found)
    yield Row(f"{name}, kernels", busy, seconds, "s", "the run's time", busy / seconds)
    if spent := sum(kernel.seconds for kernel in found if GRADIENT in kernel.notes):
        against = "all kernels"
        yield Row(f"{name}, kernels of gradients", spent, busy, "s", against, spent / busy)


def kernels(folder: Path) -> list[Kernel]:
    """Return the kernels on a GPU's streams that the trace files in a folder hold."""
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
