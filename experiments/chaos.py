"""Kill processes and poison reports during a run, and compare its end with a calm run.

``python -m experiments.chaos --kills 50`` trains on digits with Ray workers. Meanwhile it kills
workers and the driver at random moments (``kill -9``) and poisons reports: NaN, wrong shapes,
duplicates, replays of old reports. A killed driver is started again and resumes. At the end it
checks that

- a replay of the journal in the simulator gives the same parameters, bit for bit: no applied report
  was lost, and rejected reports changed nothing,
- every (worker, round) in the journal was applied at most once,
- the journal lists every poisoned report as rejected, with the reason,
- the accuracy is that of a calm run.

It needs Ray (the extra ``ray``).
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import psutil
import tyro
from rich.console import Console

from experiments import config, runner
from experiments.data import datasets
from experiments.terminal import accept_any_terminal
from orlomo_jax import Checkpointer, LocalUpdate, RayWorkers, Report
from orlomo_jax.recording import Journal

POISONS = {
    "not finite": "not finite",
    "wrong shape": "malformed",
    "duplicate": "stale",
    "replay": "stale",
}
"""Maps each kind of poison to the reason for its rejection."""


@dataclass(frozen=True)
class Chaos:
    """How much to disturb the run."""

    kills: int = 50
    """Number of kills of worker and driver processes."""
    driver_share: float = 0.15
    """Share of the kills that hit the driver."""
    poison_share: float = 0.05
    """Share of the reports that are poisoned."""
    workers: int = 4
    """K, the number of workers."""
    epochs: float = 600
    """Passes over the digits."""
    seed: int = 0
    """Seed of the run, the kills and the poison."""
    tolerance: float = 1.5
    """Largest allowed difference from the calm run's accuracy, in percentage points."""
    folder: Path | None = None
    """Folder of checkpoints and journal; by default a temporary folder."""
    victim: bool = False
    """Run as the driver that is killed (used by the command itself)."""

    def run(self) -> config.Run:
        """Return the job: OrLoMo and an MLP on digits."""
        return config.Run(
            method="orlomo",
            model="mlp",
            dataset="digits",
            scenario="homogeneous",
            workers=self.workers,
            local_iterations=8,
            seed=self.seed,
            epochs=self.epochs,
            batch_size=32,
            weight_decay=0.0,
            runtime="ray",
        )


class Poison:
    """Damages some reports, and adds duplicates and replays of old reports.

    It writes each kind of poison to ``log`` before the server receives the report.
    """

    def __init__(self, share: float, seed: int, log: Path) -> None:
        """Poison a share of the reports, chosen by a random stream of its own."""
        self._share, self._random, self._log = share, random.Random(seed), log
        self._old: list[Report] = []

    def __call__(self, report: Report) -> list[Report]:
        """Return the reports that the server receives instead of this one."""
        self._old = [*self._old[-20:], report]
        if self._random.random() >= self._share:
            return [report]
        kind = self._random.choice(list(POISONS))
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{kind}\n")
        if kind == "duplicate":
            return [report, report]
        if kind == "replay":
            return [self._random.choice(self._old[:-1] or [report]), report]
        if kind == "wrong shape":
            bad = jax.tree.map(lambda x: np.append(np.ravel(x), np.float32(0)), report.update)
            return [report._replace(update=LocalUpdate(*bad))]
        bad = jax.tree.map(np.array, report.update)
        leaf = self._random.choice(jax.tree.leaves(bad))
        leaf.flat[self._random.randrange(leaf.size)] = np.nan
        return [report._replace(update=bad)]


def be_the_victim(settings: Chaos, folder: Path) -> None:
    """Train on Ray with poisoned reports; resume if an earlier driver was killed."""
    attempt = len(list(folder.glob("attempt*")))
    (folder / f"attempt{attempt}").touch()
    row, _ = runner.execute(
        settings.run(),
        checkpoint=Checkpointer(folder, every=200),
        fault_injector=Poison(
            settings.poison_share, settings.seed + 1000 * attempt, folder / "poison.txt"
        ),
        max_failures=20,
        audit=True,
    )
    (folder / "row.json").write_text(json.dumps(row), encoding="utf-8")


def shoot(settings: Chaos, folder: Path, num_steps: int) -> Iterator[str]:
    """Start the driver, kill it or its workers at random moments, and yield which."""
    rng = random.Random(settings.seed)
    moments = sorted(rng.randrange(int(0.95 * num_steps)) for _ in range(settings.kills))
    process = _start(settings, folder)
    try:
        for moment in moments:
            while process.poll() is None and _progress(folder) < moment:
                time.sleep(0.02)
            _check(process, folder)
            if process.poll() == 0:
                return  # the run ended before the kill
            if rng.random() < settings.driver_share:
                process.kill()
                process.wait()
                yield "driver"
                process = _start(settings, folder)
            else:
                alive = _actors(process.pid)
                while process.poll() is None and not alive:
                    time.sleep(0.02)
                    alive = _actors(process.pid)
                _check(process, folder)
                if not alive:
                    return
                with contextlib.suppress(psutil.Error):
                    rng.choice(alive).kill()
                    yield "worker"
        while process.poll() is None:
            time.sleep(0.1)
        _check(process, folder)
    finally:
        process.kill()


