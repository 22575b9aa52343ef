"""Programs that a model wrote, run where they can do no harm: which protection this machine allows, and the confined
process (sandbox_inside.py) that a reward worker talks to.

Left out: languages other than Python, packages beyond its standard library, and a defence against flaws of the kernel.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasoner.errors import RewardError
from reasoner.rewards.sandbox_calls import Broken, read_frame, to_wire, write_frame
from reasoner.rewards.sandbox_confine import FILE_BYTES, FOLDER, FOLDER_BYTES, MACHINES, OPEN_FILES, can_filter
from reasoner.rewards.sandbox_inside import BUBBLEWRAP, LANDLOCK, NAMESPACES, NOTHING

START_S = 20.0  # for an interpreter to start on a busy machine; 0.3 s on an idle one
GRACE_S = 1.0  # from a program's own limit to the end of the process that runs it
ACCEPTED = "completions run with my rights"
PACKAGE_ROOT = str(Path(__file__).parents[2])
START = "import sys; sys.path.append(sys.argv[4]); from reasoner.rewards import sandbox_inside; sandbox_inside.main()"
# Each line is true where the protection fails; a method that lets any of them happen is not used.
SELF_CHECK = """
import os, socket, sys
def can(act):
    try:
        act()
    except (OSError, AttributeError):
        return False
    return True
print([can(lambda: os.fork() or os._exit(0)), can(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)),
       can(lambda: open(input())), can(lambda: open(input(), "w")), can(lambda: os.kill(os.getppid(), 0))])
"""
SAYS = {
    BUBBLEWRAP: "bubblewrap's namespaces, a filter of system calls and limits",
    NAMESPACES: "namespaces of its own, a filter of system calls and limits",
    LANDLOCK: "Landlock, a filter of system calls and limits, as this machine allows no namespaces",
    NOTHING: "limits alone, as the conf accepts",
}
STOPS_NOT = {
    BUBBLEWRAP: "a flaw in the kernel",
    NAMESPACES: "a flaw in the kernel",
    LANDLOCK: "looking up which files there are and how large, and a flaw in the kernel",
    NOTHING: "reading and changing whatever you can",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one completion may use. `total_s` bounds all its tests together; seconds are wall time.

    >>> Limits(test_s=2.0, total_s=4.0, memory_mib=512)
    """

    test_s: float
    total_s: float
    memory_mib: int


class SandboxError(RuntimeError):
    """The sandbox could not be started, or ended: a fault of the machine or ours, never of the program."""


