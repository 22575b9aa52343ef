"""The run folder: probed, locked, redacted, whole lines only, cut back on resume (G2, G4, G5, G8, G11)."""

import errno
import json
import math
import os
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from reasoner.__main__ import main
from reasoner.errors import RunFolderError
from reasoner.run_folder import RunFolder, newest_run, read_config, read_rows
from tests.two_ranks import on_two_ranks


def row(stage_index: int, step: int, **more: object) -> dict:
    return {"stage": "grpo", "stage_index": stage_index, "step": step, **more}


def steps(path: Path) -> list[tuple[int, int]]:
    return [(found["stage_index"], found["step"]) for found in read_rows(path)]


def test_open_makes_the_folder_and_close_leaves_no_trace(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "a" / "b"):
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["run.lock"]
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_g4_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunFolderError, match=r"can't write to out=.*file.*: a file is in the way; .*out=OTHER"):
            RunFolder.open(out)


def test_g4_out_that_nobody_may_write() -> None:
    with pytest.raises(RunFolderError, match="can't write to out=/proc/reasoner: "):
        RunFolder.open(Path("/proc/reasoner"))


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "the disk is mounted read-only")]
)
def test_g2_full_disk_is_found_before_anything_heavy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def refuse(descriptor: int) -> None:
        if b"probe" in os.readlink(f"/proc/self/fd/{descriptor}").encode():
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunFolderError, match=said):
        RunFolder.open(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == [], "no lock, no probe"


def test_g2_disk_with_less_room_than_the_probe(tmp_path: Path) -> None:
    """A real limit of the system, not a fake: files may grow to 100 KB only."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from pathlib import Path; from reasoner.run_folder import RunFolder\n"
        f"RunFolder.open(Path({str(tmp_path / 'out')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RunFolderError: can't write to out=" in done.stderr
    assert "files may not grow that large" in done.stderr


def test_g5_second_run_in_the_folder_is_refused_even_with_resume(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "out") as run:
        run.write_config("a: 1\n")
        for resume in (None, tmp_path / "out"):
            with pytest.raises(RunFolderError, match=f"pid {os.getpid()}"):
                RunFolder.open(tmp_path / "out", resume=resume)


def test_folder_with_a_run_wants_resume_or_another_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunFolder.open(out) as run:
        run.append_metrics(row(1, 1))
    with pytest.raises(RunFolderError, match=r"already holds a run: it has no checkpoint .* out=OTHER"):
        RunFolder.open(out)
    (out / "checkpoints" / "01-sft-000001").mkdir(parents=True)
    (out / "checkpoints" / "01-sft-000001" / "done.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"go on with it by resume=.*out, or choose out=OTHER"):
        RunFolder.open(out)
    RunFolder.open(out, resume=tmp_path / "." / "out").close()
    assert not (out / "run.lock").exists(), "a refused folder is not left locked"


def test_folder_with_other_files_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder.open(tmp_path).close()


def test_resume_into_another_out_brings_the_rows_along(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "old") as old:
        old.append_metrics(row(1, 1))
        old.write_eval([{"row": "base", "stage_index": 0}])
        old.write_summary({"status": "interrupted"})
    with RunFolder.open(tmp_path / "new", resume=tmp_path / "old") as new:
        assert steps(new.path / "metrics.jsonl") == [(1, 1)]
        assert new.eval_rows() == [{"row": "base", "stage_index": 0}]
        assert not (new.path / "summary.json").exists()


def test_files_as_the_readers_expect_them(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as run:
        run.write_config("seed: 0\n")
        run.write_summary({"status": "done", "seconds": 1.5})
        run.write_eval([{"row": "base", "stage_index": 0}, {"row": "sft", "stage_index": 2}])
        run.append_metrics(row(3, 1, grad_norm=math.inf, kl=math.nan, lr=1e-5))
        run.append_completions([row(3, 1, columns={"n": Decimal("1.50"), "half": Fraction(1, 2)}, ids=(1, 2))])
        run.append_eval_problems([{"row": "base", "stage_index": 0, "id": "ü\u2028\ud800"}])
    assert (tmp_path / "config.yaml").read_text() == "seed: 0\n"
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "done", "seconds": 1.5}
    assert json.loads((tmp_path / "eval.json").read_text())[1]["row"] == "sft"
    metrics = '{"stage": "grpo", "stage_index": 3, "step": 1, "grad_norm": null, "kl": null, "lr": 1e-05}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == metrics
    (completion,) = read_rows(tmp_path / "completions.jsonl")
    assert completion["columns"] == {"n": "1.50", "half": 0.5}
    assert completion["ids"] == [1, 2]
    (problem,) = read_rows(tmp_path / "eval_problems.jsonl")
    assert problem["id"] == "ü\u2028\ud800", "separators and lone surrogates of a user's file survive"


def test_g8_no_secret_in_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_s3cr3t\"quoted'value"
    monkeypatch.setenv("HF_TOKEN", secret)
    with RunFolder.open(tmp_path) as run:
        run.write_config(f"token: {json.dumps(secret)}\n")
        run.write_summary({"status": secret})
        run.write_eval([{"row": secret, "stage_index": 0}])
        run.append_metrics(row(1, 1, **{secret: secret}))
        run.append_completions([row(1, 1, text=f"my token is {secret}", columns={"path": Path(secret)})])
        run.append_eval_problems([{"stage_index": 0, "text": [secret]}])
    for path in tmp_path.iterdir():
        assert b"s3cr3t" not in path.read_bytes(), path
        assert b"<redacted>" in path.read_bytes(), path


def test_g2_full_disk_while_writing_rows_is_one_line_and_keeps_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def nearly_full(descriptor: int, data: bytes) -> int:
        if len(data) > 200:
            return write(descriptor, data[:200])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunFolder.open(tmp_path) as run:
        run.append_completions([row(1, 1, text="short")])
        before = (tmp_path / "completions.jsonl").read_bytes()
        monkeypatch.setattr(os, "write", nearly_full)
        with pytest.raises(RunFolderError, match=r"completions\.jsonl: the disk is full; .*kept: .*resume=") as caught:
            run.append_completions([row(1, 2, text="long" * 100)])
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        assert (tmp_path / "completions.jsonl").read_bytes() == before


def test_g11_half_a_last_line_is_read_without_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage_index": 1, "step": 1}\n{"stage_index": 1, "st')
    assert steps(path) == [(1, 1)]
    path.write_text('{"stage_index": 1, "step": 1}\n{"stage_index": 1, "step": 2}')  # whole, but its newline is missing
    assert steps(path) == [(1, 1)]


def test_g11_damage_in_the_middle_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage_index": 1, "step": 1}\n{"stage\n{"stage_index": 1, "step": 2}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2 is damaged"):
        list(read_rows(path))


def test_g11_cut_back_to_a_checkpoint(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as run:
        for position in [(1, 1), (1, 2), (3, 1), (3, 2), (3, 3)]:
            run.append_metrics(row(*position))
            run.append_completions([row(*position, text="a"), row(*position, text="b")])
        run.append_eval_problems(
            [{"row": name, "stage_index": i} for name, i in [("base", 0), ("sft", 2), ("grpo", 4)]]
        )
        run.write_eval([{"row": name, "stage_index": i} for name, i in [("base", 0), ("sft", 2), ("grpo", 4)]])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "gr')
    with RunFolder.open(tmp_path, resume=tmp_path) as run:
        run.cut_back(3, 2)
        assert steps(tmp_path / "metrics.jsonl") == [(1, 1), (1, 2), (3, 1), (3, 2)]
        assert len(steps(tmp_path / "completions.jsonl")) == 8
        assert [found["row"] for found in read_rows(tmp_path / "eval_problems.jsonl")] == ["base", "sft"]
        assert [found["row"] for found in run.eval_rows()] == ["base", "sft"]
        run.append_metrics(row(3, 3))
        assert steps(tmp_path / "metrics.jsonl") == [(1, 1), (1, 2), (3, 1), (3, 2), (3, 3)], "unique and rising"


def test_g11_an_evaluation_that_was_not_finished_is_done_again(tmp_path: Path) -> None:
    """At (2, 0) stage 2 has begun and nothing of it is done, at (2, 1) it is."""
    with RunFolder.open(tmp_path) as run:
        run.append_eval_problems([{"row": "base", "stage_index": 0}, {"row": "sft", "stage_index": 2}])
        run.cut_back(2, 1)
        assert len(list(read_rows(tmp_path / "eval_problems.jsonl"))) == 2
        run.cut_back(2, 0)
        assert [found["row"] for found in read_rows(tmp_path / "eval_problems.jsonl")] == ["base"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as run:
        (tmp_path / "eval.json").write_text("[{")
        with pytest.raises(RunFolderError, match=r"eval\.json is damaged .*move it away"):
            run.eval_rows()
    with pytest.raises(RunFolderError, match="there is no run"):
        read_config(tmp_path)
    for text in ("a: [1,", "- 1", ""):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(RunFolderError, match=r"config\.yaml is damaged"):
            read_config(tmp_path)


def test_written_after_close_is_our_bug(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path)
    run.close()
    with pytest.raises(AssertionError, match="closed run folder"):
        run.append_metrics(row(1, 1))


TWO_RANKS = """
import sys
from pathlib import Path
from reasoner import world
from reasoner.console import Console
from reasoner.run_folder import METRICS, RunFolder, read_rows
from reasoner.tracking import make_trackers

world.start()
out = Path(sys.argv[1])
with RunFolder.open(out, resume=out) as run, Console() as console:
    run.cut_back(1, 1)
    kept = len(list(read_rows(out / METRICS)))
    world.barrier()
    run.append_metrics({"stage_index": 1, "step": 2, "rank": world.rank()})
    run.write_eval([{"row": "sft", "stage_index": 2, "rank": world.rank()}])
    console.say("I speak")
    print(kept, len(make_trackers(["wandb"], out, config={}, say=print)) if world.rank() else "-")
world.stop()
"""


def test_only_the_main_rank_writes_locks_and_speaks(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage_index": 1, "step": 1}\n{"stage_index": 1, "step": 2}\n')
    assert on_two_ranks(TWO_RANKS, str(tmp_path)) == ["I speak\n1 -\n", "1 0\n"]
    assert [found.get("rank") for found in read_rows(tmp_path / "metrics.jsonl")] == [None, 0]
    assert json.loads((tmp_path / "eval.json").read_text())[0]["rank"] == 0


def a_run(folder: Path, seconds: int, *, files: tuple[str, ...] = ("config.yaml", "metrics.jsonl")) -> Path:
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("")
        os.utime(folder / name, (seconds, seconds))
    return folder


def test_a_folder_of_runs_means_the_one_begun_or_gone_on_with_last(tmp_path: Path) -> None:
    a_run(tmp_path / "b", 100)
    newest = a_run(tmp_path / "a", 200)
    a_run(tmp_path / "evaluated", 300, files=("config.yaml", "eval.json"))
    a_run(tmp_path / "c" / "deeper", 400)
    assert newest_run(tmp_path) == newest
    os.utime(tmp_path / "b" / "config.yaml", (500, 500))
    assert newest_run(tmp_path) == tmp_path / "b"
    assert newest_run(newest) is None, "a run itself is meant as it stands"
    assert newest_run(tmp_path / "nowhere") is None


def test_every_verb_of_runs_takes_a_folder_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = a_run(tmp_path / "DATE_TIME", 100)
    for verb in ("report", "eval", "chat", "serve", "export", "reward"):
        main([verb, f"run={tmp_path}", *(["to=merged"] if verb == "export" else [])])
        assert f"run={tmp_path}: the newest of its runs, {run}\n" in capsys.readouterr().err, verb
    assert main(["chat", f"run={tmp_path / 'nowhere'}"]) == 2
    assert "there is no run (no config.yaml)" in capsys.readouterr().err
    assert main(["chat", f"run={run}"]) == 2
    assert "the newest" not in capsys.readouterr().err