def _start(settings: Chaos, folder: Path) -> subprocess.Popen[bytes]:
    flags = ["--victim", "--folder", str(folder)]
    for name in ("poison_share", "workers", "epochs", "seed"):
        flags += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    with (folder / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", "experiments.chaos", *flags]
        return subprocess.Popen(command, stdout=log, stderr=log)


def _check(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Raise SystemExit if the driver failed by itself."""
    if process.poll() not in (None, 0):
        log = folder / "log.txt"  # quoted in the error, as a temporary folder is removed
        last = log.read_text(errors="replace").rstrip().rpartition("\n")[2]
        raise SystemExit(f"the driver failed by itself: see {log}, which ends with\n{last}")


def _progress(folder: Path) -> int:
    """Return the number of reports in the journal."""
    path = folder / "arrivals.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def _actors(pid: int) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # the process may have just ended
                if "OrlomoWorker" in " ".join(process.cmdline()):
                    found.append(process)
    return found


def judge(settings: Chaos, folder: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield each requirement, the finding, and whether it holds."""
    row = json.loads((folder / "row.json").read_text(encoding="utf-8"))
    journal = Journal.load(folder / "arrivals.jsonl")
    trace, simulated = journal.trace(), replace(settings.run(), runtime="simulated")
    again, _ = runner.execute(simulated, replay=trace)
    calm, _ = runner.execute(simulated)
    same = row["parameters"] == again["parameters"]
    yield "the replay in the simulator has the same parameters", row["parameters"], same
    tags = set(zip(trace.workers.tolist(), trace.rounds.tolist(), strict=True))
    found = f"{trace.num_steps} reports, {len(tags)} (worker, round)"
    yield "each report was applied at most once", found, len(tags) == trace.num_steps
    rejected = Counter(text.split(":")[0] for _, text in journal.rejected)
    poison = (folder / "poison.txt").read_text(encoding="utf-8").splitlines()
    expected = Counter(POISONS[kind] for kind in poison)
    # The journal may lack the report that a killed driver worked on, or one after the last step.
    missing = {why: expected[why] - rejected[why] for why in expected}
    slack = len(list(folder.glob("attempt*")))
    found = ", ".join(f"{rejected[why]} of {n} {why}" for why, n in sorted(expected.items()))
    noted = all(0 <= count for count in missing.values()) and sum(missing.values()) <= slack
    yield "poisoned reports, and no others, are in the journal as rejected", found, noted
    lost = sum(event.kind == "lost" for event in trace.events)
    yield "lost rounds are events of the trace", f"{lost}", lost > 0
    difference = abs(row["test_accuracy"] - calm["test_accuracy"])
    found = f"{row['test_accuracy']:.2f} %, calm {calm['test_accuracy']:.2f} %"
    yield "the accuracy is a calm run's", found, difference <= settings.tolerance


def main(args: Sequence[str] | None = None) -> None:
    """Disturb the run, then check its end."""
    accept_any_terminal()
    settings = tyro.cli(Chaos, prog="python -m experiments.chaos", args=args, description=__doc__)
    if settings.victim:
        if settings.folder is None:
            raise SystemExit("--victim needs --folder")
        be_the_victim(settings, settings.folder)
        return
    try:
        RayWorkers()  # raises ImportError if Ray is not installed
    except (ImportError, ValueError) as error:
        raise SystemExit(str(error)) from None
    console = Console()
    with contextlib.ExitStack() as stack:
        folder = settings.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        begin, killed = time.monotonic(), Counter()
        num_steps = settings.run().num_steps(len(datasets.digits()[0].labels))
        for victim in shoot(settings, folder, num_steps):
            killed[victim] += 1
            console.print(
                f"{time.monotonic() - begin:.0f} s, report {_progress(folder)} of {num_steps}: "
                f"kill {sum(killed.values())}, a {victim}",
                highlight=False,
            )
        seconds = time.monotonic() - begin
        console.print(f"{dict(killed)} killed in {seconds:.0f} s", highlight=False)
        verdicts = list(judge(settings, folder))
    for name, found, holds in verdicts:
        console.print(f"{'holds' if holds else 'FAILS'}: {name} ({found})", highlight=False)
    if not all(holds for _, _, holds in verdicts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
