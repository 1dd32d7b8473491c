"""Save and resume, to the bit: checkpoints written whole or not at all, by Orbax."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from orlomo_jax.checks import check_count


class Saved(NamedTuple):
    """One checkpoint: a tree of dicts and lists of NumPy arrays, and JSON-able notes."""

    arrays: dict[str, Any]
    notes: dict[str, Any]
    directory: Path

    def check(self, identity: dict[str, Any]) -> None:
        """Raise ValueError unless the notes hold this ``identity``; the message says what not."""
        theirs = self.notes.get("identity", {})
        for name, value in identity.items():
            if (other := theirs.get(name)) != value:
                raise ValueError(
                    f"`checkpoint` must be of this run, got one of another {name} in "
                    f"{self.directory}: it was written with {other}, this is {value}"
                )


class Checkpoints:
    """The checkpoints of one run in a folder of their own.

    A checkpoint is written under another name and renamed when complete, so that a killed process
    leaves whole ones alone. Reading executes no code (arrays and JSON, no pickle).

    Args:
        directory: Made where it is missing.
        every: Steps between two checkpoints, ≥ 1.
        keep: How many of the newest stay, ≥ 1; an older one serves where the newest is damaged.

    Raises:
        ValueError: If ``every`` or ``keep`` is below 1.
        ImportError: If Orbax is not installed; the message says which extra holds it.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> checkpoints = Checkpoints(tempfile.mkdtemp(), every=10)
        >>> checkpoints.save(10, {"w": [np.ones(2)]}, {"epoch": 1})
        >>> checkpoints.newest().notes
        {'epoch': 1}
    """

    def __init__(self, directory: str | os.PathLike[str], every: int, keep: int = 2) -> None:
        """Open the folder."""
        self.every = check_count("every", every, 1)
        keep = check_count("keep", keep, 1)
        try:
            import orbax.checkpoint as orbax
        except ImportError as error:
            raise ImportError(
                "checkpoints need Orbax: pip install 'orlomo-jax[checkpoint]'"
            ) from error
        self._orbax, self.directory = orbax, Path(directory).absolute()
        self._manager = orbax.CheckpointManager(
            self.directory,
            options=orbax.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False
            ),
        )

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, oldest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, arrays: dict[str, Any], notes: dict[str, Any]) -> None:
        """Write one checkpoint; it is on disk when this returns, in the place of one of this step.

        Raises:
            OSError: If it cannot be written (a full disk); earlier ones are as they were.
        """
        args = self._orbax.args
        items = {"arrays": args.StandardSave(arrays), "notes": args.JsonSave([step, notes])}
        if step in self.steps():  # a damaged one that was passed over
            self._manager.delete(step)
        self._manager.save(step, args=args.Composite(**items), force=True)

    def newest_of(self, identity: dict[str, Any]) -> Saved | None:
        """Return the newest readable checkpoint, whose notes must hold this ``identity``.

        Raises:
            ValueError: If it is of another run; the message says by what.
        """
        if (saved := self.newest()) is not None:
            saved.check(identity)
        return saved

    def newest(self) -> Saved | None:
        """Return the newest readable checkpoint, or None where there is none.

        A damaged one is passed over with a warning that names it.
        """
        args = self._orbax.args
        items = {"arrays": args.StandardRestore(), "notes": args.JsonRestore()}
        for step in reversed(self.steps()):
            try:
                saved = self._manager.restore(step, args=args.Composite(**items))
                [of_step, notes] = saved["notes"]
                if of_step != step or not isinstance(notes, dict):
                    raise ValueError(f"its notes are of step {of_step}")
            except Exception as error:  # Orbax raises what the damaged part happens to raise.
                where = self.directory / str(step)
                warnings.warn(f"{where} is damaged and passed over: {error}", stacklevel=2)
            else:
                return Saved(saved["arrays"], notes, self.directory)
        return None
