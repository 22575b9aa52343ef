"""Rows of an Excel sheet, each with its `file:SHEET!row N`; the only home of openpyxl.

A cell's text is what the sheet shows where its format leaves no doubt (`007`, `1,234`, `1.0`, `50%`, `2024-03-04`).
Where it does - a date in the reader's own style, a number that Excel has cut to 15 digits or shows rounded, a formula
that was never computed - the cell is a DoubtfulText that names its sheet and place. Left out: .xls, and hiding (hidden
rows and sheets are read).
"""

import re
import warnings
import zipfile
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from reasoner.data.values import DoubtfulText, doubtful
from reasoner.errors import DataError

FIXED = re.compile(r"(#,##)?(0+)(?:\.(0+))?(%?)")
DATES = {
    "yyyy-mm-dd": "%Y-%m-%d",
    "yyyy-mm-dd h:mm:ss": "%Y-%m-%d %H:%M:%S",
    "yyyy-mm-dd hh:mm:ss": "%Y-%m-%d %H:%M:%S",
    "hh:mm:ss": "%H:%M:%S",
}
EXCEL_DIGITS = 15
AS_TEXT = "format the column as Text in Excel and write it as you mean it"

Row = tuple[dict[str, Any], str]


def read_excel(path: Path, sheet: str | None) -> Iterator[Row]:
    """The rows of `sheet`, or of the only one that holds any; the first row that isn't blank names the columns.

    Raises DataError if the file is no whole workbook, a value stands under no name, or the sheet must be named.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # openpyxl tells of styles and validations that it leaves out, as we do
        try:
            rows = _read(path, sheet)
        except (DataError, OSError):
            raise
        except Exception as error:  # what openpyxl trips over in a broken file depends on where it is broken
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{path} is no whole Excel file ({reason}): save it again as .xlsx") from error
    yield from rows


def _read(path: Path, sheet: str | None) -> list[Row]:
    import openpyxl

    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    formulas = openpyxl.load_workbook(path, read_only=True)
    try:
        name = _choose(path, book, sheet)
        return list(_rows(path, name, book[name], formulas[name]))
    finally:
        book.close()
        formulas.close()


def _choose(path: Path, book: Any, sheet: str | None) -> str:
    names = [one.title for one in book.worksheets]
    if sheet is not None:
        if sheet in names:
            return sheet
        raise DataError(f"{path} has no sheet '{sheet}': data.sheet is one of {', '.join(names)}")
    filled = [name for name in names if any(cell.value is not None for row in _cells(book[name]) for cell in row)]
    if len(filled) > 1:
        raise DataError(f"{path} has several sheets: choose one with data.sheet=NAME; there are: {', '.join(filled)}")
    return (filled or names)[0]


def _cells(sheet: Any) -> Iterator[tuple[Any, ...]]:
    sheet.reset_dimensions()  # what a file says of its own size may be wrong, and rows past it would be lost
    return sheet.iter_rows()


def _rows(path: Path, name: str, sheet: Any, formulas: Any) -> Iterator[Row]:
    header: dict[int, str] = {}
    for number, (cells, written) in enumerate(zip(_cells(sheet), _cells(formulas), strict=True), start=1):
        where = f"{path}:{name}!row {number}"
        texts: dict[int, str] = {}
        for column, (cell, raw) in enumerate(zip(cells, written, strict=True)):
            if raw.value is not None:
                texts[column] = _text(cell, raw, f"sheet '{name}', cell {raw.coordinate}")
        if not any(text.strip() for text in texts.values()):
            continue
        if not header:
            header = _header(texts, where)
            continue
        for column, text in texts.items():
            if column not in header and text.strip():
                place = written[column].coordinate
                raise DataError(f"{where}: cell {place} stands under no column name: name its column, or clear it")
        yield {title: texts.get(column, "") for column, title in header.items()}, where


def _header(texts: dict[int, str], where: str) -> dict[int, str]:
    names = {column: str(text).strip() for column, text in texts.items() if text.strip()}
    doubts = [text.doubt for text in texts.values() if isinstance(text, DoubtfulText)]
    if doubts:
        raise DataError(f"{where}: a column's name is in doubt: {doubts[0]}")
    listed = list(names.values())
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise DataError(f"{where}: two columns are named {', '.join(map(repr, twice))}: rename one")
    return names


def _text(cell: Any, raw: Any, place: str) -> str:
    value = cell.value
    if value is None:
        return doubtful("", f"{place}: the formula {raw.value} was never computed: open and save the file in Excel")
    if cell.data_type == "e":
        return doubtful(str(value), f"{place}: the cell shows the error {value}: correct it")
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, str):
        return value
    code = str(cell.number_format or "General").replace("\\", "").split(";")[0]
    if isinstance(value, datetime | date | time):
        style = DATES.get(code.lower())
        text = str(value)
        midnight = not isinstance(value, datetime) or value.time() == time()
        if style and (midnight or "%H" in style):
            return value.strftime(style)
        return doubtful(text, f"{place}: Excel keeps a date ({text}) and no text, in the style {code}: {AS_TEXT}")
    if isinstance(value, int | float):
        return _number(value, code, place)
    return doubtful(str(value), f"{place}: a {type(value).__name__} in the style {code} has no sure text: {AS_TEXT}")


def _number(value: int | float, code: str, place: str) -> str:
    exact = str(value) if isinstance(value, int) else f"{value:.{EXCEL_DIGITS}g}"
    if "e" in exact or "n" in exact or abs(value) >= 10**EXCEL_DIGITS:
        return doubtful(
            exact, f"{place}: Excel keeps this number as {value!r}, {EXCEL_DIGITS} digits of it at most: {AS_TEXT}"
        )
    if code in ("General", "@", "GENERAL"):
        return exact
    style = FIXED.fullmatch(code)
    if not style:
        return doubtful(exact, f"{place}: how the number {exact} looks in the style {code} is not sure: {AS_TEXT}")
    comma, whole, decimals, percent = style.groups()
    number = Decimal(exact) * (100 if percent else 1)
    rounded = number.quantize(Decimal(1).scaleb(-len(decimals or "")), ROUND_HALF_UP)
    digits = len(whole) + (1 + len(decimals) if decimals else 0) + (rounded < 0)
    text = f"{rounded:,f}" if comma else f"{rounded:0{digits}f}"
    if rounded != number:
        return doubtful(exact, f"{place}: the cell shows {text}{percent} and holds {exact}: {AS_TEXT}")
    return text + percent
