"""Delays Ctrl-C until a run can be saved."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator

_log = logging.getLogger("orlomo_jax")


@contextlib.contextmanager
def put_off_interrupts(active: bool) -> Iterator[Callable[[], bool]]:
    """Delay the first Ctrl-C to the end of the context; a second one interrupts at once.

    It does nothing outside the main thread, or if the program has its own handler for Ctrl-C.

    Args:
        active: Whether to delay Ctrl-C.

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
        _log.warning("interrupted: saving a checkpoint first; press Ctrl-C again to stop at once")
        pressed.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, default)
    if pressed.is_set():
        raise KeyboardInterrupt
