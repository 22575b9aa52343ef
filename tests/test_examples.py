"""Every example, run as its docstring says with few steps: what it leaves shows that it did what it is for."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
SMALL = [
    "sft.examples_per_step=16",
    "grpo.steps=2",
    "grpo.prompts_per_step=4",
    "grpo.completions_per_prompt=4",
    "evaluate.problems=40",
    "evaluate.samples=2",
    "reward.workers=1",
]


def run(name: str, cwd: Path, *overrides: str) -> list[str]:
    """The lines that `python examples/NAME` prints, run in `cwd` with the package of this checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name), *SMALL, *overrides]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_examples_are_all_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {
        "custom_reward.py",
        "own_csv.py",
        "own_loop.py",
        "own_parts.py",
        "sft_then_grpo.py",
    }


def test_custom_reward_scores_every_completion(tmp_path: Path):
    said = run("custom_reward.py", tmp_path, "data.size=600", "data.heldout=40", "sft.steps=60", "out=run")
    score = runpy.run_path(str(ROOT / "examples" / "custom_reward.py"))["score"]
    completions = lines(tmp_path / "run" / "completions.jsonl")
    assert [row["parts"]["reward"] for row in completions] == pytest.approx(
        [score(row["completion"], row["answer"]) for row in completions]
    )
    assert len({row["parts"]["reward"] for row in completions}) > 1, "a reward that is always the same teaches nothing"
    assert float(said[-1]) == json.loads((tmp_path / "run" / "eval.json").read_text())[-1]["greedy_accuracy"]


def test_own_csv_asks_what_its_table_says_and_holds_out_rows(tmp_path: Path):
    said = run("own_csv.py", tmp_path, "sft.steps=3")
    out = tmp_path / "outputs" / "example-csv"
    completions = lines(out / "completions.jsonl")
    for row in completions:
        left, right = int(row["columns"]["left"]), int(row["columns"]["right"])
        assert f"{left} + {right}=" in row["prompt"] and row["answer"] == str(left + right)
    assert "sft: 700 examples of 900 rows (200 held out)" in "\n".join(said)
    measured = {problem["id"] for problem in lines(out / "eval_problems.jsonl")}
    trained = {f"heldout:{30 * int(row['columns']['left']) + int(row['columns']['right']) + 1}" for row in completions}
    assert len(measured) == 40 and not measured & trained, "rows are numbered from 1, in the order of the file"
    assert 0 <= float(said[-1]) <= 1


def test_sft_then_grpo_goes_on_from_the_model_that_sft_saved(tmp_path: Path):
    said = run("sft_then_grpo.py", tmp_path, "data.size=600", "data.heldout=40", "sft.steps=60")
    sft, grpo = (
        json.loads((tmp_path / "outputs" / name / "eval.json").read_text()) for name in ("example-sft", "example-grpo")
    )
    assert [row["row"] for row in (*sft, *grpo)] == ["sft", "export", "base", "grpo", "export"]
    warm, base = (
        [problem["text"] for problem in lines(tmp_path / "outputs" / name / "eval_problems.jsonl")[:40]]
        for name in ("example-sft", "example-grpo")
    )
    assert warm == base and sft[0]["mean_tokens"] < 8, "a model that SFT never touched runs to the limit of 8 tokens"
    shown = [f"{row['row']} {row['greedy_accuracy']:.1%}" for row in (*sft, *grpo)]
    assert said[-5:] == shown


def test_own_parts_are_used(tmp_path: Path):
    said = run("own_parts.py", tmp_path, "data.size=600", "data.heldout=40", "sft.steps=20", "grpo.steps=50", "out=run")
    assert "rollout.engine: hf, handed in from Python; it plans its own memory" in said
    assert any(line.startswith("step 50: reward ") for line in said)
    greedy_and_sampled = 3 * (40 + 40)  # base, sft and grpo; what was exported samples by itself
    assert said[-1].endswith(f" after {greedy_and_sampled + 50 * 4:,} prompts")
    loss = [line for line in (tmp_path / "run/config.yaml").read_text().splitlines() if "reinforce" in line]
    assert loss == ["    _target_: __main__.reinforce"]


def test_an_own_loop_learns_what_the_pipeline_does(tmp_path: Path):
    reward = f"reward={ROOT / 'tests/tiny_rewards.py'}:close_enough"  # graded, so that there is something to learn
    small = ("data.size=600", "data.heldout=40", "sft.steps=20", "grpo.optim.lr=1e-3", reward)
    said = run("own_loop.py", tmp_path, *small)
    from reasoner import train

    result = train("tiny", overrides=[*SMALL, *small, f"out={tmp_path / 'run'}"])
    rewards = [row["reward_mean"] for row in lines(tmp_path / "run" / "metrics.jsonl")[20:]]
    assert 0 < rewards[0] != rewards[1]
    assert [line for line in said if line.startswith("step ")] == [
        f"step {i + 1}: {reward:.2f} of 4 groups" for i, reward in enumerate(rewards)
    ]
    assert said[-1] == str({"heldout": f"{result.rows[2]['greedy_accuracy']:.1%}"})
    assert (tmp_path / "outputs/own-loop/model/config.json").exists()


def test_the_notebook_runs_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples/tiny.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "what a cell said belongs to whoever runs it"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [
        "".join(o.get("text", "") or o["data"]["text/plain"] for o in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    (low,) = re.findall(r"grpo against sft: .* 95% (.*) to", said[2])
    assert float(low) > 0, "the reward of the second cell is learnt, and the interval shows it"
    assert [line[:9] for line in said[3].splitlines()[:-1]] == [f"step {step:3}:" for step in range(1, 40, 8)]
    assert (tmp_path / "outputs/notebook/report.html").exists() and "scored again; no model was loaded" in said[4]
    assert re.findall(r"\d tokens?\)", said[5])[1:] and "export" in said[5].split("now base and export answer")[1]
