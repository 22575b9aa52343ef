"""Writes that are whole or absent (G2)."""

import errno
import os
from pathlib import Path

import pytest

from reasoner import disk


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_g2_replace_keeps_the_old_file_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "eval.json"
    disk.replace(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        disk.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_g2_append_takes_back_what_fitted_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    disk.append(path, b"whole\n")
    write, calls = os.write, iter([3, 0])

    def nearly_full(descriptor: int, data: memoryview) -> int:
        room = next(calls)
        return write(descriptor, data[:room]) if room else full()

    monkeypatch.setattr(os, "write", nearly_full)
    with pytest.raises(OSError, match="No space"):
        disk.append(path, b"second line\n")
    assert path.read_bytes() == b"whole\n"


def test_append_goes_on_after_a_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:2]))
    disk.append(tmp_path / "rows", b"abcdefg\n")
    assert (tmp_path / "rows").read_bytes() == b"abcdefg\n"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "mounted read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EEXIST, "a file is in the way"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_refusal_is_one_line_that_says_what_why_and_what_to_do(number: int, said: str) -> None:
    line = str(disk.refusal(OSError(number, os.strerror(number)), "write x", "make room"))
    assert line.startswith("can't write x: ")
    assert said in line
    assert line.endswith("; make room")
