"""What the benchmarks share: what a result says of itself, the device's memory over time, other processes with a time
limit, and one judge of texts for every trainer.

Left out: what is measured.
"""

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from reasoner.evaluate import ProblemResult, paired_gain
from reasoner.intervals import wilson
from reasoner.rewards.answers import final_answer, same_number
from reasoner.summary import commit, versions

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
CONTEXT_GIB = 0.75  # of a card, for CUDA and the desktop
POLL_S = 0.02  # between two looks at the device's memory
KILL_AFTER_S = 20.0  # from asking a process to end to ending it
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def about(command: str, at: str | None = None) -> dict[str, Any]:
    """What every result says of itself; `at` is the commit where the checkout's history is not there."""
    return {
        "command": command,
        "commit": commit() or at,
        "versions": versions(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "machine": f"{os.cpu_count()} CPU cores",
    }


def bytecode_folder() -> dict[str, str]:
    """The environment in which a process keeps its modules' bytecode, so that a later one need not compile them.

    Empty where Python keeps it by itself: where torch, which is imported by now, has some.
    """
    assert torch.__spec__ is not None and torch.__spec__.cached is not None
    if Path(torch.__spec__.cached).exists():
        return {}
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(caches / "reasoner-benchmarks" / "bytecode")}


def write_json(path: Path, value: Any) -> None:
    """The value as JSON, whole or not at all; numbers that are not finite are null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """What the file holds, None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def median(values: Iterable[float | None]) -> float | None:
    """The median of the numbers among the values, None where there are none."""
    found = [value for value in values if value is not None and value == value]
    return statistics.median(found) if found else None


def after_warm_up(steps: Sequence[Mapping[str, Any]], warm_up: int = 3) -> Sequence[Mapping[str, Any]]:
    """The steps that count: all but the first three, and at least half of them."""
    return steps[min(warm_up, len(steps) // 2) :]


class DeviceMemory(threading.Thread):
    """Looks at the device's used memory, whoever uses it, every 20 ms. Without a GPU every number is None."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._most_used: float | None = None
        self._reset_wanted = False
        if torch.cuda.is_available():
            torch.cuda.init()
            self._most_used = self._used()
            self.start()

    @property
    def peak_gib(self) -> float | None:
        """The most that was in use since the start or the last reset, GiB."""
        return self._most_used

    def used_gib(self) -> float | None:
        """What is in use now."""
        return self._used() if torch.cuda.is_available() else None

    def reset(self) -> None:
        """Forget the peak."""
        self._most_used = self.used_gib()

    def run(self) -> None:
        """The thread's loop."""
        while True:
            self._most_used = max(self._most_used or 0.0, self._used())
            time.sleep(POLL_S)

    @staticmethod
    def _used() -> float:
        free, total = torch.cuda.mem_get_info()
        return (total - free) / GIB


@dataclass(slots=True)
class Job:
    """A process of its own, with a log and a time limit. `ready` says when it may begin; only then is `command` asked
    for."""

    name: str
    command: Callable[[], Sequence[str]]
    log: Path
    limit_s: float
    ready: Callable[[], bool] = lambda: True
    environment: Mapping[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None
    began: float = 0.0
    ended_by_us: bool = False

    def start(self) -> None:
        """Begin; output goes to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command()],
                env={**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def done(self) -> bool:
        """Whether it has ended. Past its limit it is asked to, and after 20 s made to."""
        assert self.process is not None
        if self.process.poll() is not None:
            self.kill()  # whatever it left behind
            return True
        over = time.monotonic() - self.began - self.limit_s
        if over > KILL_AFTER_S:
            self.kill()
            self.process.wait()
            return True
        if over > 0 and not self.ended_by_us:
            self.ended_by_us = True
            self.process.terminate()
        return False

    def kill(self) -> None:
        """End it and all that it started."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def problem(self) -> str | None:
        """What went wrong in one line, None if it ended well."""
        assert self.process is not None
        if self.process.returncode == 0:
            return None
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        why = f"over its limit of {self.limit_s:.0f} s" if self.ended_by_us else f"exit {self.process.returncode}"
        return f"{why}: {lines[-1][:300] if lines else 'no output'}"


def leave_when_asked() -> None:
    """From now on SIGTERM ends this process as an exception does, so that processes it started are ended too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def run_jobs(jobs: Sequence[Job], at_once: int, finished: Callable[[Job], None]) -> None:
    """Run the jobs, `at_once` side by side, in order; `finished` is called with each that ended.

    If this process is asked to end, they are ended first. A job that is not ready lets later ones pass; one that will
    never be ready, as nothing runs any more, is left out.
    """
    waiting, running = list(jobs), list[Job]()
    leave_when_asked()
    try:
        while waiting or running:
            for job in [job for job in running if job.done()]:
                running.remove(job)
                finished(job)
            ready = [job for job in waiting if job.ready()]
            if not ready and not running:
                return
            for job in ready[: at_once - len(running)]:
                waiting.remove(job)
                running.append(job)
                job.start()
                print(f"{job.name}: started", flush=True)
            time.sleep(0.2)
    finally:  # of those that still run, what they measured so far
        for job in running:
            job.kill()
            assert job.process is not None
            job.process.wait()
            finished(job)


def run_and_leave(action: Callable[[], None]) -> None:
    """Run the action and end the process: vLLM's own end, which can hang, is not what is measured."""
    code = 1
    try:
        action()
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def strict(text: str, gold: str) -> bool:
    """Whether the text gives the gold number as its answer, after #### or in a box: what the reward pays for."""
    said = final_answer(text)
    return said is not None and same_number(gold, said)


def lenient(text: str, gold: str) -> bool:
    """As `strict`, and where the text marks no answer its last number is taken for one."""
    said = final_answer(text)
    if said is None:
        numbers = NUMBER.findall(text.replace("$", ""))
        said = numbers[-1] if numbers else ""
    return same_number(gold, said)


def judged(texts: Sequence[str], golds: Sequence[str]) -> dict[str, Any]:
    """Accuracy of the texts, strict and lenient, in per cent with 95% intervals; `verdicts` holds each one's."""
    found: dict[str, Any] = {"problems": len(texts), "verdicts": {}}
    for name, judge in (("strict", strict), ("lenient", lenient)):
        right = [judge(text, gold) for text, gold in zip(texts, golds, strict=True)]
        low, high = wilson(sum(right), len(right))
        share = sum(right) / len(right)
        found[name] = {"accuracy": 100 * share, "low": 100 * low, "high": 100 * high}
        found["verdicts"][name] = "".join("01"[one] for one in right)
    return found


def gain(before: Mapping[str, Any], after: Mapping[str, Any], kind: str) -> dict[str, float]:
    """The paired change of accuracy between two of `judged`, in points with its 95% interval."""
    rows = [
        [ProblemResult(str(i), one == "1", False, 0, 0, 0, "") for i, one in enumerate(side["verdicts"][kind])]
        for side in (before, after)
    ]
    found = paired_gain(*rows)
    return {"points": found.points, "low": found.low, "high": found.high, "problems": found.problems}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def shown(value: float | None, digits: int = 2) -> str:
    """A number for a table, '-' where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
