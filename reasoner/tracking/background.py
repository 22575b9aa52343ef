"""A tracker in a thread of its own: a service that is slow, unreachable or broken costs the run one line and no time.

What a tracker says is kept until the run's own thread asks for it, so that no two threads write to one screen. Left
out: trying again. Every number is in metrics.jsonl.
"""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from reasoner.tracking.values import OFF, first_line

Say = Callable[[str], None]
MAX_WAITING = 10_000  # rows that a slow service may be behind; later ones are left out
CLOSE_S = 60.0  # that a run's end waits for a service


class Background:
    """A Tracker that does another one's work behind the run's back. `make` is called in the thread too, as logging in
    may take long."""

    def __init__(self, name: str, make: Callable[[Say], Any], say: Say):
        self._name = name
        self._make = make
        self._say = say
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._work: queue.Queue[Callable[[Any], None] | None] = queue.Queue(MAX_WAITING)
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
        """See Tracker: waits for at most a minute."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._left_out:
            self._say(f"{self._name}: too slow, {self._left_out:,} rows were left out; metrics.jsonl has all")
        try:
            self._work.put(None, timeout=CLOSE_S)
            thread.join(CLOSE_S)
        except queue.Full:
            pass  # said below, as the thread still works
        self._tell()
        if thread.is_alive():
            self._say(f"{self._name}: not done {CLOSE_S:.0f} s after the run, it is left behind; metrics.jsonl has all")

    def _later(self, work: Callable[[Any], None]) -> None:
        self._tell()
        try:
            self._work.put_nowait(work)
        except queue.Full:
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
            return None


def _done(work: Callable[[Any], None], tracker: Any) -> bool:
    work(tracker)
    return True
