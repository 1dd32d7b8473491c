"""Files that one run at a time writes to."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import IO

_FAR = 2**31 - 2
"""Where Windows locks a byte: it lets nobody read what is locked, so beyond all content."""

_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


def open_alone(path: Path) -> IO[bytes]:
    """Open a file to append to it, and lock it until it is closed or the process ends.

    Where there are no locks (some network drives and platforms), the file is opened without one.

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
