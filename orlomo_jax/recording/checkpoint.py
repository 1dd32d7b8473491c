"""Saves checkpoints atomically with Orbax, so that a run resumes bit for bit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from orlomo_jax.checks import check_count, check_format_version, check_same
from orlomo_jax.recording.identity import versions
from orlomo_jax.recording.locks import open_alone

JOURNAL = "arrivals.jsonl"
"""The name of a real run's journal in its checkpoint folder."""

_FORMAT_VERSION = 1


class Saved(NamedTuple):
    """One checkpoint: a tree of dicts and lists of NumPy arrays, and JSON-able notes."""

    step: int
    arrays: dict[str, Any]
    metadata: dict[str, Any]
    path: Path

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of its run; raises ValueError if the notes have none."""
        identity = self.metadata.get("identity")
        if not isinstance(identity, dict):
            raise ValueError(f"{self.path} is damaged: it does not contain the run's identity")
        return identity

    def check(self, identity: dict[str, Any], *, any_version: bool) -> None:
        """Raise ValueError, with the difference, unless it has this identity and these versions."""
        what = f"the checkpoint {self.path}"
        check_same(what, self.identity, identity)
        theirs = self.metadata.get("versions")
        try:
            if not any_version:
                check_same(what, theirs if isinstance(theirs, dict) else {}, versions(identity))
        except ValueError as error:
            raise ValueError(
                f"{error}. The numbers could differ from those of an uninterrupted run; to resume "
                "anyway, use Checkpointer(…, any_version=True)"
            ) from None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn errors from unexpected content into a ValueError: the checkpoint is damaged."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} is damaged, remove it to resume from an earlier one: {error!r}"
            ) from error


class Checkpointer:
    """The checkpoints of one run, in a folder of their own.

    A checkpoint is written under another name and renamed when it is complete, so a killed process
    never leaves half a checkpoint. Reading does not execute code (arrays and JSON, no pickle). A
    run resumes only from its own checkpoints: every setting of method, local round, batches and
    learning rates, the trees' paths and dtypes, and the versions of this library, JAX and jaxlib
    must be the same. Otherwise an error names the difference.

    Args:
        directory: A folder on this machine, created if it is missing; ``~`` is the home folder.
        every: Steps between two checkpoints, ≥ 1.
        keep: Number of newest checkpoints to keep, ≥ 1. If the newest is damaged, the run resumes
            from an older one.
        any_version: Whether to resume from checkpoints of other versions of the libraries. The
            numbers may then differ from those of an uninterrupted run.

    Raises:
        ValueError: If ``every`` or ``keep`` is below 1, or ``directory`` is a URL.
        ImportError: If Orbax is not installed.

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
        """Create the folder if it is missing."""
        self.every, self.any_version = check_count("every", every, 1), any_version
        keep = check_count("keep", keep, 1)
        if "://" in os.fspath(directory):
            raise ValueError(
                f"`directory` must be a folder on this machine, got {os.fspath(directory)!r}: "
                "mount the bucket, or copy the folder there after the run"
            )
        self._orbax = orbax = _import_orbax()
        self.directory = Path(directory).expanduser().absolute()
        self._manager = orbax.CheckpointManager(
            self.directory,
            options=orbax.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False
            ),
        )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder for this run, until the end of the block or of the process.

        Raises:
            BlockingIOError: If another run has locked it.
            OSError: If the folder is not writable.
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
        """Write one checkpoint to disk; replace one of the same step.

        Raises:
            OSError: If it cannot be written (a full disk); earlier ones are unchanged.
        """
        args = self._orbax.args
        items = {
            "arrays": args.StandardSave(arrays),
            "notes": args.JsonSave([step, notes, _FORMAT_VERSION]),
        }
        if step in self.steps():  # a damaged one that was skipped
            self._manager.delete(step)
        self._manager.save(step, args=args.Composite(**items), force=True)

    def save_run(self, step: int, arrays: dict, notes: dict, identity: dict[str, Any]) -> None:
        """Write a checkpoint of a run with this ``identity``; see :meth:`save`."""
        notes = notes | {"identity": identity, "versions": versions(identity)}
        self.save(step, arrays, notes)

    def newest_of(self, identity: dict[str, Any]) -> Saved | None:
        """Return the newest readable checkpoint; raise ValueError if it has another identity."""
        if (saved := self.newest()) is not None:
            saved.check(identity, any_version=self.any_version)
        return saved

    def newest(self) -> Saved | None:
        """Return the newest readable checkpoint, or None; warn about damaged ones.

        Raises:
            ValueError: If it has another format version.
        """
        args = self._orbax.args
        items = {"arrays": args.StandardRestore(), "notes": args.JsonRestore()}
        for step in reversed(self.steps()):
            where = self.directory / str(step)
            try:
                saved = self._manager.restore(step, args=args.Composite(**items))
                notes, version = _notes(step, saved["notes"])
            except Exception as error:  # Orbax may raise anything for a damaged checkpoint.
                warnings.warn(f"{where} is damaged and skipped: {error}", stacklevel=2)
            else:
                _check_version(where, version)
                return Saved(step, saved["arrays"], notes, where)
        return None


def read_notes(directory: str | os.PathLike[str]) -> dict[int, tuple[dict[str, Any], int]]:
    """Return the notes and the format version of each complete checkpoint, by step.

    The folder is only read; a run may be writing to it.

    Raises:
        ValueError: If a checkpoint is damaged, or has another format version.
        ImportError: If Orbax is not installed.
    """
    orbax, directory = _import_orbax(), Path(directory).absolute()
    options = orbax.CheckpointManagerOptions(read_only=True, create=False)
    found = {}
    with orbax.CheckpointManager(directory, options=options) as manager:
        for step in sorted(manager.all_steps()):
            where, items = directory / str(step), {"notes": orbax.args.JsonRestore()}
            try:
                saved = manager.restore(step, args=orbax.args.Composite(**items))
                found[step] = _notes(step, saved["notes"])
            except Exception as error:  # Orbax may raise anything for a damaged checkpoint.
                raise ValueError(f"{where} is damaged: {error}") from error
            _check_version(where, found[step][1])
    return found


def _import_orbax() -> Any:
    try:
        import orbax.checkpoint as orbax
    except ModuleNotFoundError as error:
        if error.name not in ("orbax", "orbax.checkpoint"):
            raise
        raise ImportError("checkpoints need Orbax: pip install 'orlomo-jax[checkpoint]'") from error
    return orbax


def _notes(step: int, saved: Any) -> tuple[dict[str, Any], Any]:
    """Return a checkpoint's notes and format version; early checkpoints do not state it."""
    of_step, notes, *version = saved
    if of_step != step or not isinstance(notes, dict) or len(version) > 1:
        raise ValueError(f"its notes are of step {of_step}")
    return notes, version[0] if version else _FORMAT_VERSION


def _check_version(where: Path, version: Any) -> None:
    try:
        check_format_version(version, _FORMAT_VERSION)
    except ValueError as error:
        raise ValueError(f"the checkpoint {where} cannot be read: {error}") from None
