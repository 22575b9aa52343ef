"""Ctrl-C and SIGTERM: the first asks the run to stop after its step, with a checkpoint; the second stops it at once.

Left out: the children's share. Whoever starts a process gives it a group of its own, or Ctrl-C in the terminal would
end it before the run could save.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from reasoner import world

STOPPING = b"\nstopping after this step, with a checkpoint; once more stops at once\n"

_received: list[int] = []


def requested() -> int | None:
    """The number of the signal that asked this process to stop, None if none did."""
    return _received[0] if _received else None


def agreed() -> int | None:
    """`requested()` of any rank, the same on all: one rank's signal stops all. Every rank calls it at one place."""
    return max((number for number in world.gather_over_ranks(requested()) if number is not None), default=None)


@contextmanager
def handled() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM are requests to stop; afterwards the old handlers are back and nothing is requested.

    In a thread other than the main one Python can set no handlers: then this does nothing, and the caller's own hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(number, _receive) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)
        _received.clear()


def _receive(number: int, frame: FrameType | None) -> None:
    if _received:
        os._exit(128 + number)
    _received.append(number)
    with suppress(OSError):  # nobody may be reading stderr any more
        os.write(2, STOPPING)  # unlike print, safe inside a handler
