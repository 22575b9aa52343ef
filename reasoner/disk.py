"""Writes that are whole or absent, and the words for a disk that refuses.

A file is replaced by a finished one (temporary file, fsync, rename), a line is appended whole or not at all. Left out:
retries. A full disk stays full until someone frees space, and the run's checkpoint waits for that.
"""

import errno
import os
from pathlib import Path

from reasoner.errors import RunFolderError

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is mounted read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EEXIST: "a file is in the way",
    errno.ENOTDIR: "a file is in the way",
    errno.EFBIG: "files may not grow that large here (see ulimit -f)",
}


def refusal(error: OSError, doing: str, remedy: str) -> RunFolderError:
    """The one line for a write that failed: what, why, what to do."""
    reason = REASONS.get(error.errno or 0, error.strerror or str(error))
    return RunFolderError(f"can't {doing}: {reason}; {remedy}")


def sync(path: Path) -> None:
    """Return once the file's bytes, or the folder's names, are on the disk."""
    if path.is_dir():
        if os.name != "posix":  # Windows neither opens nor needs a folder for this
            return
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes) -> None:
    """Make `path` hold exactly `data`; after a kill or an OSError it holds what it held before."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append(path: Path, data: bytes) -> None:
    """Add `data` at the file's end; on an OSError the file keeps its old length."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)
