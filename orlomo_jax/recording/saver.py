"""Saves runs to checkpoints, and resumes them; one run or several that are simulated together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orlomo_jax.recording.checkpoint import Checkpointer, Saved
from orlomo_jax.recording.recorder import RunRecorder


class RunSaver:
    """Saves the runs of a folder together.

    Args:
        checkpoint: The folder.
        recorders: Those of the runs.
        identity: Returns what a run that resumes at a step must have in common with these.
    """

    def __init__(
        self,
        checkpoint: Checkpointer,
        recorders: Sequence[RunRecorder],
        identity: Callable[[int], dict[str, Any]],
    ) -> None:
        """Keep the arguments; nothing is read or written yet."""
        self.checkpoint, self._recorders, self._identity = checkpoint, recorders, identity

    def restore(self, saved: Saved) -> dict[str, Any]:
        """Continue from a checkpoint; return its notes.

        Raises:
            ValueError: If the checkpoint is of another run, or damaged.
        """
        saved.check(self._identity(saved.step), any_version=self.checkpoint.any_version)
        with saved.reading():
            parts = zip(self._recorders, saved.arrays["runs"], saved.metadata["runs"], strict=True)
            for recorder, arrays, notes in parts:
                recorder.restore(arrays, notes, saved.step)
        return saved.metadata

    def is_due(self) -> bool:
        """Return whether to save now: at every multiple of the period, and at the end."""
        recorder = self._recorders[0]
        period_ends = recorder.step % self.checkpoint.every == 0
        last = recorder.step == recorder.recording.num_steps
        return period_ends or last or recorder.stopped

    def save(self, **notes: Any) -> None:
        """Write a checkpoint; more ``notes`` go with it."""
        step = self._recorders[0].step
        arrays, of_runs = zip(*(recorder.snapshot() for recorder in self._recorders), strict=True)
        notes["runs"] = list(of_runs)
        self.checkpoint.save_run(step, {"runs": list(arrays)}, notes, self._identity(step))
