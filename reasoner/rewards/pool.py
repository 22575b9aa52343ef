"""Processes that call reward functions, each call under a hard limit: a hang, a crash or a flood of memory costs that
call alone. A call far slower than those before it is waited for aside: another one takes its place.

Each process is a fresh interpreter (worker.py), never a fork, so CUDA in the parent is no concern. It has a process
group of its own, which a Ctrl-C in the terminal doesn't reach and which is killed whole; on Linux the kernel kills it
when the parent dies. Left out: a sandbox. Rewards run with the rights of the user.
"""

import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from reasoner.rewards.worker import FAILED, LOADED, NAMED, RETURNS_ONE, UNLOADABLE, Source

START_S = 120.0  # for loading: a reward's module may import torch on a busy machine
MEMORY_GIB = 4  # private memory of a worker; math-verify takes 0.1, `import torch` 0.5
ODD_S, ODD_FACTOR = 0.25, 4.0  # a call is odd over both: so many seconds, and so many times the slowest one before it
SHOWN_BYTES = 64 << 10  # of what a call prints: a loop that prints would fill the disk that keeps the log
MAX_ASIDE = 8  # odd calls at once: each may hold a core and MEMORY_GIB
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


class Patience(NamedTuple):
    """How long a reply is waited for: over `odd_s` another thread calls `on_odd`, over `limit_s` the process is
    killed.
    """

    limit_s: float
    odd_s: float = math.inf
    on_odd: Callable[[], None] = lambda: None


class Worker:
    """One place in the pool: a process, started at need and again after it had to be killed. One thread at a time
    calls it.
    """

    def __init__(self, setup: Setup):
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._imported: set[str] = set()
        self._expired = False
        self._shown_bytes = 0  # of what this call printed
        self.took_s = 0.0  # the last call of a function; 0 where it had no reply

    @property
    def running(self) -> bool:
        """Whether it has a process."""
        return self._process is not None

    def load(self) -> tuple[Any, ...]:
        """A new process's reply to the setup: (LOADED, parameters by part) or what is wrong with which part."""
        command = [sys.executable, "-P", str(WORKER), str(os.getpid()), str(MEMORY_GIB << 30)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        threading.Thread(target=self._show, args=(self._process.stderr,), daemon=True).start()
        self._imported.clear()
        request = {"sources": dict(self._setup.sources), "sys_path": list(self._setup.sys_path)}
        reply = self._ask(pickle.dumps(request), Patience(START_S))
        return reply if reply else (UNLOADABLE, "", f"{self._end(START_S)} while loading", None)

    def run(self, call: Call, odd_s: float = math.inf, on_odd: Callable[[], None] = lambda: None) -> Outcome:
        """What the function returned, or why it returned nothing. Another thread calls `on_odd` once the function
        takes longer than `odd_s`.
        """
        self.took_s, self._shown_bytes = 0.0, 0
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
                outcome = self._call("import", module, b"", RETURNS_ONE, Patience(START_S))
                if outcome is not None:
                    return outcome
                self._imported.add(module)
        began = time.monotonic()
        outcome = self._call("call", call.part, blob, call.returns, Patience(call.timeout_s, odd_s, on_odd))
        self.took_s = time.monotonic() - began if self.running else 0.0
        return outcome

    def _call(self, kind: str, name: str, blob: bytes, returns: str, patience: Patience) -> Outcome:
        reply = self._ask(pickle.dumps((kind, name, blob, returns)), patience)
        if reply is None or self._expired:
            return Failure(self._end(patience.limit_s))
        if reply[0] == FAILED:
            return Failure(reply[1])
        return Named(*reply[1]) if reply[0] == NAMED else reply[1]

    def _ask(self, request: bytes, patience: Patience) -> tuple[Any, ...] | None:
        """The reply to a request; None where the process had to be killed or died on its own."""
        assert self._process and self._process.stdin and self._process.stdout
        self._expired = False
        replied = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(replied, patience), daemon=True)
        watcher.start()
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            return None
        finally:
            replied.set()
            watcher.join()

    def _watch(self, replied: threading.Event, patience: Patience) -> None:
        first_s = min(patience.odd_s, patience.limit_s)
        if replied.wait(first_s):
            return
        if first_s < patience.limit_s:
            patience.on_odd()
            if replied.wait(patience.limit_s - first_s):
                return
        self._expired = True
        self.kill()

    def _show(self, printed: IO[bytes]) -> None:
        """Pass on to standard error what the process prints, the first SHOWN_BYTES of each call; read all of it."""
        with printed:
            while text := os.read(printed.fileno(), SHOWN_BYTES):
                room = SHOWN_BYTES - self._shown_bytes
                self._shown_bytes += len(text)
                with suppress(OSError):  # nobody may be reading it
                    os.write(2, text[: max(room, 0)])
                    if 0 <= room < len(text):
                        os.write(2, b"\n[a reward printed more than 64 KiB in one call; the rest is left out]\n")

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
    """`size` workers at once, started as calls come in, and at most MAX_ASIDE others in which odd calls end. Threads
    may share a pool; each call is judged on its own, in any worker.
    """

    setup: Setup
    size: int
    _executor: ThreadPoolExecutor = field(init=False)
    _workers: list[Worker] = field(init=False)
    _free: deque[Worker] = field(init=False)  # those with a process on the right, where they are taken from
    _handing_back: threading.Lock = field(default_factory=threading.Lock, init=False)
    _places: threading.Semaphore = field(init=False)
    _slowest: dict[str, float] = field(default_factory=dict, init=False)  # seconds of a part's slowest call so far
    _closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        # A process dies with the thread that started it (worker.py): the executor's threads live until close().
        self._executor = ThreadPoolExecutor(self.size + MAX_ASIDE, thread_name_prefix="reward")
        self._workers = [Worker(self.setup) for _ in range(self.size + MAX_ASIDE)]  # one a thread
        self._free = deque(self._workers)
        self._places = threading.Semaphore(self.size)

    def submit(self, call: Call) -> Future[Outcome]:
        """The outcome of the call, once there is one."""
        return self._executor.submit(self._run, call)

    def _run(self, call: Call) -> Outcome:
        aside = False

        def step_aside() -> None:
            nonlocal aside
            aside = True
            self._places.release()

        self._places.acquire()
        if self._closed:
            self._places.release()
            return Failure("the rewards were closed before it began")
        with self._handing_back:
            worker = self._free.pop()
        try:
            outcome = worker.run(call, self._odd_s(call.part), step_aside)
            self._slowest[call.part] = max(worker.took_s, self._slowest.get(call.part, 0.0))
            return outcome
        finally:
            with self._handing_back:  # of those that went aside, no more stay than there are places
                if sum(one.running for one in self._free) >= self.size:
                    worker.stop()
                (self._free.append if worker.running else self._free.appendleft)(worker)
            if not aside:
                self._places.release()

    def _odd_s(self, part: str) -> float:
        """Seconds after which a call is odd. Never before the part's first reply: it may be slow by nature."""
        slowest = self._slowest.get(part)
        return max(ODD_S, ODD_FACTOR * slowest) if slowest else math.inf

    def close(self) -> None:
        """Kill the workers, a busy one too; its call then ends as a failure."""
        self._closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        self._executor.shutdown(wait=True)
        for worker in self._workers:
            worker.stop()