class Sandbox:
    """One confined process, started at need and again after it ended. Used by one thread at a time."""

    def __init__(self, method: str):
        self.method = method
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, quiet: bool = False) -> None:
        """Start it unless it runs. Raises SandboxError, saying what was refused."""
        if self._process is not None:
            return
        read_only = _needed_paths()
        inside = [_python(), "-P", "-s", "-S", "-X", "utf8", "-c", START]
        inside += [self.method, str(os.getpid()), json.dumps(read_only), PACKAGE_ROOT]
        command = [*_bubblewrap(read_only), *inside] if self.method == BUBBLEWRAP else inside
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            start_new_session=True,
            cwd="/",
            # The same hashes in every run, and none of the user's variables.
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TMPDIR": FOLDER, "HOME": FOLDER},
        )
        try:
            reply = self._read(time.monotonic() + START_S)
        except SandboxError:
            raise SandboxError(f"the sandbox ({self.method}) did not start") from None
        if "ready" not in reply:
            self.close()
            raise SandboxError(f"the sandbox ({self.method}) was refused: {reply.get('fault')}")

    def outputs(self, source: str, inputs: Iterable[str], limits: Limits) -> Generator[str | None, None, None]:
        """What the program writes for each input, run as a script of its own each time; None where it fails or goes
        over a limit.
        """
        tests = ({"input": text} for text in inputs)
        yield from (reply.get("text") for reply in self._answers({"kind": "stdin"}, source, tests, limits))

    def values(
        self, source: str, entry: str, calls: Iterable[Sequence[Any]], limits: Limits
    ) -> Generator[str | None, None, None]:
        """What the program's function returns for each call's arguments, as sandbox_calls.to_wire has it, in JSON."""
        tests = ({"arguments": to_wire(list(arguments))} for arguments in calls)
        head = {"kind": "call", "entry": entry}
        yield from (reply.get("text") for reply in self._answers(head, source, tests, limits))

    def _answers(
        self, head: Mapping[str, Any], source: str, tests: Iterable[Mapping[str, Any]], limits: Limits
    ) -> Generator[Any, None, None]:
        ends = self._begin(head, source, limits)
        in_step = True  # it waits for the next test
        try:
            for test in tests:
                in_step = False
                self._write(test)
                reply = self._read(ends)
                in_step = True
                yield reply
        finally:  # at the end, and where the caller has seen enough
            if in_step and self._process is not None:
                self._write(None)

    def judge(self, source: str, tests: Mapping[str, Any], limits: Limits, *, partial: bool) -> tuple[list[bool], bool]:
        """Which tests passed, and whether they came to their end; see sandbox_tests.run_tests. Without `partial` up to
        the first failure. Raises ValueError for tests that can't be run here.
        """
        ends = self._begin({"kind": "tests", "partial": partial}, source, limits)
        self._write(tests)
        passed: list[bool] = []
        unfit = ""
        while True:
            reply = self._read(ends)
            if "passed" in reply:
                passed.append(bool(reply["passed"]))
            elif "unfit" in reply:
                unfit = str(reply["unfit"])
            elif "end" in reply:
                break
            else:
                self.close()
                raise SandboxError(f"the sandbox failed: {reply.get('fault')}")
        if unfit:
            raise ValueError(unfit)
        return passed, bool(reply["end"])

    def _begin(self, head: Mapping[str, Any], source: str, limits: Limits) -> float:
        self.start()
        shared = {"test_s": limits.test_s, "total_s": limits.total_s, "memory_mib": limits.memory_mib}
        self._write({**head, **shared, "source": source})
        return time.monotonic() + limits.total_s + GRACE_S

    def _write(self, message: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            write_frame(self._process.stdin.fileno(), message)
        except BrokenPipeError:
            self.close()
            raise SandboxError("the sandbox ended") from None

    def _read(self, deadline: float) -> Any:
        assert self._process is not None and self._process.stdout is not None
        try:
            return read_frame(self._process.stdout.fileno(), deadline)
        except Broken as error:
            self.close()
            raise SandboxError(f"the sandbox gave no verdict: {error}") from None

    def close(self) -> None:
        """End the process and all that runs in it."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        process.kill()  # its children die with it
        process.wait()
        with suppress(OSError):
            process.stdin.close()
        process.stdout.close()


def _python() -> str:
    return os.path.realpath(sys.executable)


def _needed_paths() -> list[str]:
    """What an interpreter reads: its own installation and the system's libraries."""
    paths = [sys.base_prefix, sys.base_exec_prefix, "/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache"]
    real = {os.path.realpath(path) for path in paths}
    return [
        path
        for path in dict.fromkeys(paths)
        if os.path.lexists(path) and not any(path != other and path.startswith(other + "/") for other in real)
    ]


def _bubblewrap(read_only: Sequence[str]) -> list[str]:
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--dev",
        "/dev",
        "--remount-ro",
        "/dev",
    ]
    command += ["--size", str(FOLDER_BYTES), "--tmpfs", FOLDER, "--chdir", FOLDER]
    for path in (*read_only, str(Path(PACKAGE_ROOT, "reasoner"))):
        link = os.path.islink(path)
        command += ["--symlink", os.readlink(path), path] if link else ["--ro-bind", path, path]
    return [*command, "--remount-ro", "/"]


def holds(method: str) -> str:
    """Why the method does not protect on this machine, "" if it does: it is started and tried."""
    if method == BUBBLEWRAP and not shutil.which("bwrap"):
        return "bwrap is not installed"
    if not can_filter():
        return f"system calls are filtered on Linux ({', '.join(MACHINES)}) only"
    sandbox = Sandbox(method)
    with tempfile.NamedTemporaryFile(prefix="reasoner-") as canary:
        try:
            sandbox.start(quiet=True)
            limits = Limits(5.0, 5.0, 512)
            said = next(iter(sandbox.outputs(SELF_CHECK, [f"{canary.name}\n{canary.name}\n"], limits)))
        except SandboxError as error:
            return str(error)
        finally:
            sandbox.close()
    return "" if said == f"{[False] * 5}\n" else f"the sandbox ({method}) does not hold: {said}"


def protection(key: str, unsandboxed: str) -> tuple[str, str]:
    """The best method that holds here, and a line about it. `key` names the reward part in errors.

    Raises RewardError where none holds, unless `unsandboxed` says ACCEPTED, and where it says anything else.
    """
    if unsandboxed not in ("", ACCEPTED):
        raise RewardError(f'{key}.options.unsandboxed={unsandboxed!r}: write "{ACCEPTED}", or leave it out')
    refused = []
    for method in (BUBBLEWRAP, NAMESPACES, LANDLOCK):
        why = holds(method)
        if not why:
            return method, _line(method)
        refused.append(why)
    if unsandboxed != ACCEPTED or sys.platform == "win32":
        raise RewardError(
            f"{key}: this machine allows no sandbox for the programs that a model writes: {'; '.join(refused)}. "
            "Install bubblewrap, or allow user namespaces (in a container: another seccomp profile), or, if you "
            f'accept that they read and change whatever you can, set {key}.options.unsandboxed="{ACCEPTED}"'
        )
    return NOTHING, _line(NOTHING)


def _line(method: str) -> str:
    return (
        f"programs that the model writes run under {SAYS[method]} ({FILE_BYTES >> 20} MiB a file, {OPEN_FILES} open "
        f"files, time and memory by the options); that doesn't stop {STOPS_NOT[method]}"
    )
