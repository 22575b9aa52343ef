"""Rows from Python: pandas, datasets, Arrow and columns give what plain rows give."""

import datetime
from typing import Any

import datasets
import numpy
import pandas
import pyarrow
import pytest

from reasoner.data.columns import cell_text
from reasoner.data.python_rows import rows_from_python
from reasoner.data.task import load_task
from reasoner.errors import DataError

ROWS = [{"question": f"What is {i}+1?", "answer": str(i + 1), "level": i} for i in range(6)]
HANDED = {
    "rows": ROWS,
    "generator": (row for row in ROWS),
    "columns": {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "pandas": pandas.DataFrame(ROWS, index=[5, 5, 4, 3, 2, 1]),
    "arrow": pyarrow.Table.from_pylist(ROWS),
    "batch": pyarrow.RecordBatch.from_pylist(ROWS),
    "datasets": datasets.Dataset.from_list(ROWS),
    "streamed": datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "splits": datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
}


@pytest.mark.parametrize("name", HANDED)
def test_everything_gives_the_same_rows(conf: Any, tokenizer: Any, name: str) -> None:
    rows = rows_from_python(HANDED[name])
    assert [dict(row) for row in rows] == ROWS
    assert {type(cell) for row in rows for cell in row.values()} == {str, int}
    given = ROWS if name == "generator" else HANDED[name]  # a generator is used up by now
    task = load_task(conf({"heldout": 2}, ("grpo", "evaluate")), tokenizer, given)
    assert (len(task.prompts), len(task.sets["heldout"])) == (4, 2)


def test_a_frames_blanks_are_blank_and_its_numbers_python_s() -> None:
    frame = pandas.DataFrame(
        {
            "a": [1.5, numpy.nan],
            "b": pandas.array([12345678901234567, None], dtype="Int64"),
            "c": pandas.to_datetime(["2024-03-04", None]),
            "d": ["007", None],
            "e": numpy.array([0.1, 0.2], dtype="float32"),
            "f": [numpy.array([1, 2]), None],
            "g": pandas.Categorical(["x", None]),
            7: [datetime.date(2024, 3, 4), pandas.NA],
        }
    )
    first, second = rows_from_python(frame)
    texts = {name: cell_text(cell) for name, cell in first.items()}
    assert texts.pop("c").startswith("2024-03-04")
    expected = {
        "a": "1.5",
        "b": "12345678901234567",
        "d": "007",
        "e": "0.1",
        "f": "[1, 2]",
        "g": "x",
        "7": "2024-03-04",
    }
    assert texts == expected
    assert {name for name, cell in second.items() if cell_text(cell) == ""} == {*first} - {"e"}


def test_splits_are_chosen_by_name() -> None:
    two = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2]))
    assert len(rows_from_python(two, "test")) == 2
    for split in (None, "dev"):
        with pytest.raises(DataError, match=r"several splits: choose one with data\.split; there are: train, test"):
            rows_from_python(two, split)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "two columns named 'a'"),
        (pandas.DataFrame({"a": []}), "are empty"),
        ({"a": [1], "b": [1, 2]}, "unequal lengths"),
        ({"a": [1], "b": "x"}, "the column 'b' is a str: give a list"),
        ("train.jsonl", r"is a str: give rows, a frame, or data\.path=FILE"),
        (7, "is a int: give rows"),
        ([1], "row 1 is a int, not a mapping"),
    ],
)
def test_what_is_no_table(given: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        rows_from_python(given)
