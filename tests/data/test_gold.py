"""Gold answers as text: F1, the last box, numbers from JSON."""

import re
from pathlib import Path
from typing import Any

import pytest

from reasoner.config import Data
from reasoner.data.files import read_file
from reasoner.data.gold import GoldAnswer, last_boxed
from reasoner.errors import ConfigError, DataError

GSM8K = Data(answer_pattern=r"####\s*(.+)")


def gold(cell: Any, **settings: Any) -> str:
    return GoldAnswer(Data(**settings)).read({"answer": cell})


@pytest.mark.parametrize(
    ("cell", "kind", "answer"),
    [
        ("1,450", "number", "1450"),
        ("1,234,567.50", "number", "1234567.50"),
        ("-3", "number", "-3"),
        (" 18 ", "number", "18"),
        ("(1, 2)", "number", "(1, 2)"),
        ("12,34", "number", "12,34"),
        ("1,450", "text", "1,450"),
        ("(1,234)", "latex", "(1,234)"),
        ("007", "number", "007"),
        ("NA", "text", "NA"),
        (145.0, "number", "145"),
        (145.0, "text", "145.0"),
        (0.1, "number", "0.1"),
        (1e300, "number", "1e+300"),
        (12345678901234567890, "number", "12345678901234567890"),
        (True, "text", "True"),
        (None, "number", ""),
        (float("nan"), "number", ""),
        ("  ", "number", ""),
    ],
)
def test_cells_of_each_kind(cell: Any, kind: str, answer: str) -> None:
    assert gold(cell, answer_kind=kind) == answer


def test_f1_gsm8k_answer_with_a_comma() -> None:
    row = {"answer": "He pays 1,000+450=<<1000+450=1450>>1,450.\n#### 1,450"}
    assert GoldAnswer(GSM8K).read(row) == "1450"


@pytest.mark.parametrize("name", ["train", "test"])
def test_f1_every_gsm8k_answer_is_a_whole_number(shared: Path, name: str) -> None:
    reader = GoldAnswer(GSM8K)
    path = shared / "gsm8k" / f"{name}.jsonl"
    answers = [reader.read(row) for row, _ in read_file(path)]
    assert all(re.fullmatch(r"-?\d+", answer) for answer in answers)
    with_comma = sum("," in str(row["answer"]).rpartition("####")[2] for row, _ in read_file(path))
    assert with_comma == {"train": 79, "test": 14}[name]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so $\boxed{18}$.", "18"),
        (r"\boxed{19}, no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"the answer is $\boxed 2$", "2"),
        (r"\boxed\pi", r"\pi"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{3}}", "3"),
        ("no box", None),
        (r"\boxed{open", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_every_math_solution_has_a_box(shared: Path) -> None:
    reader = GoldAnswer(Data(answer="{solution}", answer_pattern="boxed", answer_kind="latex"))
    answers = {where: reader.read(row) for row, where in read_file(shared / "math/train.jsonl")}
    # These two have an empty \boxed{}: blank answers, which are dropped and counted.
    assert [int(where.rpartition(":")[2]) for where, answer in answers.items() if not answer] == [5530, 5532]


def test_math500_answers_are_its_boxes(shared: Path) -> None:
    rows = [row for row, _ in read_file(shared / "math/math500.jsonl")]
    assert sum(last_boxed(row["solution"]) == row["answer"] for row in rows) >= 495


def test_text_without_the_pattern_is_an_error_and_a_blank_cell_is_not() -> None:
    with pytest.raises(DataError, match=r"answer_pattern=####.* finds no answer in 'just 18'"):
        GoldAnswer(GSM8K).read({"answer": "just 18"})
    with pytest.raises(DataError, match=r"answer_pattern=boxed finds no answer in '\.\.\.x{80}'"):
        gold("x" * 500, answer_pattern="boxed")
    assert GoldAnswer(GSM8K).read({"answer": None}) == ""


@pytest.mark.parametrize(("pattern", "said"), [("(", "is no regular expression"), (r"####\s*", "round brackets")])
def test_patterns_that_can_not_serve(pattern: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GoldAnswer(Data(answer_pattern=pattern))
