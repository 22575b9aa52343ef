"""What Python hands to `train` beside a conf: a loss, an engine, a callback."""

import ast
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from reasoner import train
from reasoner.errors import GuardTripped
from reasoner.grpo.losses import LossInputs, Nll, reduce
from reasoner.rollout.hf import HfEngine
from reasoner.update import LossOutput
from tests.test_pipeline import small
from tests.tiny_rewards import close_enough

SHORT = ["stages=[grpo]", "grpo.steps=3", "grpo.mismatch=off", "grpo.optim.lr=1e-3"]


def still(inputs: LossInputs) -> LossOutput:
    """A loss that moves nothing."""
    return LossOutput(
        reduce(0 * inputs.logprobs, inputs, "tokens"), "tokens", {"seen": torch.ones(len(inputs.logprobs)).sum()}
    )


def test_an_own_loss_is_what_trains_and_config_says_its_name(tmp_path: Path):
    small(tmp_path / "run", *SHORT, "checkpoint.every=1", reward=close_enough, loss=still)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["grad_norm"] for row in rows] == [0.0] * 3 and [row["seen"] for row in rows] == [1.0] * 3
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["grpo"]["loss"] == {"_target_": f"{__name__}.still"}
    small(tmp_path / "other", *SHORT, reward=close_enough, loss=Nll())
    config = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())
    assert config["grpo"]["loss"] == {"_target_": "reasoner.grpo.losses.Nll"}


def test_an_own_engine_samples_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    asked = []

    class Watched(HfEngine):
        capabilities = SimpleNamespace(name="watched", own_weights=False, images=False)

        def generate(self, prompts, sampling, *, policy_step, **told):
            asked.append((policy_step, len(prompts)))
            return super().generate(prompts, sampling, policy_step=policy_step, **told)

    def make(policy, decode, *, max_context):
        assert max_context >= 64
        return Watched(policy, decode, max_context=max_context, max_sequences=64)

    small(tmp_path / "run", *SHORT[1:], "stages=[grpo,evaluate]", reward=close_enough, engine=make)
    assert asked == [(0, 4), (1, 4), (2, 4), (3, 40)]
    assert "rollout.engine: watched, handed in from Python" in capsys.readouterr().out


def test_a_callback_sees_each_row_once_it_is_written_and_may_stop_the_run(tmp_path: Path):
    out, seen = tmp_path / "run", []

    def watch(row):
        seen.append(row)
        assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == row["step"]
        if row["stage"] == "grpo" and row["step"] == 3:
            raise GuardTripped("the reward is good enough")

    with pytest.raises(GuardTripped, match="good enough"):
        small(out, "checkpoint.every=50", reward=close_enough, callback=watch)
    assert [(row["stage"], row["step"]) for row in seen] == [("sft", i) for i in range(1, 7)] + [
        ("grpo", i) for i in (1, 2, 3)
    ]
    assert json.loads((out / "summary.json").read_text())["status"] == "stopped by a guard"
    again: list[dict] = []
    small(out, f"resume={out}", "checkpoint.every=50", reward=close_enough, callback=again.append)
    assert [row["step"] for row in again] == [4], "the step that it stopped after is kept"


def test_the_page_s_call_has_arguments_that_there_are():
    page = (Path(__file__).parents[1] / "docs/python.md").read_text()
    (call,) = [
        node
        for node in ast.walk(ast.parse(page.split("```python\n")[1].split("```")[0]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "train"
    ]
    assert {word.arg for word in call.keywords} == set(inspect.signature(train).parameters) - {"conf"}
