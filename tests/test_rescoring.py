"""The verb reward on what a run said, and on what a model says now."""

import json
import math
from pathlib import Path

import pytest
import yaml

from reasoner.__main__ import main
from reasoner.config import validate
from reasoner.errors import ReasonerError, RewardError, RunFolderError
from reasoner.rescoring import lines, rescore
from tests.test_pipeline import SMALL

REWARDS = """
def short(completion):
    return -float(len(completion))

def no_threes(completion):
    if "3" in completion:
        raise ValueError("three")
    return 0.0

def asked(prompts, completions, **kwargs):
    return [float(prompt[-1]["content"] == "2+2?" and said[0]["role"] == "assistant")
            for prompt, said in zip(prompts, completions)]

def ids(completion_ids, **kwargs):
    return [0.0 for _ in completion_ids]
"""
MATH = {"fn": "exact", "weight": 1.0}


def row(step: int, prompt: str, said: str, reward: float | None, advantage: float, **given) -> dict:
    parts = {} if reward is None else {"accuracy": reward}
    failures = {"accuracy": "timed out after 5 s"} if reward is None else {}
    known = {"stage": "grpo", "stage_index": 1, "step": step, "policy_step": step, "id": prompt, "prompt": "2+2?"}
    asked = {"messages": [], "prefill": "", "answer": "4", "completion": said, "finish_reason": "stop", "tokens": 3}
    scored = {"reward": reward, "parts": parts, "failures": failures, "advantage": advantage, "columns": {}}
    return {**known, **asked, **scored, **given}


@pytest.fixture
def kept(trained_run: Path, tmp_path: Path):
    """A run's folder with these rows, and its config with these rewards and settings of GRPO."""

    def keep(rows: list[dict], parts: dict, **grpo) -> tuple[Path, object]:
        (tmp_path / "completions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        (tmp_path / "mine.py").write_text(REWARDS)
        values = yaml.safe_load((trained_run / "config.yaml").read_text())
        values["reward"] = {**values["reward"], "parts": parts}
        values["grpo"] |= {"completions_per_prompt": 2, "advantage_scale": "none", **grpo}
        return tmp_path, validate(values)

    return keep


def test_the_same_rewards_give_what_the_trainer_gave(trained_run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["reward", f"run={trained_run}"]) == 0
    said = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in (trained_run / "completions.jsonl").read_text().splitlines()]
    assert any(one["advantage"] for one in rows)
    assert said[0].startswith(f"{len(rows)} completions of {trained_run}, steps 1 to 6, ")
    assert said[-1] == "every advantage is what it was"
    assert "advantages that changed sign: 0 of" in said[-2] and "1.000" in said[-2]


def test_weights_move_the_advantages_as_worked_out_by_hand(kept):
    rows = [row(1, "a", "4", 1.0, 0.7071), row(1, "a", "12345", 0.0, -0.7071)]
    rows += [row(1, "b", "9", 0.0, 0.0), row(1, "b", "99999999", 0.0, 0.0)]
    run, config = kept(rows, {"accuracy": MATH, "short": {"fn": "mine.py:short", "weight": -0.5}})
    found = rescore(run, config, base_dir=run)
    # a: 1 + 0.5 x 1 against 0.5 x 5, 2 on average; b: 0.5 against 4, 2.25 on average.
    assert found.groups == 2 and found.signal == [1, 2] and found.flipped == 2
    after = {row["completion"]: advantage for _, _, row, _, advantage in found.moved}
    assert after == {"4": -0.5, "12345": 0.5, "9": -1.75, "99999999": 1.75}
    assert found.total.before == [1.0, 4] and found.total.after == [1.5 + 2.5 + 0.5 + 4.0, 4]
    assert found.parts["short"].before == [0.0, 0] and found.parts["accuracy"].changed == 0
    assert found.correlation == pytest.approx(-0.7071 / math.sqrt(6.625), abs=1e-4)
    told = lines(run, config, found)[-4:]
    assert told[0] == "  step 1, row b, answer '4': '9': reward 0 -> 0.5, advantage +0.00 -> -1.75"
    assert told[2] == "  step 1, row a, answer '4': '4': reward 1 -> 1.5, advantage +0.71 -> -0.50"


