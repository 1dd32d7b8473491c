"""Use a GPU for a short time: benchmarks, then as many of the paper's cells as fit.

``python -m experiments.gpu_session --packed FOLDER --output FOLDER`` restores a packed data set,
runs the GPU benchmarks, and then runs the paper's cells by importance until the budget is spent.
The same command resumes an earlier session.

``--rehearse`` does all of this at a tiny size on random images, on a CPU. It repeats the session
until every run is done.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from experiments import records
from experiments.data import folders, packed, tfds_cache
from experiments.data.tfds_cache import Arrays, DataError
from experiments.terminal import accept_any_terminal

REHEARSED = "workers=16,dataset=cifar10,model=resnet20,local_iterations=32,method=orlomo|prsgdm"
"""The cells of a rehearsal."""


@dataclass(frozen=True)
class Session:
    """The inputs, outputs and time limit of a session."""

    output: Path = Path("gpu_session")
    """Folder for benchmarks.jsonl and paper.jsonl."""
    packed: tuple[Path, ...] = ()
    """Folders of packed data sets to restore; restored ones are skipped."""
    data_dir: Path | None = None
    """The data_dir; by default $TFDS_DATA_DIR or TFDS's own."""
    budget: float = 540.0
    """Seconds after which to stop."""
    rehearse: bool = False
    """Run at a tiny size on random images, in a temporary folder."""
    reproduce: tuple[str, ...] = field(default_factory=tuple)
    """Further arguments of experiments.reproduce."""


def steps(session: Session, deadline: float) -> Iterator[list[str]]:
    """Yield each command's arguments just before it runs; the last one gets the time left.

    Raises:
        DataError: If a packed data set is missing or damaged.
    """
    data_dir = (session.data_dir or tfds_cache.default_data_dir()).expanduser()
    for folder in session.packed:
        try:
            name = folders.read_manifest(folder.expanduser()).name
        except ValueError as error:
            raise DataError(f"{error}: copy the packed data again") from None
        if not tfds_cache.arrays_folder(name, data_dir).exists():
            yield ["prepare", "--unpack", str(folder), "--data-dir", str(data_dir)]
    rows = session.output / "benchmarks.jsonl"
    if not rows.exists():
        tiny = ["--tiny"] if session.rehearse else []
        yield ["benchmarks", "--gpu", *tiny, "--output", str(rows)]
    scale = "rehearsal" if session.rehearse else "paper"
    rows, left = session.output / "paper.jsonl", max(1.0, deadline - time.time())
    command = ["reproduce", "--scale", scale, "--budget", f"{left:.0f}", "--output", str(rows)]
    yield [*command, "--data-dir", str(data_dir), *session.reproduce]


def run(session: Session) -> list[str]:
    """Run all commands; return the names of those that failed.

    Raises:
        DataError: If packed data is missing or damaged.
    """
    deadline, failed = time.time() + session.budget, []
    session.output.mkdir(parents=True, exist_ok=True)
    for arguments in steps(session, deadline):
        name, *rest = arguments
        print(f"+ python -m experiments.{name} {' '.join(rest)}", flush=True)
        start = time.time()
        done = subprocess.run([sys.executable, "-m", f"experiments.{name}", *rest])
        print(f"  {time.time() - start:.0f} s, exit status {done.returncode}", flush=True)
        if done.returncode:
            failed.append(name)
            if name == "prepare":
                break
    return failed


def rehearse() -> list[str]:
    """Run a session at a tiny size with random images; return the failures."""
    rng = np.random.default_rng(0)

    def images(count: int) -> Arrays:
        pixels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        return Arrays(pixels, rng.integers(0, 10, count, np.int32))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packed.write("cifar10", images(1024), images(64), folder / "data")
        packed.pack("cifar10", folder / "packed", 2, folder / "data")
        session = Session(
            folder / "output",
            (folder / "packed",),
            folder / "restored",
            budget=30.0,
            rehearse=True,
            reproduce=("--only", REHEARSED, "--together", "measured", "--at-once", "2"),
        )
        failed, rows = run(session), session.output / "paper.jsonl"
        while not failed and len(records.read(rows)) < 4:
            failed = run(session)
        statuses = {row["status"] for row in records.read(rows)}
        return failed if statuses <= {"finished"} else [*failed, f"runs: {statuses}"]


def main(args: Sequence[str] | None = None) -> None:
    """Run a session from the command line."""
    accept_any_terminal()
    session = tyro.cli(
        Session, prog="python -m experiments.gpu_session", args=args, description=__doc__
    )
    try:
        failed = rehearse() if session.rehearse else run(session)
    except DataError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; run the same command to resume") from None
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
