"""Rows of local files, each with its `file:line` (`file:row N` where a file has no lines), told apart by the file's
ending.

A CSV cell is the text that the file holds: no reader guesses a type, so `007`, `NA` and twenty digits stay what they
are; a JSON number with a point keeps its literal. A file that says a thing in two ways is refused. Left out:
compressed files, and bytes that were changed inside a text (nothing in a text file tells).
"""

import csv
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from reasoner.data.excel import read_excel
from reasoner.data.parquet import read_parquet
from reasoner.data.places import files_of
from reasoner.data.values import written_float
from reasoner.errors import DataError

Located = tuple[dict[str, Any], str]  # a row's columns and its file:line
SEPARATORS = ",;\t"
MAX_CELL_CHARS = 2**31 - 1  # csv's own limit is 131,072, less than one long document
EXCEL = (".xlsx", ".xlsm")


def find_files(path: str, split: str | None = None) -> list[Path]:
    """The files that `data.path` means: see places.files_of."""
    return files_of(path, split, ENDINGS)


def read_files(files: list[Path], sheet: str | None = None) -> Iterator[Located]:
    """The rows of all files in order. Raises DataError, with file:line, if one is empty, unreadable or broken."""
    for file in files:
        yield from read_file(file, sheet)


def read_file(path: Path, sheet: str | None = None) -> Iterator[Located]:
    """The rows of a file in its order. Raises DataError, with file:line, if the file is empty, unreadable or broken."""
    ending = path.suffix.lower()
    if sheet is not None and ending not in EXCEL:
        raise DataError(f"data.sheet={sheet}: {path} is no Excel file: leave data.sheet out, or set it to null here")
    rows = read_excel(path, sheet) if ending in EXCEL else READERS[ending](path)
    count = 0
    try:
        for row in rows:
            yield row
            count += 1
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from None
    if not count:
        raise DataError(f"{path} holds no rows: give a file that has some")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, _decoded(line, path, number)


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.start + 1
        raise DataError(f"{path}:{number}: byte {byte} is not UTF-8: save the file as UTF-8") from None


def _txt(path: Path) -> Iterator[Located]:
    for number, line in _lines(path):
        if line.strip():
            yield {"text": line.rstrip("\r\n")}, f"{path}:{number}"


def _jsonl(path: Path) -> Iterator[Located]:
    for number, line in _lines(path):
        if line.strip():
            yield _object(_json(line, path, number), f"{path}:{number}"), f"{path}:{number}"


def is_blank(line: bytes, path: Path, number: int) -> bool:
    """Whether a line holds no row."""
    return line.isspace() or (line[0] > 127 and not _decoded(line, path, number).strip())


def jsonl_row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The row of one line that is not blank. Raises DataError, with file:line, if it is no JSON object in UTF-8.

    Half the lines of usual files take the short way, twice as fast: flat objects with a colon for each name and no
    other, so that no name is there twice, and no escaped character.
    """
    try:
        text = line.decode()
        row, end = QUICK(text, 0)
    except (ValueError, StopIteration, RecursionError):
        row, end, text = None, 0, ""
    if type(row) is dict and text.count(":") == len(row) and "\\u" not in text and text[end:] in LINE_ENDS:
        return row
    return _object(_json(_decoded(line, path, number), path, number), f"{path}:{number}")


def _json_file(path: Path) -> Iterator[Located]:
    lines = list(_lines(path))
    whole = "".join(text for _, text in lines)
    if not whole.lstrip().startswith("["):
        yield from _objects(path, lines, whole)
        return
    for number, row in enumerate(_json(whole, path, 1), start=1):
        yield _object(row, f"{path}:row {number}"), f"{path}:row {number}"


def _objects(path: Path, lines: list[tuple[int, str]], whole: str) -> Iterator[Located]:
    """A JSON file that is no list: one object a line, or one object that holds the list (`{"data": [...]}`)."""
    first = next((line for _, line in lines if line.strip()), "")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        value = _json(whole, path, 1) if whole.strip() else {}
        lists = [name for name, rows in value.items() if isinstance(rows, list)] if isinstance(value, dict) else []
        if len(lists) == 1:
            for number, row in enumerate(value[lists[0]], start=1):
                yield _object(row, f"{path}:{lists[0]} row {number}"), f"{path}:{lists[0]} row {number}"
            return
        if whole.strip():
            raise DataError(
                f"{path} is one JSON object, not rows: write a list of objects, or an object a line"
            ) from None
    for number, line in lines:
        if line.strip():
            yield _object(_json(line, path, number), f"{path}:{number}"), f"{path}:{number}"


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


LINE_ENDS = ("\n", "\r\n", "")
QUICK = json.JSONDecoder(parse_float=written_float).scan_once  # pyright: ignore[reportAttributeAccessIssue] - not in its stub
DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=written_float)


def _json(text: str, path: Path, first_line: int) -> Any:
    try:
        value = DECODER.decode(text.rstrip("\r\n"))  # an object cut short is broken on its own line, not on the next
        if "\\ud" in text or "\\uD" in text:  # half a surrogate pair is legal JSON and no text
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line, column = first_line + error.lineno - 1, error.colno
        raise DataError(f"{path}:{line}: broken JSON at column {column} ({error.msg}): repair the line") from None
    except UnicodeEncodeError:
        raise DataError(f"{path}:{first_line}: half of a surrogate pair is no character: repair the text") from None
    except (ValueError, RecursionError) as error:  # two equal names, 4,300 digits, 1,000 brackets
        raise DataError(f"{path}:{first_line}: JSON that no row can hold ({error}): repair the line") from None
    return value


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise DataError(f'{where}: a JSON {kind} where an object is wanted: write {{"question": ..., "answer": ...}}')
    return row


def _csv(path: Path) -> Iterator[Located]:
    csv.field_size_limit(MAX_CELL_CHARS)
    lines = _lines(path)
    start, first = next(((number, text) for number, text in lines if text.strip()), (1, ""))
    counts = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in SEPARATORS}
    separator = max(SEPARATORS, key=counts.__getitem__)
    reader = csv.reader(chain([first], (text for _, text in lines)), delimiter=separator, strict=True)
    blank = start - 1
    header: list[str] = []
    try:
        for cells in reader:
            where, start = f"{path}:{start}", blank + reader.line_num + 1
            if not header:
                header = _header(cells, where)
            elif cells and (len(cells) > 1 or len(header) == 1 or cells[0].strip()):
                _check_width(cells, header, separator, where)
                yield dict(zip(header, cells, strict=True)), where
    except csv.Error as error:
        raise DataError(f"{path}:{start}: broken CSV ({error}): repair the quotes of this row") from None


def _check_width(cells: list[str], header: list[str], separator: str, where: str) -> None:
    if len(cells) == len(header):
        return
    mark = "tab" if separator == "\t" else repr(separator)
    remedy = (
        f"put a cell that holds a {mark} into double quotes"
        if len(cells) > len(header)
        else f"write a {mark} for each empty cell too"
    )
    raise DataError(f"{where}: {len(cells)} cells for the {len(header)} columns of the header: {remedy}")


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{where}: two columns are named {', '.join(map(repr, twice))}: rename one")
    return names


READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json_file,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _txt,
    ".parquet": read_parquet,
}
ENDINGS = (*READERS, *EXCEL)
