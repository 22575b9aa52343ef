"""Every gold answer of GSM8K and MATH-500 earns full marks (PITFALLS E3, F1), without exception."""

import json
from pathlib import Path

import pytest

from reasoner.rewards.math import accuracy

DATA = Path(__file__).parents[2] / "../shared/data"


def rows(name: str) -> list[dict[str, str]]:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not beside the repository")
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "count", "with_comma"), [("gsm8k/train.jsonl", 7473, 79), ("gsm8k/test.jsonl", 1319, 14)]
)
def test_f1_every_gold_of_gsm8k(name: str, count: int, with_comma: int):
    solutions = [row["answer"] for row in rows(name)]
    golds = [solution.rpartition("####")[2].strip() for solution in solutions]
    assert len(golds) == count
    assert [gold for gold in golds if accuracy(f"#### {gold}", gold, "number") != 1.0] == []
    commas = [gold for gold in golds if "," in gold]
    assert len(commas) == with_comma
    assert [gold for gold in commas if accuracy(f"#### {gold.replace(',', '')}", gold, "number") != 1.0] == []
    assert [s for s, gold in zip(solutions, golds, strict=True) if accuracy(s, gold, "number") != 1.0] == []
    assert [gold for gold in golds if accuracy(f"#### {gold}1", gold, "number") != 0.0] == []


def test_e3_every_gold_of_math_500(load, make_prompt, make_completion):
    golds = [row["answer"] for row in rows("math/math500.jsonl")]
    assert len(golds) == 500
    rewards = load({"accuracy": "math"}, workers=2)
    prompts = [make_prompt(gold, answer_kind="latex") for gold in golds]
    scores = rewards.score(prompts, [make_completion(rf"\boxed{{{gold}}}") for gold in golds])
    assert [(i, golds[i], score) for i, score in enumerate(scores) if score.total != 1.0] == []
