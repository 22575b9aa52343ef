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
