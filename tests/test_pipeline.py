"""Whole runs of a very small model: what they leave, what they say when something is wrong, and that they go on bit
by bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from reasoner import train
from reasoner.errors import ConfigError, DataError, GuardTripped, ReasonerError, RewardError, RunFolderError
from tests.forked import start_forked
from tests.tiny_rewards import close_enough, fails_on_samples, unsure

SMALL = [
    "model.scratch.hidden_size=32",
    "model.scratch.intermediate_size=64",
    "model.scratch.layers=2",
    "data.size=400",
    "data.heldout=40",
    "sft.steps=6",
    "sft.examples_per_step=16",
    "grpo.steps=4",
    "grpo.prompts_per_step=4",
    "grpo.completions_per_prompt=4",
    "evaluate.samples=0",
    "checkpoint.every=2",
    "reward.workers=1",
    "reward.max_failed_share=1",
]


def small(out: Path, *overrides: str, **given):
    return train("tiny", overrides=[*SMALL, f"out={out}", *overrides], **given)


def metrics(out: Path) -> list[dict]:
    timed = ("_s", "peak_gib")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith(timed)} for row in rows]


def test_a_run_leaves_what_the_readme_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tracking = ["tracking=[tensorboard]", "track_completions=true"]
    result = small(tmp_path / "run", "evaluate.samples=8", "grpo.show_every=2", *tracking, reward=close_enough)
    said = capsys.readouterr().out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("config.yaml", "metrics.jsonl", "completions.jsonl", "eval.json", "eval_problems.jsonl"),
        *("checkpoints", "model", "summary.json", "report.html", "tensorboard"),
    }
    tracked = b"".join(path.read_bytes() for path in (tmp_path / "run" / "tensorboard").iterdir())
    assert tracked.count(b"grpo/reward_mean") == 4 and tracked.count(b"grpo/completions") >= 2
    rows = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert [row["row"] for row in rows] == ["base", "sft", "grpo", "export"]
    grpo, export = ({**row, "row": "", "stage_index": 0, "artefact": None} for row in rows[2:])
    assert grpo == export  # what was saved answers as what was trained
    assert rows[3]["artefact"].endswith("model") and rows[0]["pass_at_8"] is not None
    problems = [json.loads(line) for line in (tmp_path / "run" / "eval_problems.jsonl").read_text().splitlines()]
    assert len(problems) == 4 * 40 and len({p["id"] for p in problems}) == 40
    completions = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert len(completions) == 4 * 16 and completions[0]["parts"].keys() == {"reward"}
    assert completions[0]["columns"]["metadata"]
    steps = metrics(tmp_path / "run")
    assert [row["step"] for row in steps] == [*range(1, 7), *range(1, 5)]
    assert all(row["ratio_max"] == pytest.approx(1, abs=1e-4) for row in steps[6:] if row["ratio_max"] is not None)
    assert all(row["logprob_gap_max"] < 1e-4 for row in steps[6:] if row["logprob_gap_max"] is not None)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "done" and summary["versions"]["torch"] and len(summary["stages"]) == 6
    assert "95% interval" in said and "grpo against sft on heldout" in said and "sample of step 2" in said
    assert result.gains["sft", "grpo", "heldout"].problems == 40
    names = [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert names == ["03-grpo-000002", "03-grpo-000004"]


def test_sft_learns_and_grpo_raises_its_reward(tmp_path: Path):
    small(tmp_path / "run", "sft.steps=30", "grpo.steps=20", "grpo.optim.lr=1e-2", "stages=[sft,grpo]", reward=unsure)
    rows = metrics(tmp_path / "run")
    sft, grpo = rows[:30], rows[30:]
    assert sft[-1]["loss"] < 0.8 * sft[0]["loss"]
    first, last = (sum(row["reward_mean"] for row in rows) / 3 for rows in (grpo[:3], grpo[-3:]))
    assert last > first + 0.2, [row["reward_mean"] for row in grpo]


@pytest.mark.parametrize(
    "extra", [["grpo.kl_coef=0.1"], ["grpo.kl_coef=0.1", "grpo.kl_in=reward"], ["loss=gspo", "grpo.mask_cut=false"]]
)
def test_c10_kl_is_zero_as_grpo_begins_and_every_form_runs(tmp_path: Path, extra: list[str]):
    small(
        tmp_path / "run",
        "stages=[sft,grpo]",
        "grpo.inner_steps=2",
        "grpo.entropy_coef=0.01",
        "grpo.mask_cut=true",
        "grpo.max_completion_tokens=4",
        "grpo.optim.lr=1e-3",
        *extra,
        reward=close_enough,
    )
    first, *later = metrics(tmp_path / "run")[6:]
    if "grpo.kl_in=reward" in extra:
        assert first["kl"] == 0 and any(row["kl"] != 0 for row in later)
    elif "grpo.kl_coef=0.1" in extra:  # the mean over two inner steps, the first of which starts at 0
        assert first["kl"] < 0.5 * max(row["kl"] for row in later)
    else:
        assert max(row["ratio_max"] for row in (first, *later) if row["ratio_max"]) > 1, (
            "a second step is off the policy"
        )


def test_lora_saves_an_adapter_that_answers_as_the_trained_model(tmp_path: Path):
    warm = small(tmp_path / "warm", "stages=[sft,export]")
    result = small(
        tmp_path / "run",
        f"model.name={warm.out / 'model'}",
        "model.scratch=null",
        "model.lora={r: 4, alpha: 8}",
        "grpo.optim.lr=1e-2",
        "stages=[grpo,evaluate,export]",
        reward=close_enough,
    )
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    trained, exported = result.rows
    assert trained["mean_tokens"] == exported["mean_tokens"]


REWARD_FILE = """
import time
def score(completion, answer): return float(completion == answer)
def typo(completion, anwser): return 1.0
def raises(completion): raise KeyError("level")
def nan(completion): return float("nan")
def none(completion): return None
def hangs(completion): time.sleep(60)
number = 3
"""


@pytest.mark.parametrize(
    ("overrides", "kind", "said"),
    [
        (["reward={file}:score_all"], RewardError, "score_all"),
        (["reward=nowhere.py:score"], RewardError, "nowhere.py"),
        (["reward={file}:number"], RewardError, "number"),
        (["reward={file}:typo"], RewardError, "anwser"),
        (["reward={file}:raises"], RewardError, "KeyError"),
        (["reward={file}:nan"], RewardError, "nan"),
        (["reward={file}:none"], RewardError, "None"),
        (["reward={file}:hangs", "reward.parts.hangs.timeout_s=0.1", "reward.workers=4"], RewardError, "0.1 s"),
        (["data.path={tmp}/missing.jsonl"], DataError, "missing.jsonl"),
        (["data.path={tmp}/empty.jsonl"], DataError, "empty.jsonl"),
        (["data.path={tmp}/broken.jsonl"], DataError, "broken.jsonl:2"),
        (["data.path={tmp}/rows.jsonl"], DataError, "question"),
        (["data.template=model"], ReasonerError, "data.template=chatml"),
        (["grpo.max_completion_tokens=100000"], ConfigError, "context"),
        (["model.quantize=nf4", "model.lora={{r: 4}}"], ConfigError, "model.quantize=none"),
        (["optim@grpo.optim=adamw_8bit"], ConfigError, "optim@grpo.optim=adamw"),
        (["model.scratch=null", "model.name={tmp}/no-model"], ReasonerError, "no-model"),
        (["out={file}"], RunFolderError, "rewards.py"),
        (["resume={tmp}/nothing"], RunFolderError, "nothing"),
    ],
)
def test_what_a_user_hands_in_wrong_is_one_line(tmp_path: Path, overrides: list[str], kind: type, said: str):
    (tmp_path / "rewards.py").write_text(REWARD_FILE)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"question": "1", "answer": "1"}\n{"question": \n')
    (tmp_path / "rows.jsonl").write_text('{"problem": "1", "answer": "1"}\n')
    filled = [text.format(file=tmp_path / "rewards.py", tmp=tmp_path) for text in overrides]
    if any(text.startswith("data.path") for text in filled):
        filled += ["data.prompt='{question}'", "sft.data.map=null", "sft.data.completion=null"]
    with pytest.raises(kind) as caught:
        small(tmp_path / "run", *filled)
    assert caught.value.exit_code == 2
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_rewards_that_fail_stop_the_run_with_its_checkpoint_kept(tmp_path: Path):
    with pytest.raises(GuardTripped, match=r"reward\.max_failed_share") as caught:
        small(tmp_path / "run", "stages=[sft,grpo]", "reward.max_failed_share=0.2", reward=fails_on_samples)
    assert caught.value.exit_code == 3
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped by a guard"
    assert "reward.max_failed_share" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "checkpoints" / "01-grpo-000000").exists()


def test_a_report_that_cannot_be_written_costs_one_line_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "run" / "report.html" / "in the way").mkdir(parents=True)
    result = small(tmp_path / "run", "stages=[sft]", "sft.steps=1")
    assert json.loads((result.out / "summary.json").read_text())["status"] == "done"
    said = capsys.readouterr().out
    assert "no report: can't write" in said and f"python -m reasoner report run={result.out}" in said


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path):
    small(tmp_path / "run", "stages=[sft]")
    with pytest.raises(RunFolderError, match="resume="):
        small(tmp_path / "run", "stages=[sft]")


def test_g6_a_resumed_run_is_bit_equal_and_may_ask_for_more_steps_but_not_for_other_data(tmp_path: Path):
    small(tmp_path / "whole", "stages=[sft,grpo]", "grpo.steps=6", "grpo.kl_coef=0.05", reward=close_enough)
    small(tmp_path / "run", "stages=[sft,grpo]", "grpo.steps=3", "grpo.kl_coef=0.05", reward=close_enough)
    again = [*SMALL, "stages=[sft,grpo]", "grpo.kl_coef=0.05", f"out={tmp_path / 'run'}", f"resume={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"data\.seed"):
        train("tiny", overrides=[*again, "grpo.steps=6", "data.seed=1"], reward=close_enough)
    with pytest.raises(ConfigError, match=r"resume\.allow=\[grpo\.entropy_coef"):
        train("tiny", overrides=[*again, "grpo.steps=6", "grpo.entropy_coef=1"], reward=close_enough)
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    del written["grpo"]["eval_every"], written["data"]["streaming"]  # as a version wrote it that did not know them
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(written))
    train("tiny", overrides=[*again, "grpo.steps=6"], reward=close_enough)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert weights(tmp_path / "run").keys() == weights(tmp_path / "whole").keys()
    assert all(weights(tmp_path / "run")[name].equal(tensor) for name, tensor in weights(tmp_path / "whole").items())


def weights(out: Path) -> dict:
    newest = sorted((out / "checkpoints").iterdir())[-1]
    return load_file(newest / "tensors.safetensors")


PROGRAM = """
import json, sys
from reasoner.__main__ import main
sys.exit(main(json.loads(sys.argv[1])))
"""


def started(out: Path, *overrides: str) -> list[str]:
    """What is said on the command line, with exact answers as the reward and a checkpoint a step."""
    return ["conf=tiny", *SMALL, "stages=[sft,grpo]", "checkpoint.every=1", f"out={out}", *overrides]


def start(out: Path, *overrides: str) -> subprocess.Popen:
    """A run of its own process, as from the command line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(started(out, *overrides))]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_g2_a_run_killed_at_ten_random_moments_ends_as_the_unbroken_one(tmp_path: Path):
    """A checkpoint a step, so that some of the moments fall inside a save; each life gets at least a step further. The
    unbroken run and the last life are started anew, so that nothing which forked processes share can make them agree.
    """
    lengths = ["sft.steps=12", "grpo.steps=60"]
    whole = start(tmp_path / "whole", *lengths)
    moments, resume, said, killed_at = random.Random(0), [], tmp_path / "said", set()
    for _ in range(10):
        before = lines_in(tmp_path / "run" / "metrics.jsonl")
        run = start_forked(PROGRAM, json.dumps(started(tmp_path / "run", *lengths, *resume)), said=said)
        wait_for_a_line(lambda run=run: run.exitcode is None, tmp_path / "run" / "metrics.jsonl", after=before)
        time.sleep(moments.uniform(0, 0.1))
        run.kill()
        run.join()
        assert run.exitcode in (0, -signal.SIGKILL), said.with_suffix(".err").read_text()
        killed_at.add(lines_in(tmp_path / "run" / "metrics.jsonl"))
        resume = [f"resume={tmp_path / 'run'}"]
    assert len(killed_at) > 5, "most of the lives had nothing left to do: give the run more steps"
    last = start(tmp_path / "run", *lengths, *resume)
    for each in (whole, last):
        words = each.communicate(timeout=300)[1]
        assert each.returncode == 0, words
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert all(weights(tmp_path / "run")[name].equal(tensor) for name, tensor in weights(tmp_path / "whole").items())


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_a_line(running: Callable[[], bool], path: Path, after: int = 0) -> None:
    """Until more steps than `after` are written (a resumed run first cuts the file back) or the run ends."""
    while running() and lines_in(path) <= after:
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_g3_a_signal_saves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals, code: int):
    run = start(tmp_path / "run", "checkpoint.every=1000", "grpo.steps=10000")
    wait_for_a_line(lambda: run.poll() is None, tmp_path / "run" / "metrics.jsonl")
    run.send_signal(number)
    said = run.communicate(timeout=120)[1]
    assert run.returncode == code and "Traceback" not in said
    assert f"resume={tmp_path / 'run'}" in said
    done = metrics(tmp_path / "run")[-1]
    assert list((tmp_path / "run" / "checkpoints").glob(f"*-{done['stage']}-{done['step']:06d}/done.json"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    assert f"resume={tmp_path / 'run'}" in (tmp_path / "run" / "report.html").read_text()


def test_g8_a_secret_in_the_environment_never_reaches_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret_value")
    small(tmp_path / "run", "stages=[sft,evaluate]", "model.name='${oc.env:HF_TOKEN}'")
    found = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and b"planted_secret" in p.read_bytes()]
    assert not found and yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["name"] == "<redacted>"
