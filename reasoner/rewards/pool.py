"""Processes that call reward functions, each call under a hard limit: a hang, a crash or a flood of memory costs that
call alone.

Each process is a fresh interpreter (worker.py), never a fork, so CUDA in the parent is no concern. It has a process
group of its own, which a Ctrl-C in the terminal doesn't reach and which is killed whole; on Linux the kernel kills it
when the parent dies. Left out: a sandbox. Rewards run with the rights of the user.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reasoner.rewards.worker import FAILED, LOADED, NAMED, RETURNS_ONE, UNLOADABLE, Source

START_S = 120.0  # for loading: a reward's module may import torch on a busy machine
MEMORY_GIB = 4  # private memory of a worker; math-verify takes 0.1, `import torch` 0.5
WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, slots=True)
class Setup:
    """What every worker loads: the source of each part's function, and where modules are found.

    >>> Setup(sources={"accuracy": ("module", "reasoner.rewards.math", "accuracy", b"")}, sys_path=tuple(sys.path))
    >>> Setup(sources={"mine": ("file", "/home/me/my_reward.py", "score", b"def score(...): ...")}, sys_path=())
    """

    sources: Mapping[str, Source]
    sys_path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One function to call once. `imports` are modules to load first, outside the limit; `returns` is what its kind of
    function promises.

    >>> Call("accuracy", {"completion": "#### 4", "answer": "4"}, timeout_s=5.0)
    """

    part: str
    arguments: Mapping[str, Any]
    timeout_s: float
    imports: tuple[str, ...] = ()
    returns: str = RETURNS_ONE


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call has no value."""

    reason: str


@dataclass(frozen=True, slots=True)
class Named:
    """A value, and the numbers that came with it by name.

    >>> Named(1.5, {"accuracy": 1.0, "format": 0.5})
    """

    value: float | None
    numbers: Mapping[str, float]


Outcome = float | Named | None | Failure


class Worker:
    """One place in the pool: a process, started at need and again after it had to be killed. One thread at a time
    calls it.
    """

    def __init__(self, setup: Setup):
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._imported: set[str] = set()
        self._expired = False

    def load(self) -> tuple[Any, ...]:
        """A new process's reply to the setup: (LOADED, parameters by part) or what is wrong with which part."""
        command = [sys.executable, "-P", str(WORKER), str(os.getpid()), str(MEMORY_GIB << 30)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._imported.clear()
        request = {"sources": dict(self._setup.sources), "sys_path": list(self._setup.sys_path)}
        reply = self._ask(pickle.dumps(request), START_S)
        return reply if reply else (UNLOADABLE, "", f"{self._end(START_S)} while loading", None)

    def run(self, call: Call) -> Outcome:
        """What the function returned, or why it returned nothing."""
        try:
            blob = pickle.dumps(dict(call.arguments))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            return Failure(f"the row can't be sent to a worker: {error}")
        if self._process is None:
            loaded = self.load()
            if loaded[0] != LOADED:
                self.stop()
                return Failure(f"its worker could not be started again: {loaded[2]}")
        for module in call.imports:
            if module not in self._imported:
                outcome = self._call("import", module, b"", RETURNS_ONE, START_S)
                if outcome is not None:
                    return outcome
                self._imported.add(module)
        return self._call("call", call.part, blob, call.returns, call.timeout_s)

    def _call(self, kind: str, name: str, blob: bytes, returns: str, limit_s: float) -> Outcome:
        reply = self._ask(pickle.dumps((kind, name, blob, returns)), limit_s)
        if reply is None or self._expired:
            return Failure(self._end(limit_s))
        if reply[0] == FAILED:
            return Failure(reply[1])
        return Named(*reply[1]) if reply[0] == NAMED else reply[1]

    def _ask(self, request: bytes, limit_s: float) -> tuple[Any, ...] | None:
        """The reply to a request; None where the process had to be killed or died on its own."""
        assert self._process and self._process.stdin and self._process.stdout
        self._expired = False
        timer = threading.Timer(limit_s, self._expire)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            return None
        finally:
            timer.cancel()
            timer.join()

    def _expire(self) -> None:
        self._expired = True
        self.kill()

    def _end(self, limit_s: float) -> str:
        """How the process ended; it is gone after this."""
        if self._expired:
            self.stop()
            return f"timed out after {limit_s:g} s"
        assert self._process
        with suppress(subprocess.TimeoutExpired):  # it closed its pipe: let it end, so that its own exit code is seen
            self._process.wait(timeout=1)
        code = self.stop()
        return f"its process died (signal {-code})" if code < 0 else f"its process ended (exit code {code})"

    def kill(self) -> None:
        """Kill the process and all that it started, from any thread; the thread that waits for its reply then goes
        on.
        """
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError, PermissionError):  # all of them ended by themselves; macOS says the second
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()

    def stop(self) -> int:
        """End the process for good and return its exit code (-9 if it had to be killed); 0 if there is none."""
        process = self._process
        if process is None:
            return 0
        assert process.stdin and process.stdout
        self.kill()
        code = process.wait()
        with suppress(OSError):  # a request half written to a dead process
            process.stdin.close()
        process.stdout.close()
        self._process = None
        return code


@dataclass(slots=True)
class Pool:
    """`size` workers, started as calls come in. Threads may share a pool; each call is judged on its own, in any
    worker.
    """

    setup: Setup
    size: int
    _executor: ThreadPoolExecutor = field(init=False)
    _workers: list[Worker] = field(init=False)
    _free: queue.LifoQueue[Worker] = field(
        init=False
    )  # last in, first out: a short batch goes to workers that are warm

    def __post_init__(self) -> None:
        # A process dies with the thread that started it (worker.py): the executor's threads live until close().
        self._executor = ThreadPoolExecutor(self.size, thread_name_prefix="reward")
        self._workers = [Worker(self.setup) for _ in range(self.size)]
        self._free = queue.LifoQueue()
        for worker in self._workers:
            self._free.put(worker)

    def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """The outcomes of the calls, in their order."""
        return list(self._executor.map(self._run_one, calls))

    def _run_one(self, call: Call) -> Outcome:
        worker = self._free.get()
        try:
            return worker.run(call)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """Kill the workers, a busy one too; its call then ends as a failure."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        self._executor.shutdown(wait=True)
        for worker in self._workers:
            worker.stop()
