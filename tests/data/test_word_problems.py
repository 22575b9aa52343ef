"""Maps of MAWPS + ASDiv, SVAMP, ASDiv and MAWPS rows."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasoner.data import word_problems
from reasoner.data.files import read_file


def filled(equation: str, answer: str, numbers: str = "8.0 2.5 0.0") -> dict[str, Any] | None:
    row = {"Question": "number0 , number1 and number2 ?", "Numbers": numbers, "Equation": equation, "Answer": answer}
    return word_problems.fill_numbers(row)


def test_steps_are_worked_innermost_first() -> None:
    assert filled("- * number0 number1 + number2 3.0", "17.0") == {
        "question": "8, 2.5 and 0?",
        "answer": "17",
        "solution": "8 * 2.5 = 20\n0 + 3 = 3\n20 - 3 = 17\n#### 17",
    }


@pytest.mark.parametrize(
    ("equation", "answer"),
    [
        ("+ number0 number1", "10.6"),  # another answer than the file's
        ("/ number0 number2", "0.0"),
        ("+ number0", "8.0"),
        ("+ number0 number1 number2", "10.5"),
        ("+ number0 number7", "8.0"),
        ("+ number0 x", "8.0"),
        ("", "8.0"),
    ],
)
def test_equations_that_do_not_give_the_answer(equation: str, answer: str) -> None:
    assert filled(equation, answer) is None


def test_thirds_are_exact_until_they_are_written() -> None:
    assert filled("* / number0 3.0 3.0", "8.0") is not None
    assert filled("/ number0 3.0", "2.6667") == {
        "question": "8, 2.5 and 0?",
        "answer": "2.6667",
        "solution": "8 / 3 = 2.6667\n#### 2.6667",
    }


def test_the_real_training_file(shared: Path) -> None:
    path = shared / "word_problems/mawps_asdiv-a_train.csv"
    made = [word_problems.fill_numbers(row) for row, _ in read_file(path)]
    rows = [row for row in made if row]
    assert len(made) == 3138
    assert len({row["question"] for row in rows}) == 2952  # what ../shared/rivals trains on
    rounded = 0
    for row in rows:
        assert "number" not in re.sub(r"[a-z]number|numbers?\b", "", row["question"])
        assert re.fullmatch(r"-?\d+(\.\d{1,4})?", row["answer"])
        *steps, last = row["solution"].split("\n")
        assert last == f"#### {row['answer']}" and steps[-1].endswith(f"= {row['answer']}")
        off = [step for step in steps if abs(eval("{} - ({})".format(*step.split(" = ")))) > 1e-9]
        assert all(re.search(r"\.\d{4}", step) for step in off)  # a third written with four decimals
        rounded += bool(off)
    assert rounded == 48


@pytest.mark.parametrize(
    ("change", "row", "made"),
    [
        (
            word_problems.svamp,
            {"Body": "He has 290 bananas", "Question": "How many ?", "Answer": 145.0},
            {"question": "He has 290 bananas. How many?", "answer": "145"},
        ),
        (
            word_problems.svamp,
            {"Body": "He has 3.", "Question": "How many?", "Answer": "0.5"},
            {"question": "He has 3. How many?", "answer": "0.5"},
        ),
        (  # ChilleD/SVAMP on the hub: every column is text
            word_problems.svamp,
            {"Body": "He has 3 pens", "Question": "How many?", "Answer": "3.0", "question_concat": "He has 3 pens How"},
            {"question": "He has 3 pens. How many?", "answer": "3"},
        ),
        (
            word_problems.asdiv,
            {"body": "Nine apples.", "question": "How many?", "answer": "1,450 (apples)"},
            {"question": "Nine apples. How many?", "answer": "1450"},
        ),
        (word_problems.asdiv, {"body": "b", "question": "When?", "answer": "3:30 p.m."}, None),
        (word_problems.asdiv, {"body": "b", "question": "Who?", "answer": "Bryan"}, None),
        (word_problems.asdiv, {"body": "b", "question": "Ratio?", "answer": "5:6"}, None),
        (
            word_problems.mawps,
            {"input": "Sam ?", "target": 0.6666666667},
            {"question": "Sam?", "answer": "0.6666666667"},
        ),
    ],
)
def test_maps(change: Callable[[Any], Any], row: dict[str, Any], made: dict[str, Any] | None) -> None:
    assert change(row) == made


@pytest.mark.parametrize(
    ("change", "name", "kept"),
    [
        (word_problems.svamp, "SVAMP.json", 1000),
        (word_problems.svamp, "svamp_test.jsonl", 1000),
        (word_problems.mawps, "mawps_test.jsonl", 2065),
        (word_problems.asdiv, "asdiv_test.jsonl", 2084),
    ],
)
def test_the_real_evaluation_files(shared: Path, change: Callable[[Any], Any], name: str, kept: int) -> None:
    rows = [change(row) for row, _ in read_file(shared / "word_problems" / name)]
    assert sum(row is not None for row in rows) == kept
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", row["answer"]) and row["question"] for row in rows if row)
