"""A run on rows that are made as they are drawn: resumed bit by bit, and what was left out is counted to the end."""

import json
from pathlib import Path

import pytest

from reasoner import train
from reasoner.data import task
from tests.test_pipeline import SMALL, metrics, weights
from tests.tiny_rewards import close_enough

STAGES = ["stages=[sft,grpo]", "sft.steps=2", "grpo.prompts_per_step=8", "data.max_prompt_tokens=12"]


def run(out: Path, *overrides: str) -> None:
    train("tiny", overrides=[*SMALL, *STAGES, f"out={out}", *overrides], reward=close_enough)


def test_g6_a_run_on_a_big_source_goes_on_bit_by_bit_and_counts_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task, "AT_ONCE", 0)
    run(tmp_path / "whole", "grpo.steps=4")
    told = [line for line in capsys.readouterr().out.splitlines() if "were left out" in line]
    assert len(told) == 2 and all("prompts too long)" in line for line in told)
    run(tmp_path / "run", "grpo.steps=2")
    assert [line for line in capsys.readouterr().out.splitlines() if "were left out" in line][1] != told[1]
    run(tmp_path / "run", "grpo.steps=4", f"resume={tmp_path / 'run'}")
    assert [line for line in capsys.readouterr().out.splitlines() if "were left out" in line] == told[1:]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert all(weights(tmp_path / "run")[name].equal(one) for name, one in weights(tmp_path / "whole").items())
    asked = [json.loads(line)["id"] for line in (tmp_path / "whole" / "completions.jsonl").read_text().splitlines()]
    assert len(set(asked)) == 32  # eight prompts a step, whatever was passed over
