"""A tracker in a thread of its own: a service that is slow, unreachable or broken costs the run one line and no time.

What a tracker says is kept until the run's own thread asks for it, so that no two threads write to one screen. Left
out: trying again. Every number is in metrics.jsonl.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from reasoner.tracking.values import OFF, first_line

Say = Callable[[str], None]
MAX_WAITING = 10_000  # rows that a slow service may be behind; later ones are left out
CLOSE_S = 60.0  # that a run's end waits for its services, all together


class Background:
    """A Tracker that does another one's work behind the run's back. `make` is called in the thread too, as logging in
    may take long."""

    def __init__(self, name: str, make: Callable[[Say], Any], say: Say):
        self._name = name
        self._make = make
        self._say = say
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._work: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._left_out = 0
        self._thread: threading.Thread | None = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def log(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        """See Tracker."""
        self._later(lambda tracker: tracker.log(stage, step, row))

    def table(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See Tracker."""
        self._later(lambda tracker: tracker.table(stage, step, rows))

    def close(self) -> None:
        """See Tracker: waits for at most a minute; several are closed by close_all."""
        close_all([self])

    def _end(self) -> threading.Thread | None:
        """Let the thread finish what it has; returns it, None if it was told before."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._work.put(None)
        return thread

    def _ended(self, thread: threading.Thread) -> None:
        left_behind = thread.is_alive()  # asked first: the last words of a thread that has ended are all there
        self._tell()
        if self._left_out:
            self._say(f"{self._name}: too slow, {self._left_out:,} rows were left out; metrics.jsonl has all")
        if left_behind:
            self._say(f"{self._name}: not done {CLOSE_S:.0f} s after the run, it is left behind; metrics.jsonl has all")

    def _later(self, work: Callable[[Any], None]) -> None:
        self._tell()
        if self._work.qsize() < MAX_WAITING:  # not the queue's own limit: the end must always find room
            self._work.put(work)
        else:
            self._left_out += 1

    def _tell(self) -> None:
        while True:
            try:
                self._say(self._said.get_nowait())
            except queue.Empty:
                return

    def _serve(self) -> None:
        """The thread's work, in order; after an error the rest is taken and dropped."""
        tracker = self._try(lambda: self._make(self._said.put), OFF)
        while (work := self._work.get()) is not None:
            if tracker is not None and not self._try(partial(_done, work, tracker), "it is off from here on"):
                tracker = None
        if tracker is not None:
            self._try(tracker.close, "its last numbers may be missing there; metrics.jsonl has all")

    def _try(self, call: Callable[[], Any], consequence: str) -> Any:
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - a client raises what it likes; none of it is worth a night's training
            self._said.put(f"{self._name}: {first_line(error)}; {consequence}")
        except BaseException as error:  # noqa: BLE001 - sys.exit() would end the thread without a word; no Ctrl-C comes here
            self._said.put(f"{self._name}: its client raised {error!r}; {consequence}")
        return None


def close_all(trackers: Sequence[Background]) -> None:
    """End them all at once, so that together they take as long as the slowest, and a minute at most."""
    until = time.monotonic() + CLOSE_S
    ending = [(tracker, thread) for tracker in trackers if (thread := tracker._end())]
    for tracker, thread in ending:
        thread.join(max(0.0, until - time.monotonic()))
        tracker._ended(thread)


def _done(work: Callable[[Any], None], tracker: Any) -> bool:
    work(tracker)
    return True
