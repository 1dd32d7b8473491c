"""Opens files that only one run at a time may write to."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import IO

_FAR = 2**31 - 2
"""The byte that is locked on Windows: beyond all content, because locked bytes are unreadable."""

_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


def open_alone(path: Path) -> IO[bytes]:
    """Open a file for appending, and lock it until it is closed or the process ends.

    On network drives and platforms without locks, the file is opened without a lock.

    Raises:
        BlockingIOError: If another process, or another part of this one, has locked it.
    """
    file = path.open("ab", buffering=0)
    try:
        _lock(file.fileno())
    except OSError as error:
        if error.errno in _TAKEN:
            file.close()
            raise BlockingIOError(f"another process is writing {path}: is it alive?") from None
    return file


def _lock(descriptor: int) -> None:
    with contextlib.suppress(ImportError):
        import fcntl

        return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with contextlib.suppress(ImportError):
        import msvcrt

        os.lseek(descriptor, _FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # pyright: ignore
    return None
