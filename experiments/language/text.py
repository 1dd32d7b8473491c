"""Reads text as bytes, holds files out, divides the rest among workers, and draws batches."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HELD_OUT_SHARE = 0.05
"""The largest share of the bytes that is held out, unless every file is larger."""
EVALUATED_BYTES = 16_384
"""Held-out bytes that an evaluation predicts, at least."""
SHARDS = ("shared", "disjoint", "unequal")
Shards = Literal["shared", "disjoint", "unequal"]
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


class Text(NamedTuple):
    """Training text and held-out text, as bytes.

    Attributes:
        train: uint8[n].
        held_out: uint8[m], of other files than ``train``.
        file_ends: Where each file of ``train`` ends, int64[number of files].
        digest: The first 16 hexadecimal digits of a SHA-256 of both texts.
    """

    train: np.ndarray
    held_out: np.ndarray
    file_ends: np.ndarray
    digest: str


@lru_cache(maxsize=4)
def load(paths: tuple[Path, ...] = ()) -> Text:
    """Read text files; a process reads the same paths only once.

    The file to hold out is chosen by a hash of its path relative to the folder, so that a text
    in other places or in another order of reading is split in the same way.

    Args:
        paths: Files, and folders of text files. () is Python's standard library.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If there are fewer than two files with text, so that none can be held out.
    """
    files = _standard_library() if not paths else _files_of(paths)
    where = ", ".join(map(str, paths)) or "Python's standard library"
    names = _held_out({name: len(content) for name, content in files.items()}, where)
    kept = [content for name, content in files.items() if name not in names]
    train = b"".join(kept)
    held_out = b"".join(content for name, content in files.items() if name in names)
    digest = hashlib.sha256(b"%d %d " % (len(train), len(held_out)) + train + held_out)
    return Text(
        np.frombuffer(train, np.uint8),
        np.frombuffer(held_out, np.uint8),
        np.cumsum([len(content) for content in kept]),
        digest.hexdigest()[:16],
    )


def _standard_library() -> dict[str, bytes]:
    """Return the modules of the running Python that every installation has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if not _LEFT_OUT & set(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")  # says where Python was installed
    }
    return {name: found[name].read_bytes() for name in sorted(found)}


def _files_of(paths: Sequence[Path]) -> dict[str, bytes]:
    """Return the contents of files by name; each file once, without empty and binary ones."""
    found: dict[str, bytes] = {}
    seen: set[Path] = set()
    for path in paths:
        for name, file in sorted(_named(path)):
            if file.resolve() in seen:  # or a held-out file could be trained on
                continue
            seen.add(file.resolve())
            content = file.read_bytes()
            if content and b"\0" not in content[:8192]:
                found[name if name not in found else str(file)] = content
    return found


