"""Checkpoints: bit-exact, whole or absent whatever kills the save, and data only (G2, G6, G7, G8)."""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reasoner import checkpoint
from reasoner.checkpoint import Progress
from reasoner.errors import RunFolderError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int32]
DTYPES += [torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64]


def at(step: int, stage_index: int = 3, stage: str = "grpo") -> Progress:
    return Progress(stage_index, stage, step, policy_step=step, cursor=32 * step)


def save(run: Path, progress: Progress, value: float = 0.0, keep: int = 2) -> Path:
    return checkpoint.save(run, progress, {"w": torch.full((50,), value)}, {"value": value}, keep=keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_round_trip_is_bit_exact_for_every_dtype_and_layout(tmp_path: Path) -> None:
    raw = torch.arange(256, dtype=torch.uint8)
    tensors = {str(dtype): raw.view(dtype) if dtype is not torch.bool else raw > 7 for dtype in DTYPES}  # NaNs and all
    shared = torch.randn(6, 4)
    tensors |= {
        "transposed": shared.t(),
        "row": shared[2],
        "same": shared,
        "again": shared,
        "scalar": torch.tensor(7.5),
    }
    tensors |= {
        "empty": torch.empty(0, 3),
        "also_empty": torch.empty(0),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    state = {
        "lr": 0.1 + 0.2,
        "big": 2**70,
        "tiny": 5e-324,
        "text": "ü\n",
        "none": None,
        "inf": float("inf"),
        "list": [1, [2]],
    }
    path = checkpoint.save(tmp_path, at(7), tensors, state)
    progress, loaded, loaded_state = checkpoint.load(path)
    assert path.name == "03-grpo-000007"
    assert progress == at(7)
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert bits(loaded[name]) == bits(tensor), name


def test_saving_changes_no_tensor_of_the_caller(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4))
    pointer, before = weight.data_ptr(), weight.detach().clone()
    path = checkpoint.save(tmp_path, at(1), {"w": weight}, None)
    with torch.no_grad():
        weight.add_(1.0)
    assert weight.data_ptr() == pointer
    assert torch.equal(checkpoint.load(path)[1]["w"], before)


def test_keep_counts_the_new_one_and_removes_the_oldest(tmp_path: Path) -> None:
    save(tmp_path, at(600, stage_index=1, stage="sft"))
    for step in (50, 100, 150):
        save(tmp_path, at(step))
    assert names(tmp_path) == ["03-grpo-000100", "03-grpo-000150"]
    save(tmp_path, at(200), keep=1)
    assert names(tmp_path) == ["03-grpo-000200"]


def test_order_is_by_stage_then_step_not_by_name(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, at(step), keep=9)
    assert names(tmp_path) == ["03-grpo-1000000", "03-grpo-999999"]
    assert checkpoint.newest(tmp_path).name == "03-grpo-1000000"
    save(tmp_path, at(10, stage_index=11), keep=9)
    assert checkpoint.newest(tmp_path).name == "11-grpo-000010"


def test_g2_the_same_step_saved_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, at(50), value=1.0, keep=1)
    path = save(tmp_path, at(50), value=2.0, keep=1)
    assert names(tmp_path) == ["03-grpo-000050"]
    assert checkpoint.load(path)[2] == {"value": 2.0}


def test_g2_killed_between_the_two_renames_of_a_replacement(tmp_path: Path) -> None:
    path = save(tmp_path, at(50), value=1.0, keep=1)
    path.rename(path.with_name("03-grpo-000050.replaced"))
    assert checkpoint.load(checkpoint.newest(tmp_path))[2] == {"value": 1.0}
    save(tmp_path, at(50), value=2.0, keep=1)
    assert names(tmp_path) == ["03-grpo-000050"]


def test_g2_checkpoints_later_than_a_run_that_went_back_are_removed(tmp_path: Path) -> None:
    """Otherwise the next resume would take up a run that no longer is."""
    for step in (50, 100):
        save(tmp_path, at(step), keep=9)
    (tmp_path / "checkpoints" / "03-grpo-000100" / "state.json").write_text("{")
    assert checkpoint.newest(tmp_path).name == "03-grpo-000050"
    save(tmp_path, at(60), keep=9)
    assert names(tmp_path) == ["03-grpo-000050", "03-grpo-000060"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "done.json"])
@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
def test_g2_harmed_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, name: str, harm) -> None:
    good = save(tmp_path, at(50))
    bad = save(tmp_path, at(100))
    harm(bad / name)
    assert checkpoint.newest_whole(tmp_path) == good
    with pytest.raises(RunFolderError, match="000100 is not whole"):
        checkpoint.load(bad)


def test_nothing_to_go_on_from_says_so(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path) is None
    with pytest.raises(RunFolderError, match=r"resume=.*no whole checkpoint in .*checkpoints; start a new run"):
        checkpoint.newest(tmp_path)
    with pytest.raises(RunFolderError, match="there is no such folder"):
        checkpoint.newest(tmp_path / "nowhere")
    cut(save(tmp_path, at(1)) / "state.json")
    with pytest.raises(RunFolderError, match="no whole checkpoint"):
        checkpoint.newest(tmp_path)


