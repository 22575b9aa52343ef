"""One run a folder: a lock file that names its holder, taken over when that holder is dead.

A holder is told from a later process with the same number by its start time, in kernel ticks since boot, which no clock
change moves. Left out: asking whether a process lives on another host, or on a system without /proc. There the lock
counts as held, and the message names the file.
"""

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from reasoner.errors import RunFolderError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lock.

    >>> Holder(pid=4711, host="desk", boot_id="1fbb2704-96e3-4596-9953-59204196800f", started="183406")
    """

    pid: int
    host: str
    boot_id: str
    started: str  # ticks since boot; empty where the system does not say

    @classmethod
    def this_process(cls) -> "Holder":
        """Us."""
        boot_id = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
        return cls(os.getpid(), socket.gethostname(), boot_id, _started(os.getpid()))

    def is_dead(self, me: "Holder") -> bool:
        """True only where it is certain: the host booted since, or no process of that number and start time lives."""
        if self.host != me.host or not me.started:
            return False
        return self.boot_id != me.boot_id or _started(self.pid) != self.started


def _started(pid: int) -> str:
    """When the kernel started the process: field 22 of /proc/PID/stat, proc(5). Empty without one, or for a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return "" if fields[0] in "ZX" else fields[19]


class Lock:
    """A held lock file."""

    def __init__(self, path: Path, holder: Holder):
        self.path = path
        self.holder = holder

    @classmethod
    def take(cls, path: Path) -> "Lock":
        """The lock at `path`, ours from here on.

        Raises RunFolderError naming the pid if another run holds it; OSError if the file can't be written.
        """
        me = Holder.this_process()
        while not _create(path, me):
            holder = _read(path)
            if holder is None and not path.exists():
                continue  # released since we looked
            if holder is None:
                raise RunFolderError(f"the lock {path} can't be read: delete it if no run is using {path.parent}")
            if not holder.is_dead(me):
                raise RunFolderError(
                    f"{path.parent} is in use by another run, pid {holder.pid} on {holder.host}: wait for it, "
                    f"choose out=OTHER, or delete {path} if that run is over"
                )
            _remove(path, holder)
        return cls(path, me)

    def release(self) -> None:
        """Let go; a lock that is no longer ours stays."""
        if _read(self.path) == self.holder:
            self.path.unlink()


def _create(path: Path, holder: Holder) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, json.dumps(asdict(holder)).encode())
        os.fsync(descriptor)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)
    return True


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _remove(path: Path, dead: Holder) -> None:
    """Take the dead holder's file away. If another run was quicker, what we moved is its lock: it is put back."""
    moved = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        os.rename(path, moved)
    except FileNotFoundError:
        return
    if _read(moved) != dead and not path.exists():
        os.rename(moved, path)
    else:
        moved.unlink()
