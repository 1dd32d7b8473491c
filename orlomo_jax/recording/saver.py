"""Saves runs to checkpoints and resumes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orlomo_jax.recording.checkpoint import Checkpointer, Saved
from orlomo_jax.recording.recorder import RunRecorder


class RunSaver:
    """Saves one run, or several runs that are simulated together, to one folder.

    Args:
        checkpoint: The folder.
        recorders: The recorder of each run.
        identity: What a run that resumes must have in common with these.
        arrivals: Returns the part of the identity that depends on the step to resume at.
    """

    def __init__(
        self,
        checkpoint: Checkpointer,
        recorders: Sequence[RunRecorder],
        identity: dict[str, Any],
        arrivals: Callable[[int], dict[str, Any]] = lambda step: {},
    ) -> None:
        """Keep the arguments."""
        self.checkpoint, self._recorders = checkpoint, recorders
        self._identity, self._arrivals = identity, arrivals

    def restore(self, saved: Saved) -> dict[str, Any]:
        """Continue from a checkpoint, if it is of these runs; return its notes."""
        identity = self._identity | self._arrivals(saved.step)
        saved.check(identity, any_version=self.checkpoint.any_version)
        with saved.reading():
            parts = zip(self._recorders, saved.arrays["runs"], saved.metadata["runs"], strict=True)
            for recorder, arrays, notes in parts:
                recorder.restore(arrays, notes, saved.step)
        if len(self._recorders) == 1:  # a run that a callback has ended can be continued
            self._recorders[0].stopped = False
        return saved.metadata

    def is_due(self) -> bool:
        """Return whether to save now: at every multiple of the period, and at the end."""
        period_ends = self._step % self.checkpoint.every == 0
        diverged = all(recorder.first_nonfinite >= 0 for recorder in self._recorders)
        return period_ends or (all(r.ended for r in self._recorders) and not diverged)

    @property
    def _step(self) -> int:
        return max(recorder.step for recorder in self._recorders)

    def save(self, **notes: Any) -> None:
        """Write a checkpoint with additional ``notes``."""
        step = self._step
        arrays, of_runs = zip(*(recorder.snapshot() for recorder in self._recorders), strict=True)
        notes["runs"] = list(of_runs)
        identity = self._identity | self._arrivals(step)
        self.checkpoint.save_run(step, {"runs": list(arrays)}, notes, identity)
