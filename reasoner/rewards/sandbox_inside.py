"""The process that is confined first and then runs strangers' programs, each test in a fork of its own that can fork no
more. It is started once for many completions, so that a run costs a fork and no interpreter.

What a test expects never enters it: outputs and values go back to the reward's process and are compared there, and the
text of assertions is read by a second fork, apart from the program's (sandbox_tests.py). Standard library only.
"""

import atexit
import builtins
import fcntl
import importlib
import json
import math
import os
import select
import signal
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from reasoner.rewards import sandbox_calls, sandbox_confine, sandbox_tests
from reasoner.rewards.sandbox_calls import SOLUTION, Broken, Unfit, read_frame, write_frame

BUBBLEWRAP, NAMESPACES, LANDLOCK, NOTHING = "bubblewrap", "namespaces", "landlock", "unsandboxed"
OUTPUT_BYTES = 8 << 20
FAILED, TOO_LARGE = 1, 2  # exit codes of a program: an exception, too little memory
# Loaded once, so that a program that imports them waits for nothing.
PRELOADED = (
    *("array", "bisect", "cmath", "collections", "copy", "ctypes", "datetime", "decimal", "fractions", "functools"),
    *("heapq", "io", "itertools", "operator", "queue", "random", "re", "statistics", "string"),
)
RESULT, REQUESTS, REPLIES, ALIVE = 3, 4, 5, 6  # descriptors in a fork, after input, output and errors


def main() -> None:
    """Confine this process as the command line says, say so, then run what is asked for until the pipe is closed."""
    method, parent, paths = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    sys.path[:] = [path for path in sys.path if path != sys.argv[4]]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the trainer decides
    for name in PRELOADED:
        importlib.import_module(name)
    builtins.exit = builtins.quit = sys.exit  # which the module site brings, where it is loaded
    try:
        threads = _confine(method, parent, paths)
    except OSError as error:
        write_frame(1, {"fault": f"{error.strerror or error}"})
        return
    write_frame(1, {"ready": True})
    while True:
        try:
            head = read_frame(0)
        except Broken:
            return
        job = Job(head, has_folder=method in (BUBBLEWRAP, NAMESPACES), count_threads=threads)
        if head["kind"] == "tests":
            job.run_tests()
        else:
            job.run_inputs()


def _confine(method: str, parent: int, paths: Sequence[str]) -> bool:
    """Whether the number of threads can be limited."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")  # where memory runs out, the kernel ends a program before it ends the trainer
    if method != BUBBLEWRAP:  # which sees to it itself, and whose processes have other numbers
        sandbox_confine.die_with(parent)
    if method == NAMESPACES:
        sandbox_confine.enter_namespaces(paths)
    elif method == LANDLOCK:
        os.chdir("/")
        sandbox_confine.landlock(paths)
    if method != NOTHING:
        sandbox_confine.drop_capabilities()
    sandbox_confine.hide()
    return method in (BUBBLEWRAP, NAMESPACES) and sandbox_confine.threads_countable()


class Job:
    """One program, as `head` describes it: its source, the kind of tests, the function to call, its limits."""

    def __init__(self, head: Mapping[str, Any], *, has_folder: bool, count_threads: bool):
        self.head, self.has_folder, self.count_threads = head, has_folder, count_threads
        self.ends = time.monotonic() + head["total_s"]
        self.null = os.open(os.devnull, os.O_RDWR)

    def run_inputs(self) -> None:
        """Run the program on each input that arrives, and answer with its output, until there are no more."""
        while (test := read_frame(0)) is not None:
            deadline = min(self.ends, time.monotonic() + self.head["test_s"])
            write_frame(1, self._run(test, deadline) if deadline > time.monotonic() else {"ended": "no time left"})
        os.close(self.null)

    def _run(self, test: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        result, give = os.pipe()
        if self.head["kind"] == "stdin":
            given = _file_of(test["input"])
            pid = self._fork(lambda: as_program(self.head["source"]), [given, give, self.null])
            os.close(given)
        else:
            call = (self.head["source"], self.head["entry"], test["arguments"])
            pid = self._fork(lambda: as_function(*call), [self.null, self.null, self.null, give])
        os.close(give)
        text, why = _read_all(result, deadline)
        os.close(result)
        code = _reap(pid, None if why else deadline)
        self._wipe()
        if why or code != 0:
            return {"ended": why or ENDS.get(code, f"exit code {code}" if code > 0 else f"signal {-code}")}
        return {"text": text}

    def run_tests(self) -> None:
        """Start the program and, apart from it, its tests; these read their own text and say what passed."""
        asked, ask = os.pipe()
        answers, answer = os.pipe()
        alive, living = os.pipe()
        null, limit_s, partial = self.null, self.head["test_s"], self.head["partial"]
        # The program's fork is made while the tests' text is still in the pipe.
        program = self._fork(
            lambda: as_server(self.head["source"], RESULT, REQUESTS), [null, null, null, asked, answer]
        )
        tests = self._fork(lambda: as_tests(limit_s, partial), [0, null, null, 1, ask, answers, living])
        for descriptor in (asked, ask, answers, answer, living, null):
            os.close(descriptor)
        begun = _wait_for(alive, self.ends) == b"r"
        in_time = begun and _wait_for(alive, self.ends) == b""
        code = _reap(tests, self.ends if in_time else None)
        _reap(program, None)
        self._wipe()
        os.close(alive)
        if not begun or (in_time and code):
            write_frame(1, {"fault": f"the tests' process ended with {code}"})
            sys.exit(1)  # what is left in the pipe must not be read by a process that forks programs
        write_frame(1, {"end": in_time})

    def _fork(self, run: Callable[[], NoReturn], descriptors: Sequence[int]) -> int:
        """A process that has these descriptors as 0, 1, 2, ..., and nothing that it could harm with."""
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        try:
            sandbox_confine.die_with(parent)
            high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 32) for descriptor in descriptors]
            for i, descriptor in enumerate(high):
                os.dup2(descriptor, i)
            os.closerange(len(high), 1 << 16)
            cpu_s = math.ceil(self.head["total_s"] if self.head["kind"] == "tests" else self.head["test_s"]) + 1
            sandbox_confine.limit(self.head["memory_mib"] << 20, cpu_s, threads=self.count_threads)
            if sandbox_confine.can_filter():
                sandbox_confine.filter_calls()
            run()
        finally:
            os._exit(FAILED)

    def _wipe(self) -> None:
        """An empty folder for the next program. No depth of folders is too deep, as none is named by its path."""
        if not self.has_folder:
            return
        os.chdir(sandbox_confine.FOLDER)
        depth = 0
        while True:
            if _empty_here():
                if depth == 0:
                    return
                os.chdir("..")
                depth -= 1
            else:
                depth += 1


def _empty_here() -> bool:
    """Remove what is in the working folder; False, and go there, at a folder that has something in it."""
    for entry in list(os.scandir()):
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.name)
            continue
        try:
            os.rmdir(entry.name)
        except OSError:  # something is in it
            os.chmod(entry.name, 0o700)  # it may have been made so that nobody can list it
            os.chdir(entry.name)
            return False
    return True


ENDS = {FAILED: "an exception", TOO_LARGE: "more memory than it may have", -signal.SIGKILL: "killed at its limit"}


def _file_of(text: str) -> int:
    """A descriptor from which the text can be read."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("input")
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    view = memoryview(text.encode("utf-8", "replace"))
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _read_all(descriptor: int, deadline: float) -> tuple[str, str]:
    """What is written there, and why it was not read to its end, if so."""
    found = bytearray()
    while True:
        if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return "", "over its time"
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            return found.decode("utf-8", "replace"), ""
        found += piece
        if len(found) > OUTPUT_BYTES:
            return "", "more output than it may write"


