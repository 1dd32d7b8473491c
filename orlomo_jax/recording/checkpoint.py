"""Save and resume, to the bit: checkpoints written whole or not at all, by Orbax."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from orlomo_jax.checks import check_count, check_same
from orlomo_jax.recording.identity import versions
from orlomo_jax.recording.locks import open_alone

JOURNAL = "arrivals.jsonl"
"""The file of a real run's arrivals in the folder of its checkpoints."""


class Saved(NamedTuple):
    """One checkpoint: a tree of dicts and lists of NumPy arrays, and JSON-able notes."""

    step: int
    arrays: dict[str, Any]
    metadata: dict[str, Any]
    path: Path

    @property
    def identity(self) -> dict[str, Any]:
        """Of which run it is.

        Raises:
            ValueError: If the notes do not say so.
        """
        identity = self.metadata.get("identity")
        if not isinstance(identity, dict):
            raise ValueError(f"{self.path} is damaged: it does not say of which run it is")
        return identity

    def check(self, identity: dict[str, Any], *, any_version: bool) -> None:
        """Raise ValueError unless it is of this run and of the versions in use; with what not."""
        what = f"the checkpoint {self.path}"
        check_same(what, self.identity, identity)
        theirs = self.metadata.get("versions")
        try:
            if not any_version:
                check_same(what, theirs if isinstance(theirs, dict) else {}, versions(identity))
        except ValueError as error:
            raise ValueError(
                f"{error}. Its numbers would not be those of an unbroken run: "
                "Checkpointer(…, any_version=True) goes on all the same"
            ) from None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Say that the checkpoint is damaged where its content is not what it should be."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} is damaged, remove it to go on from an earlier one: {error!r}"
            ) from error


class Checkpointer:
    """The checkpoints of one run in a folder of their own.

    A checkpoint is written under another name and renamed when complete, so that a killed process
    leaves whole ones alone. Reading executes no code (arrays and JSON, no pickle). A run goes on
    from its own checkpoints alone: every setting of method, local round, batches and learning
    rates, the trees' paths and dtypes, and the versions of this library, JAX and jaxlib must be
    the same. A checkpoint of anything else is refused with an error that names the difference.

    Args:
        directory: A folder on this machine, made where it is missing; ``~`` is the home.
        every: Steps between two checkpoints, ≥ 1.
        keep: How many of the newest stay, ≥ 1; an older one serves where the newest is damaged.
        any_version: Whether to go on from checkpoints that other versions of the libraries wrote.
            The numbers may then differ from those of an unbroken run.

    Raises:
        ValueError: If ``every`` or ``keep`` is below 1, or ``directory`` is a URL.
        ImportError: If Orbax is not installed; the message says which extra holds it.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> checkpoints = Checkpointer(tempfile.mkdtemp(), every=10)
        >>> checkpoints.save(10, {"w": [np.ones(2)]}, {"epoch": 1})
        >>> checkpoints.newest().metadata
        {'epoch': 1}
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every: int,
        keep: int = 2,
        *,
        any_version: bool = False,
    ) -> None:
        """Open the folder."""
        self.every, self.any_version = check_count("every", every, 1), any_version
        keep = check_count("keep", keep, 1)
        if "://" in os.fspath(directory):
            raise ValueError(
                f"`directory` must be a folder on this machine, got {os.fspath(directory)!r}: "
                "mount the bucket, or copy the folder there after the run"
            )
        try:
            import orbax.checkpoint as orbax
        except ModuleNotFoundError as error:
            if error.name not in ("orbax", "orbax.checkpoint"):
                raise
            raise ImportError(
                "checkpoints need Orbax: pip install 'orlomo-jax[checkpoint]'"
            ) from error
        self._orbax, self.directory = orbax, Path(directory).expanduser().absolute()
        self._manager = orbax.CheckpointManager(
            self.directory,
            options=orbax.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False
            ),
        )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep all other runs out of the folder, until the end of the block or of the process.

        Raises:
            BlockingIOError: If another run is in it.
            OSError: If nothing can be written there.
        """
        try:
            file = open_alone(self.directory / ".lock")
        except BlockingIOError:
            raise BlockingIOError(
                f"another run writes its checkpoints into {self.directory}: wait for its end, or "
                "choose another folder"
            ) from None
        except OSError as error:
            why = f"checkpoints cannot be written there: {error.strerror}"
            raise OSError(error.errno, why, str(self.directory)) from error
        with file:
            yield

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

    def save_run(self, step: int, arrays: dict, notes: dict, identity: dict[str, Any]) -> None:
        """Write a checkpoint of the run of this ``identity``; see :meth:`save`."""
        notes = notes | {"identity": identity, "versions": versions(identity)}
        self.save(step, arrays, notes)

    def newest_of(self, identity: dict[str, Any]) -> Saved | None:
        """Return the newest readable checkpoint, which must be of the run of this ``identity``.

        Raises:
            ValueError: If it is of another run; the message says by what.
        """
        if (saved := self.newest()) is not None:
            saved.check(identity, any_version=self.any_version)
        return saved

    def newest(self) -> Saved | None:
        """Return the newest readable checkpoint, or None where there is none.

        A damaged one is passed over with a warning that names it.
        """
        args = self._orbax.args
        items = {"arrays": args.StandardRestore(), "notes": args.JsonRestore()}
        for step in reversed(self.steps()):
            where = self.directory / str(step)
            try:
                saved = self._manager.restore(step, args=args.Composite(**items))
                [of_step, notes] = saved["notes"]
                if of_step != step or not isinstance(notes, dict):
                    raise ValueError(f"its notes are of step {of_step}")
            except Exception as error:  # Orbax raises what the damaged part happens to raise.
                warnings.warn(f"{where} is damaged and passed over: {error}", stacklevel=2)
            else:
                return Saved(step, saved["arrays"], notes, where)
        return None
