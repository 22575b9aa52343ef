"""The best checkpoint of GRPO: chosen by held-out score, kept, gone on with, the same after a resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from reasoner import train
from reasoner.errors import ConfigError, RunFolderError
from reasoner.results import Results, best_of
from tests.test_pipeline import metrics, weights


def measured(step: int, accuracy: float, sampled: float | None = None, of: str = "heldout") -> dict[str, Any]:
    row = f"01-grpo-{step:06d}"
    scores = {"greedy_accuracy": accuracy, "sampled_accuracy": sampled}
    return {"row": row, "stage_index": 1, "step": step, "set": of, **scores}


def test_the_best_is_by_greedy_then_sampled_accuracy_then_the_earlier_one():
    rows = [measured(0, 0.3, 0.9), measured(50, 0.5, 0.2), measured(100, 0.5, 0.4), measured(150, 0.5, 0.4)]
    best = best_of(rows, 1)
    assert best and (best.name, best.step, best.score, best.of) == ("01-grpo-000100", 100, 0.5, 4)
    assert str(best) == "01-grpo-000100, the best of 4 by held-out accuracy (50.0% greedy on heldout)"
    assert best_of(rows, 3) is None
    assert best_of([{**rows[0], "step": 0} | {"stage_index": 3}], 1) is None
    without = [{key: value for key, value in row.items() if key != "step"} for row in rows]
    assert best_of(without, 1) is None, "rows of the stage `evaluate` choose nothing"


def test_with_several_sets_their_mean_counts_and_the_choice_is_owned_up_to():
    rows = [measured(0, 0.6), measured(0, 0.2, of="hard"), measured(5, 0.5), measured(5, 0.4, of="hard")]
    best = best_of(rows, 1)
    assert best and best.step == 5 and best.sets == ("heldout", "hard")
    alone = {"row": "grpo", "stage_index": 2, "set": "heldout", "greedy_accuracy": 0.5, "sampled_accuracy": None}
    said = Results([*rows, alone]).sentences()
    assert any("step 5 was chosen by its score on heldout, so that score is optimistic" in line for line in said)
    said = Results([*(measured(step, 0.5, of="validation") for step in (0, 5)), alone]).sentences()
    assert not [line for line in said if "optimistic" in line]


def eval_rows(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "eval.json").read_text())


def test_the_best_checkpoint_is_kept_and_everything_after_the_stage_has_its_weights(trained_run: Path):
    rows = eval_rows(trained_run)
    best = best_of(rows, 3)
    assert best and [row["step"] for row in rows if "step" in row] == [0, 2, 4, 6]
    kept = {path.name for path in (trained_run / "checkpoints").iterdir()}
    assert kept == {best.name, "03-grpo-000006"}, "checkpoint.keep=1, and the best"
    chosen = load_file(trained_run / "checkpoints" / best.name / "tensors.safetensors")
    saved = load_file(trained_run / "model" / "model.safetensors")
    assert saved and all(chosen[f"policy.{name}"].equal(tensor) for name, tensor in saved.items())
    scores = {row["row"]: (row["greedy_accuracy"], row["sampled_accuracy"]) for row in rows}
    assert scores["grpo"] == scores["export"] == scores[best.name]
    assert scores[best.name] == max(score for row, score in scores.items() if "-grpo-" in row)


GOING_ON = [
    *("model.scratch=null", "stages=[grpo,evaluate]", "data.validation=40", "checkpoint.every=1", "checkpoint.keep=9"),
    *("grpo.steps=4", "grpo.optim.lr=3e-3"),
]


@pytest.fixture(scope="module")
def whole(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that goes on from the trained model, with rows of its own to choose by."""
    from tests.conftest import SUMS

    out = tmp_path_factory.mktemp("whole") / "run"
    given = [line for line in SUMS if "scratch" not in line]
    train("tiny", overrides=[*given, *GOING_ON, f"model.name={trained_run / 'model'}", f"out={out}"])
    return out


def test_rows_that_choose_neither_train_nor_are_measured(whole: Path):
    rows = eval_rows(whole)
    assert {row["set"] for row in rows if "step" in row} == {"validation"}
    assert [(row["row"], row["set"]) for row in rows if "step" not in row] == [("grpo", "heldout")]
    lines = [json.loads(line) for line in (whole / "eval_problems.jsonl").read_text().splitlines()]
    trained = {
        json.loads(line)["columns"]["question"] for line in (whole / "completions.jsonl").read_text().splitlines()
    }
    chose, heldout = (
        {line["columns"]["question"] for line in lines if line["set"] == name} for name in ("validation", "heldout")
    )
    assert len(chose) == 40 and len(heldout) == 60 and trained
    assert not chose & heldout and not trained & (chose | heldout)


