"""One run a folder (G5)."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from reasoner.errors import RunFolderError
from reasoner.lock import Holder, Lock, _started


def write(path: Path, holder: Holder) -> None:
    path.write_text(json.dumps(asdict(holder)))


def test_g5_second_taker_is_told_the_pid(tmp_path: Path) -> None:
    lock = Lock.take(tmp_path / "run.lock")
    with pytest.raises(RunFolderError, match=rf"in use by another run, pid {os.getpid()} on .*out=OTHER"):
        Lock.take(tmp_path / "run.lock")
    lock.release()
    Lock.take(tmp_path / "run.lock").release()
    assert list(tmp_path.iterdir()) == []


def test_g5_lock_of_a_living_process_holds_and_of_its_zombie_does_not(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = Holder.this_process()
    write(tmp_path / "run.lock", replace(me, pid=child.pid, started=_started(child.pid)))
    with pytest.raises(RunFolderError, match=f"pid {child.pid}"):
        Lock.take(tmp_path / "run.lock")
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, but not yet reaped
    lock = Lock.take(tmp_path / "run.lock")
    child.communicate()
    assert json.loads(lock.path.read_text()) == asdict(me)


@pytest.mark.parametrize("change", [{"boot_id": "another-boot"}, {"started": "1"}, {"pid": 2**22 + 1}])
def test_g5_stale_lock_is_taken_over(tmp_path: Path, change: dict) -> None:
    """Booted since; the pid belongs to a later process; no such process."""
    me = Holder.this_process()
    write(tmp_path / "run.lock", replace(me, **change))
    assert json.loads(Lock.take(tmp_path / "run.lock").path.read_text()) == asdict(me)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_g5_other_host_cannot_be_asked_so_its_lock_holds(tmp_path: Path) -> None:
    write(tmp_path / "run.lock", replace(Holder.this_process(), host="elsewhere", pid=1, boot_id="x"))
    with pytest.raises(RunFolderError, match=r"pid 1 on elsewhere: .* delete .*run\.lock if that run is over"):
        Lock.take(tmp_path / "run.lock")


def test_g5_unreadable_lock_holds_and_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("")
    with pytest.raises(RunFolderError, match=r"run\.lock can't be read: delete it if no run"):
        Lock.take(tmp_path / "run.lock")


def test_g5_a_lock_that_is_no_longer_ours_stays(tmp_path: Path) -> None:
    lock = Lock.take(tmp_path / "run.lock")
    write(lock.path, replace(lock.holder, pid=1))
    lock.release()
    assert lock.path.exists()
    lock.path.unlink()
    lock.release()