def _named(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield a file, or the files of a folder that are not hidden, with their relative paths."""
    if not path.exists():
        raise FileNotFoundError(f"`text` must name files or folders that exist, got {path}")
    if path.is_file():
        yield path.name, path
        return
    for file in path.rglob("*"):
        relative = file.relative_to(path)
        if file.is_file() and not any(part.startswith((".", "__")) for part in relative.parts[:-1]):
            if not file.name.startswith("."):
                yield relative.as_posix(), file


def _held_out(sizes: dict[str, int], where: str) -> set[str]:
    """Return the names of the files to hold out: at most 5 % of the bytes, or the smallest file."""
    if len(sizes) < 2:
        raise ValueError(
            f"`text` must have two or more text files, because the held-out set consists of whole "
            f"files, got {len(sizes)} in {where}"
        )
    left, chosen = HELD_OUT_SHARE * sum(sizes.values()), set()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[name] <= left:
            chosen.add(name)
            left -= sizes[name]
    return chosen or {min(sizes, key=lambda name: (sizes[name], name))}


def shards(text: Text, num_workers: int, kind: Shards, context: int) -> np.ndarray:
    """Return where each worker's part of the training text begins and ends, int32[K, 2].

    Args:
        text: The text.
        num_workers: K.
        kind: "shared": every worker has the whole text. "disjoint": equal parts. "unequal": parts
            of whole files, with sizes about proportional to 1, 2, …, K.
        context: The length of the model's context; a part must have a byte more.

    Raises:
        ValueError: If ``kind`` is unknown, or a worker has too little text.

    Example:
        >>> zeros = np.zeros(600, np.uint8)
        >>> text = Text(zeros, zeros, np.array([90, 310, 600]), "")
        >>> shards(text, 2, "disjoint", 8).tolist(), shards(text, 2, "unequal", 8).tolist()
        ([[0, 300], [300, 600]], [[0, 90], [90, 600]])
    """
    total = len(text.train)
    if kind == "shared":
        bounds = np.tile([0, total], (num_workers, 1))
    elif kind in SHARDS:
        shares = np.ones(num_workers) if kind == "disjoint" else np.arange(1, num_workers + 1)
        cuts = np.rint(total * np.cumsum(shares)[:-1] / shares.sum()).astype(int)
        if kind == "unequal":
            distances = np.abs(text.file_ends[:, None] - cuts[None])
            cuts = text.file_ends[np.argmin(distances, axis=0)]
        ends = np.concatenate([[0], cuts, [total]])
        bounds = np.stack([ends[:-1], ends[1:]], axis=1)
    else:
        raise ValueError(f"`shards` must be one of {', '.join(SHARDS)}, got shards={kind!r}")
    sizes = bounds[:, 1] - bounds[:, 0]
    if sizes.min() < context + 1:
        worker = int(np.argmin(sizes))
        raise ValueError(
            f"`text` must give each worker at least context + 1 = {context + 1} bytes, got "
            f"{sizes[worker]} for worker {worker} of {num_workers} with shards={kind!r}"
        )
    return bounds.astype(np.int32)


@lru_cache(maxsize=64)
def batches(
    paths: tuple[Path, ...],
    kind: Shards,
    num_workers: int,
    num_local_steps: int | tuple[int, ...],
    batch_size: int,
    context: int,
) -> jax.tree_util.Partial:
    """Return the batch function of a run: random windows of each worker's part of the text.

    It returns uint8[S, batch_size, context + 1], which depends only on key, worker and round. Equal
    arguments give the same object, and the text is an argument of the compiled programs.

    Raises:
        ValueError: As in :func:`shards`.
    """
    text = load(paths)
    bounds = shards(text, num_workers, kind, context)
    draw = _drawing(num_local_steps if isinstance(num_local_steps, int) else 0, batch_size, context)
    return jax.tree_util.Partial(draw, _on_device(paths), jnp.asarray(bounds))


@lru_cache(maxsize=4)
def _on_device(paths: tuple[Path, ...]) -> jax.Array:
    return jnp.asarray(load(paths).train)


@lru_cache
def _drawing(num_local_steps: int, batch_size: int, context: int) -> Callable:
    """Return one function for all runs of a shape, so that they share a program."""

    def draw(train, bounds, key, worker, round, steps=num_local_steps):
        key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
        begin, end = bounds[worker]
        first = jax.random.randint(key, (steps, batch_size), begin, end - context)
        return train[first[..., None] + jnp.arange(context + 1)]

    return draw


def held_out_windows(text: Text, context: int) -> np.ndarray:
    """Return evenly spaced windows of the held-out text, uint8[n, context + 1].

    They predict ``EVALUATED_BYTES`` bytes or more; in a short text they overlap.

    Raises:
        ValueError: If the held-out text is shorter than a window.
    """
    last = len(text.held_out) - (context + 1)
    if last < 0:
        raise ValueError(
            f"`text` must have held-out files of at least context + 1 = {context + 1} bytes, got "
            f"{len(text.held_out)}"
        )
    first = np.linspace(0, last, -(-EVALUATED_BYTES // context)).astype(int)
    return text.held_out[first[:, None] + np.arange(context + 1)]


@lru_cache(maxsize=16)
def evaluation(paths: tuple[Path, ...], context: int, loss_fn: Callable) -> jax.tree_util.Partial:
    """Return ``evaluate(params, model_state)``: the held-out loss in nats per byte.

    Args:
        paths: As in :func:`load`.
        context: The length of the model's context.
        loss_fn: As in :func:`orlomo_jax.simulate`; it gets windows as batches.
    """
    windows = held_out_windows(load(paths), context)
    return jax.tree_util.Partial(_mean_loss(loss_fn), jnp.asarray(windows))


@lru_cache(maxsize=16)
def _mean_loss(loss_fn: Callable) -> Callable:
    @jax.jit
    def evaluate(windows: jax.Array, params: Any, model_state: Any) -> dict[str, jax.Array]:
        key = jax.random.key(0)
        loss = lambda window: loss_fn(params, model_state, window[None], key)[0]  # noqa: E731
        return {"loss": jax.lax.map(loss, windows, batch_size=32).mean()}

    return evaluate
