"""Opens the checkpoint folder of a run, which belongs to one run only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments import records
from orlomo_jax import Checkpointer


def open_checkpoints(folder: Path | None, every: int, resume: bool) -> Checkpointer | None:
    """Return where to save and resume, None without a folder; raise if the flags do not fit."""
    if folder is None:
        if resume:
            raise ValueError("--resume needs --checkpoint-dir")
        return None
    checkpoint = Checkpointer(folder, every)
    if not resume and (checkpoint.steps() or (folder / "arrivals.jsonl").exists()):
        raise ValueError(
            f"{folder} holds checkpoints: add --resume to continue from the newest, or choose "
            "another --checkpoint-dir"
        )
    return checkpoint


def claim(
    checkpoint: Checkpointer, mine: dict[str, Any], older: dict[str, Any] | None = None
) -> None:
    """Write a run's settings to its checkpoint folder, or raise ValueError if others are there.

    Args:
        checkpoint: The run's checkpoints.
        mine: The settings, which JSON can write.
        older: The values of settings that a folder of an older version may lack.
    """
    path = checkpoint.directory / "run.json"
    if not path.exists():
        if checkpoint.steps():
            raise ValueError(
                f"{path} is missing, so these checkpoints cannot be matched to a run; choose "
                "another --checkpoint-dir"
            )
        records.write(path, json.dumps(mine))
        return
    try:
        theirs = (older or {}) | dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged; remove it if the folder belongs to this run: {error}"
        ) from None
    others = [name for name, value in mine.items() if theirs.get(name) != value]
    if others:
        raise ValueError(f"{path} is of a run with another {', '.join(others)}")