def test_groups_are_those_of_the_run_also_when_a_prompt_came_twice_in_a_row(kept):
    rows = [row(1, "a", said, float(said == "4"), 0.0) for said in ("4", "4", "5", "5")]
    run, config = kept(rows, {"accuracy": MATH})
    assert rescore(run, config, base_dir=run).signal == [0, 0]
    rows = [row(step, "a", said, float(said == "4"), 0.0) for step, said in ((1, "4"), (2, "5"))]
    run, config = kept(rows, {"accuracy": MATH})
    assert rescore(run, config, base_dir=run).groups == 2, "a step ends a group"


def test_a_failure_is_no_zero_on_either_side(kept):
    rows = [row(1, "a", "3", 0.0, -0.7), row(1, "a", "4", 1.0, 0.7), row(1, "b", "4", None, 0.0)]
    run, config = kept(
        [*rows, row(1, "b", "5", 1.0, 0.0)], {"no_threes": {"fn": "mine.py:no_threes"}, "accuracy": MATH}
    )
    found = rescore(run, config, base_dir=run)
    assert found.total.before == [2.0, 3] and found.total.after == [2.0, 3] and found.total.failed == 1
    assert found.signal == [1, 1], "one of each group failed once"
    assert (
        "warning: 'no_threes' failed on 1 completion: ValueError: three (mine.py:7), first in step 1, row a"
        in lines(run, config, found)
    )


def test_the_kl_that_was_charged_with_the_reward_is_charged_again(kept):
    charged = {"parts": {"accuracy": 1.0, "kl_penalty": -3.0}}
    rows = [row(1, "a", "4", 0.7, -0.7071, **charged), row(1, "a", "4", 1.0, 0.7071)]
    rows = [{**one, "advantage": sign * 0.15} for one, sign in zip(rows, (-1, 1), strict=True)]
    run, config = kept(rows, {"accuracy": MATH}, kl_coef=0.1, kl_in="reward")
    found = rescore(run, config, base_dir=run)
    assert not found.moved and found.total.after == [pytest.approx(1.7), 2]


def test_rewards_see_the_prefill_and_the_messages_again(kept):
    messages = [{"role": "user", "content": "2+2?"}]
    said = {"prefill": "<think>\n", "messages": messages}
    rows = [row(1, "a", "so 4</think>4", 1.0, 0.0, **said), row(1, "a", "4", 0.0, 0.0, **said)]
    parts = {"form": {"fn": "think_format"}, "asked": {"fn": "mine.py:asked"}}
    run, config = kept(rows, parts)
    found = rescore(run, config, base_dir=run)
    assert found.parts["form"].after == [1.0, 2] and found.parts["asked"].after == [2.0, 2]


def test_a_group_of_the_conf_takes_the_place_of_the_rewards(trained_run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["reward", f"run={trained_run}", "reward=overlong", "reward.parts.length.weight=3"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines()[2:4]] == [["accuracy", "1"], ["length", "3"]]


@pytest.mark.parametrize(
    ("rows", "parts", "error", "match"),
    [
        ([], {"accuracy": MATH}, RunFolderError, "holds no completions yet"),
        ([{"stage_index": 0, "step": 1, "stage": "grpo"}], {"accuracy": MATH}, RunFolderError, "older version"),
        ([row(1, "a", "4", 1.0, 0.0)], {"ids": {"fn": "mine.py:ids"}}, RewardError, "completion_ids, which a run does"),
        ([row(1, "a", "4", 1.0, 0.0)], {"it": {"fn": "mine.py:nothing"}}, RewardError, "nothing"),
    ],
)
def test_what_cannot_be_scored_again_is_said(kept, rows: list, parts: dict, error: type[ReasonerError], match: str):
    run, config = kept(rows, parts)
    with pytest.raises(error, match=match):
        rescore(run, config, base_dir=run)


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["reward", f"run={tmp_path}"]) == 2
    assert "name a run's folder" in capsys.readouterr().err


def test_a_sample_shows_what_the_model_earns_before_training(capsys: pytest.CaptureFixture[str]):
    assert main(["reward", "conf=tiny", "--sample", *SMALL, "grpo.completions_per_prompt=3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "what tiny says before any training: 8 prompts, 3 completions each" in said
    assert sum(line.startswith("prompt grpo:") for line in said) == 8
    assert any(
        line.startswith("completions cut at grpo.max_completion_tokens:") and line.endswith("of 24") for line in said
    )
    assert said[-1] == "groups with a signal: 0 of 8; practice learns from these alone"
