"""docs/sft_then_grpo.md: its three commands go from one run to the next, and its figures are measured."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from benchmarks.common import RESULTS, read_json
from reasoner.__main__ import main

PAGE = (Path(__file__).parents[1] / "docs/sft_then_grpo.md").read_text()
TWO_RUNS = PAGE.split("## In two runs")[1]


def test_its_commands_go_from_one_run_to_the_next(adapted_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    warm, export, practise = re.findall(r"^python -m reasoner (.*)$", TWO_RUNS, re.MULTILINE)
    small = yaml.safe_load((adapted_run / "config.yaml").read_text())
    small["sft"]["steps"], small["grpo"]["steps"] = 2, 1
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/mine.yaml").write_text(yaml.safe_dump({**small, "name": "mine"}))
    monkeypatch.chdir(tmp_path)
    few = ["evaluate.problems=8", "evaluate.samples=0", "grpo.eval_every=null"]
    assert main([*shlex.split(warm), *few]) == 0
    assert main([*shlex.split(export), "problems=8", "dtype=float32"]) == 0  # bfloat16 would round so small a model
    assert main([*shlex.split(practise), *few]) == 0
    last, first = (
        json.loads((tmp_path / "outputs" / name / "eval.json").read_text()) for name in ("warm", "practised")
    )
    assert [row["row"] for row in first] == ["base", "grpo", "export"]
    assert (
        last[-1]["greedy_accuracy"] == first[0]["greedy_accuracy"]
        and last[-1]["mean_tokens"] == first[0]["mean_tokens"]
    )
    assert (tmp_path / "outputs/practised/adapter/adapter_config.json").exists()


def test_its_figures_are_measured():
    runs = read_json(RESULTS / "word_problems.json")["runs"]
    before = [runs[name]["sets"]["svamp"]["before"]["strict"]["accuracy"] for name in ("bf16-0", "nf4-0")]
    assert re.findall(r"(\d\.\d)%", TWO_RUNS) == [f"{accuracy:.1f}" for accuracy in before]
