"""Ctrl-C, put off to a moment at which a run can be saved."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator

_log = logging.getLogger("orlomo_jax")


@contextlib.contextmanager
def put_off_interrupts(active: bool) -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C, for the caller to save and leave; a second one comes at once.

    KeyboardInterrupt is raised at the end of the context. Nothing is put off outside the main
    thread, or where the program handles Ctrl-C in its own way.

    Args:
        active: Whether to put anything off.

    Yields:
        A function that returns whether Ctrl-C was pressed.
    """
    pressed, default = threading.Event(), signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    if not (active and main and signal.getsignal(signal.SIGINT) is default):
        yield pressed.is_set
        return

    def note(signum, frame):
        signal.signal(signal.SIGINT, default)
        _log.warning("interrupted: a checkpoint is saved first; press Ctrl-C again to stop at once")
        pressed.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, default)
    if pressed.is_set():
        raise KeyboardInterrupt
