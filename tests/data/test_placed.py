"""Big JSONL files by place: the same rows as from memory, and nothing read that was changed meanwhile."""

import os
from pathlib import Path
from typing import Any

import pytest

from reasoner.config import Data
from reasoner.data import placed
from reasoner.data.placed import PlacedRows
from reasoner.data.rows import Rows, read_rows
from reasoner.errors import DataError

LINES = [
    b'\xef\xbb\xbf{"question": "q1", "answer": 1.10}\n',
    b"\n",
    b'  {"question": "q\xc3\xbc2", "answer": "007"}\r\n',
    b" \t \r\n",
    "\u00a0\n".encode(),
    b'{"question": "q3", "answer": 3}\n',
    b'{"question": "q4", "answer": null}',
]


@pytest.fixture
def files(tmp_path: Path) -> str:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(LINES))
    return str(tmp_path / "*.jsonl")


@pytest.fixture
def by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placed, "AT_LEAST_BYTES", 0)


def both(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Rows, Rows]:
    found = []
    for least in (10**9, 0):
        monkeypatch.setattr(placed, "AT_LEAST_BYTES", least)
        found.append(read_rows(Data(**settings)))
    assert not isinstance(found[0].rows, PlacedRows) and isinstance(found[1].rows, PlacedRows)
    return found[0], found[1]


@pytest.mark.parametrize("limit", [None, 1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize(
    "map", ["", "def change(row):\n    return None if row['question'] == 'q3' else {**row, 'n': 1}\n"]
)
def test_rows_by_place_are_the_rows_in_memory(
    files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, map: str
) -> None:
    (tmp_path / "own.py").write_text(map)
    settings = {"path": files, "limit": limit, "map": f"{tmp_path / 'own.py'}:change" if map else None}
    memory, place = both(monkeypatch, **settings)
    assert list(place.rows) == list(memory.rows) == list(place.rows)  # a second time too
    assert [place.rows[i] for i in reversed(range(len(place.rows)))] == list(memory.rows)[::-1]
    assert place.rows[1:3] == memory.rows[1:3]
    assert place.dropped_by_map == memory.dropped_by_map
    assert [str(row.columns["answer"]) for row in place.rows[:1]] == ["1.10"]
    with pytest.raises(IndexError):
        place.rows[len(place.rows)]


def test_a_file_that_changes_under_the_run_is_not_read_on(files: str, by_place: None, tmp_path: Path) -> None:
    rows = read_rows(Data(path=files)).rows
    path = tmp_path / "b.jsonl"
    path.write_bytes(path.read_bytes().replace(b"q3", b"q7"))
    os.utime(path, ns=(1, 1))
    assert rows[0].columns["question"] == "q1"  # of the other file
    with pytest.raises(DataError, match=r"b\.jsonl was changed while a run reads it"):
        rows[4]
    path.unlink()
    with pytest.raises(DataError, match=r"b\.jsonl can't be read: No such file"):
        rows[4]


def test_errors_name_the_line(files: str, by_place: None, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"question": "q"}\n\n{"question": \n')
    with pytest.raises(DataError, match=r"b\.jsonl:3: broken JSON"):
        list(read_rows(Data(path=files)).rows)
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"b\.jsonl holds no rows"):
        read_rows(Data(path=files))


def test_a_map_must_give_the_same_again(files: str, by_place: None, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "seen = set()\ndef new(row):\n    if row['question'] not in seen:\n"
        "        seen.add(row['question'])\n        return row\n"
    )
    rows = read_rows(Data(path=files, map=f"{own}:new"))
    assert rows.dropped_by_map == 4
    with pytest.raises(DataError, match=r"a\.jsonl:1: data\.map drops this row only the second time"):
        rows.rows[0]
    with pytest.raises(DataError, match=r"data\.map=.* dropped all 8 rows"):
        own.write_text("def new(row):\n    return None\n")
        read_rows(Data(path=files, map=f"{own}:new"))
