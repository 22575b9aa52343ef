"""One run of a very small model, trained once a session, for all tests that only read it."""

from pathlib import Path

import pytest

from reasoner import train
from tests.test_pipeline import SMALL

SUMS = [  # of two digits, which a model of 20,000 parameters learns in part
    *SMALL,
    "data.options={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}",
    "data.size=1500",
    "data.heldout=60",
    "sft.data.map=null",
    "sft.data.completion=null",
    "sft.steps=150",
    "sft.examples_per_step=64",
    "sft.optim.lr=1e-2",
    "grpo.steps=6",
    "grpo.optim.lr=1e-3",
    "grpo.eval_every=2",
    "checkpoint.keep=1",
    "evaluate.samples=4",
]


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run through all stages, that chose the best of four checkpoints. To be read only."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train("tiny", overrides=[*SUMS, f"out={out}"])
    return out


@pytest.fixture(scope="session")
def adapted_run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained an adapter for a few steps on what `trained_run` saved. To be read only."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    lora = "model.lora={r: 4, alpha: 16, targets: [q_proj, v_proj, down_proj]}"
    base = ["model.scratch=null", f"model.name={trained_run / 'model'}", lora]
    steps = ["stages=[sft,export]", "sft.steps=12", "sft.optim.lr=3e-2", "checkpoint.keep=2", "checkpoint.every=6"]
    train("tiny", overrides=[*SUMS, *base, *steps, f"out={out}"])
    return out