def _wait_for(descriptor: int, deadline: float) -> bytes | None:
    """A byte, b"" once the other end is closed, None where the time is over."""
    ready = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]
    return os.read(descriptor, 1) if ready else None


def _reap(pid: int, deadline: float | None) -> int:
    """The exit code of a process, which is killed at the deadline; None: now."""
    while deadline is not None and time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def as_program(source: str) -> NoReturn:
    """Run the source as a script does, to the end of its threads and of what it registered for its end."""
    names = _module("__main__")
    code = _exit_code(lambda: exec(compile(source, "<completion>", "exec"), names))
    threading._shutdown()  # type: ignore[attr-defined]  executors' threads end there
    atexit._run_exitfuncs()  # programs print there
    names.clear()  # files that it left open are written out
    for stream in (sys.stdout, sys.__stdout__):
        with suppress(ValueError, AttributeError):  # closed, or put out of the way
            stream.flush()  # type: ignore[union-attr]
    os._exit(code)


def as_function(source: str, entry: str, arguments: Any) -> NoReturn:
    """Call the program's function and write its value where the result is read."""

    def call() -> None:
        names = _module(SOLUTION)
        exec(compile(source, "<completion>", "exec"), names)
        value = sandbox_calls.find(names, entry)(*sandbox_calls.from_wire(arguments))
        view = memoryview(json.dumps(sandbox_calls.to_wire(value, lambda _: 0)).encode())
        while view:
            view = view[os.write(RESULT, view) :]

    os._exit(_exit_code(call))


def as_server(source: str, requests: int, replies: int) -> NoReturn:
    """Run the program, then let the tests call its functions."""
    names = _module(SOLUTION)
    code = _exit_code(lambda: exec(compile(source, "<completion>", "exec"), names))
    if code == 0:
        sandbox_calls.serve_calls(names, requests, replies)
    os._exit(code)


def as_tests(limit_s: float, partial: bool) -> NoReturn:
    """Read the tests' text, run them, and say of each whether it passed; without `partial` up to the first failure."""
    tests = read_frame(0)
    os.write(ALIVE, b"r")
    os.dup2(1, 0)
    try:
        for passed in sandbox_tests.run_tests(tests, sandbox_calls.Line(REQUESTS, REPLIES, limit_s)):
            write_frame(RESULT, {"passed": passed})
            if not passed and not partial:
                break
    except Unfit as error:
        write_frame(RESULT, {"unfit": str(error)[:1000]})
    except Broken:
        pass  # in the tests' setup: nothing passed
    os._exit(0)


def _module(name: str) -> dict[str, Any]:
    """The names of a fresh module, with those of `typing`, which starter code takes for granted."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    if name == SOLUTION:
        module.__dict__.update({known: getattr(typing, known) for known in typing.__all__})
    sys.set_int_max_str_digits(0)
    return module.__dict__


def _exit_code(run: Callable[[], Any]) -> int:
    try:
        run()
    except MemoryError:
        return TOO_LARGE
    except SystemExit as error:
        return 0 if error.code is None else error.code & 0xFF if isinstance(error.code, int) else FAILED
    except BaseException:  # noqa: BLE001  a stranger's program: whatever it raises ends it
        return FAILED
    return 0
