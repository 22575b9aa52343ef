"""Excel sheets: text as it is shown, or a cell named with its doubt; sheets chosen; broken workbooks in one line."""

import datetime
import io
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from reasoner.data.columns import cell_text
from reasoner.data.files import find_files, read_files
from reasoner.data.values import DoubtfulText
from reasoner.errors import DataError


def saved(path: Path, sheets: dict[str, list[list[Any]]], formats: dict[str, str] | None = None) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.worksheets[0])
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
        for place, style in (formats or {}).items():
            sheet[place].number_format = style
    book.save(path)
    return path


def rows_of(path: Path, sheet: str | None = None) -> list[tuple[dict[str, Any], str]]:
    return list(read_files(find_files(str(path)), sheet))


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        ("007", "General", "007"),
        (7, "000", "007"),
        (-7, "000", "-007"),
        (1, "0.0", "1.0"),
        (1, "General", "1"),
        (1.5, "General", "1.5"),
        (0.1 + 0.2, "General", "0.3"),
        (1234, "#,##0", "1,234"),
        (-1234567.5, "#,##0.00", "-1,234,567.50"),
        (0.5, "0%", "50%"),
        (0.125, "0.0%", "12.5%"),
        ("NA", "General", "NA"),
        ("null", "@", "null"),
        (True, "General", "TRUE"),
        (12345678901234567890, "General", None),
        (123456789012345, "General", "123456789012345"),
        (1234567890123456, "0", None),
        ("12345678901234567890", "@", "12345678901234567890"),
        ("1,234", "@", "1,234"),
        ("=not a formula", "@", None),
        (datetime.date(2024, 3, 4), "yyyy-mm-dd", "2024-03-04"),
        (datetime.datetime(2024, 3, 4, 5, 6, 7), "yyyy-mm-dd h:mm:ss", "2024-03-04 05:06:07"),
        (datetime.date(2024, 3, 4), "mm-dd-yy", None),
        (datetime.date(2024, 3, 4), "d. mmmm yyyy", None),
        (datetime.datetime(2024, 3, 4, 5), "yyyy-mm-dd", None),
        (3.14159, "0.00", None),
        (1.2345678901234567e19, "General", None),
        (1e-9, "General", None),
        (5, '"$"#,##0', None),
        (5, "0.##", None),
        ("=1+1", "General", None),
        ("#N/A", "General", None),
    ],
)
def test_f3_a_cell_is_what_the_sheet_shows_or_it_is_named(
    tmp_path: Path, value: Any, style: str, text: str | None
) -> None:
    path = saved(tmp_path / "a.xlsx", {"Sums": [["question", "answer"], ["q", value]]}, {"B2": style})
    ((row, where),) = rows_of(path)
    assert where == f"{path}:Sums!row 2" and row["question"] == "q"
    if text is not None:
        assert row["answer"] == text and type(row["answer"]) is str
        return
    assert isinstance(row["answer"], DoubtfulText)
    with pytest.raises(DataError, match="sheet 'Sums', cell B2: "):
        cell_text(row["answer"])


def test_sheets_are_chosen_by_name_unless_one_alone_has_rows(tmp_path: Path) -> None:
    rows = [["question"], ["q"]]
    path = saved(tmp_path / "a.xlsx", {"Notes": [], "Data": rows})
    assert [row for row, _ in rows_of(path)] == [{"question": "q"}]
    path = saved(tmp_path / "a.xlsx", {"Notes": [["x"], ["y"]], "Data": rows})
    assert [row for row, _ in rows_of(path, "Data")] == [{"question": "q"}]
    with pytest.raises(DataError, match=r"several sheets: choose one with data\.sheet=NAME; there are: Notes, Data"):
        rows_of(path)
    with pytest.raises(DataError, match=r"no sheet 'data': data\.sheet is one of Notes, Data"):
        rows_of(path, "data")
    (tmp_path / "a.csv").write_text("question\nq\n")
    with pytest.raises(DataError, match=r"data\.sheet=Data: .*a\.csv is no Excel file"):
        rows_of(tmp_path / "a.csv", "Data")


def test_blank_rows_and_cells_are_counted_as_the_sheet_counts_them(tmp_path: Path) -> None:
    sheet = [[], ["", "question", None, " answer "], [], [None, "q", None, 1], [None, "r"], [None, " ", None, ""]]
    path = saved(tmp_path / "a.xlsx", {"S": sheet})
    assert rows_of(path) == [
        ({"question": "q", "answer": "1"}, f"{path}:S!row 4"),
        ({"question": "r", "answer": ""}, f"{path}:S!row 5"),
    ]


@pytest.mark.parametrize(
    ("sheet", "said"),
    [
        ([["q", "a"], ["x", 1, "stray"]], "row 2: cell C2 stands under no column name"),
        ([["a", "q", "a"], [1, 2, 3]], "two columns are named 'a'"),
        ([["q", "=1+1"], ["x", 1]], "a column's name is in doubt: sheet 'S', cell B1"),
        ([["q", "a"]], "holds no rows"),
        ([], "holds no rows"),
    ],
)
def test_sheets_that_are_no_table(tmp_path: Path, sheet: list[list[Any]], said: str) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(saved(tmp_path / "a.xlsx", {"S": sheet}))
    assert said in str(caught.value)


def test_a_size_that_the_file_states_wrongly_loses_no_row(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.xlsx", {"S": [["q", "a"], ["x", 1], ["y", 2]]})
    changed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'<dimension ref="A1:B3"', b'<dimension ref="A1:A1"'))
    path.write_bytes(changed.getvalue())
    assert [row for row, _ in rows_of(path)] == [{"q": "x", "a": "1"}, {"q": "y", "a": "2"}]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no workbook", b"\xd0\xcf\x11\xe0old"])
def test_what_is_no_workbook_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.xlsx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is no whole Excel file \(.*\): save it again as \.xlsx") as caught:
        rows_of(path)
    assert "\n" not in str(caught.value)