def test_g2_full_disk_at_every_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses at the n-th of the save's fsyncs, for every n."""
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    save(tmp_path, at(1), value=1.0)
    fsync, refusals = os.fsync, 0
    for fail_at in range(100):
        calls = iter(range(100))

        def refuse(descriptor: int, calls=calls, fail_at=fail_at) -> None:
            if next(calls) == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", refuse)
        try:
            save(tmp_path, at(2), value=2.0)
        except RunFolderError as error:
            assert re.search(
                r"can't write the checkpoint .*000002: the disk is full; the one before is kept", str(error)
            )
            refusals += 1
        else:
            break
        finally:
            monkeypatch.setattr(os, "fsync", fsync)
        progress, tensors, state = checkpoint.load(checkpoint.newest(tmp_path))
        assert progress.step in (1, 2)
        assert torch.equal(tensors["w"], torch.full((50,), float(progress.step)))
        assert state == {"value": float(progress.step)}
        assert not [name for name in names(tmp_path) if name.startswith(".")], "its room is given back"
        shutil.rmtree(tmp_path / "checkpoints" / "03-grpo-000002", ignore_errors=True)
    assert refusals >= 8, "two files, the done-file, the folders, the rows"
    assert checkpoint.newest(tmp_path).name == "03-grpo-000002"


REFUSED_BY_THE_SYSTEM = """
import resource, sys
from pathlib import Path
import torch
from reasoner.checkpoint import Progress, save
from reasoner.errors import RunFolderError

hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
CASES = [("tensors", 5000, 0, 2000), ("state", 0, 5000, 2000), ("done", 0, 0, 200)]
for name, tensor_bytes, state_bytes, limit in CASES:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        tensors = {"w": torch.zeros(tensor_bytes, dtype=torch.uint8)}
        save(Path(sys.argv[1]), Progress(3, "grpo", 2, 2, 2), tensors, "x" * state_bytes)
    except RunFolderError as error:
        print(name, error)
"""


def test_g2_the_system_refuses_each_file(tmp_path: Path) -> None:
    """A real limit on a file's size, in another process: the tensors, the state, the done-file don't fit."""
    save(tmp_path, at(1), value=1.0)
    command = [sys.executable, "-c", REFUSED_BY_THE_SYSTEM, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in said] == ["tensors", "state", "done"]
    assert all("files may not grow that large" in line for line in said), "found in safetensors' words too"
    assert names(tmp_path) == ["03-grpo-000001"]
    assert checkpoint.newest(tmp_path).name == "03-grpo-000001"


KILLED_WHILE_SAVING = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from reasoner import checkpoint
from reasoner.checkpoint import Progress

run, moments, acknowledged, inside = Path(sys.argv[1]), random.Random(0), 0, 0

def save_twice(step):  # as when a stage ends at a step that was saved anyway
    for again in (0, 1):
        tensors = {str(i): torch.full((20_000,), float(step)) for i in range(5)}
        checkpoint.save(run, Progress(1, "sft", step, step, step), tensors, {"step": step, "again": again}, keep=1)

def save_for_ever(step, pipe):
    while True:
        step += 1
        save_twice(step)
        os.write(pipe, step.to_bytes(8, "big"))

save_twice(1)
start = time.monotonic()
save_twice(2)
usual_s = time.monotonic() - start
acknowledged = 2
for _ in range(20):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(acknowledged, writer)
    os.close(writer)
    time.sleep(moments.uniform(0.0, 2 * usual_s))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while said := os.read(reader, 8):
        acknowledged = int.from_bytes(said, "big")
    os.close(reader)
    inside += any(path.name.startswith(".") for path in (run / "checkpoints").glob("*"))
    progress, tensors, state = checkpoint.load(checkpoint.newest(run))
    assert acknowledged <= progress.step <= acknowledged + 1, (acknowledged, progress)
    assert state["step"] == progress.step and len(tensors) == 5
    assert all(bool((tensor == progress.step).all()) for tensor in tensors.values())
    acknowledged = progress.step
print(inside)
"""


def test_g2_kill_9_at_random_moments_of_a_saving_loop(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "some kills fell inside a save"


class Poison:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_g7_a_poisoned_file_is_refused_and_never_run(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, at(1))
    (path / name).write_bytes(pickle.dumps(Poison(tmp_path / "pwned")))
    done = {file: checkpoint._seal(path / file) for file in ("tensors.safetensors", "state.json")}
    (path / "done.json").write_text(json.dumps(done))
    with pytest.raises(RunFolderError, match="000001 is not one of ours"):
        checkpoint.load(path)
    assert not (tmp_path / "pwned").exists()


def test_g7_state_without_its_parts_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, at(1))
    for text in ("[]", "{}", '{"progress": {"step": 1}, "state": null}'):
        (path / "state.json").write_text(text)
        (path / "done.json").write_text(json.dumps({name: checkpoint._seal(path / name) for name in checkpoint.FILES}))
        with pytest.raises(RunFolderError, match="not one of ours"):
            checkpoint.load(path)


def test_g8_no_secret_in_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "sk-12345678")
    path = checkpoint.save(tmp_path, at(1), {}, {"endpoint": "https://user:sk-12345678@host"})
    assert b"sk-12345678" not in (path / "state.json").read_bytes()
    assert checkpoint.load(path)[2] == {"endpoint": "https://user:<redacted>@host"}