@pytest.mark.parametrize("killed_at", [2, 3])
def test_g6_a_resumed_run_measures_and_chooses_as_the_unbroken_one(whole: Path, tmp_path: Path, killed_at: int):
    """Killed before a checkpoint of its own was measured, and one step later; then resumed into another folder."""
    shutil.copytree(whole, tmp_path / "killed")
    for path in (tmp_path / "killed" / "checkpoints").iterdir():
        if int(path.name[-6:]) > killed_at:
            shutil.rmtree(path)
    out = tmp_path / "killed" if killed_at == 3 else tmp_path / "run"
    train(str(whole / "config.yaml"), overrides=[f"resume={tmp_path / 'killed'}", f"out={out}"])
    assert eval_rows(out) == eval_rows(whole)
    assert (out / "eval_problems.jsonl").read_bytes() == (whole / "eval_problems.jsonl").read_bytes()
    assert metrics(out) == metrics(whole)
    assert all(weights(out)[name].equal(tensor) for name, tensor in weights(whole).items())
    best = best_of(eval_rows(whole), 0)
    assert best and (out / "checkpoints" / best.name).is_dir(), "also where the run goes on in another folder"


def killed(whole: Path, folder: Path, *, kept: set[int]) -> list[str]:
    """A copy of the run that has the checkpoints of these steps alone; the overrides that go on from it elsewhere."""
    shutil.copytree(whole, folder / "killed")
    for path in (folder / "killed" / "checkpoints").iterdir():
        if int(path.name[-6:]) not in kept:
            shutil.rmtree(path)
    return [f"resume={folder / 'killed'}", f"out={folder / 'run'}", "grpo.eval_every=null"]


@pytest.mark.parametrize("step", [0, 1])
def test_measuring_on_the_way_changes_no_step(whole: Path, tmp_path: Path, step: int):
    """Gone on with unmeasured, in another folder; what was measured before still chooses what the stage ends with."""
    going_on = killed(whole, tmp_path, kept=set(range(step + 1)))
    train(str(whole / "config.yaml"), overrides=going_on)
    assert metrics(tmp_path / "run") == metrics(whole)
    best = best_of(eval_rows(tmp_path / "run"), 0)
    assert (best.name if best else None) == (None if step == 0 else "00-grpo-000000")
    assert (tmp_path / "run" / "checkpoints" / "00-grpo-000000").is_dir() is (step > 0)


def test_going_on_without_the_best_checkpoint_is_refused_at_once(whole: Path, tmp_path: Path):
    going_on = killed(whole, tmp_path, kept={1})
    with pytest.raises(RunFolderError, match=f"resume={tmp_path / 'killed'}: going on needs its best .*00-grpo-000000"):
        train(str(whole / "config.yaml"), overrides=going_on)
    assert metrics(tmp_path / "run") == metrics(whole)[:1], "no step was trained"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["data.validation=1.5"], r"^data\.validation=1\.5: give a number of rows, or a share below 1$"),
        (["grpo.data.validation=2.5"], r"^grpo\.data\.validation=2\.5: give a number of rows"),
        (["sft.data.validation=9"], r"^sft\.data\.validation chooses nothing: .* data\.validation$"),
        (["data.validation=inf"], r"^data\.validation=inf"),
        (["data.heldout=inf"], r"^data\.heldout=inf"),
        (["data.validation=0", "grpo.data.validation=40", "grpo.eval_every=null"], r"^data\.validation=40 keeps rows"),
        (["grpo.eval_every=null"], r"^data\.validation=40 keeps rows .* set grpo\.eval_every=50 too"),
    ],
)
def test_rows_to_choose_by_that_can_not_be_leave_no_folder(wrong: list[str], said: str, whole: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=said):
        train(str(whole / "config.yaml"), overrides=[f"out={tmp_path / 'run'}", *wrong])
    assert not (tmp_path / "run").exists()


def test_a_set_may_not_take_the_name_of_the_rows_that_choose(whole: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="the name is taken"):
        train(str(whole / "config.yaml"), overrides=[f"out={tmp_path / 'run'}", "evaluate.sets.validation={size: 9}"])
