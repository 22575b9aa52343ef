"""Rows of local files, each with its `file:line` (`file:row N` where a file has no lines): JSONL, JSON, CSV and
Parquet, told apart by the file's ending.

A CSV cell is the text that the file holds: no reader guesses a type, so `007`, `NA` and twenty digits stay what they
are. Left out: Excel (its dates and numbers are guesses already) and compressed files.
"""

import csv
import difflib
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from reasoner.errors import DataError

Located = tuple[dict[str, Any], str]  # a row's columns and its file:line
SEPARATORS = ",;\t"
MAX_CELL_CHARS = 2**31 - 1  # csv's own limit is 131,072, less than one long document


def file_of(path: str, split: str | None = None) -> Path:
    """The file that `data.path` means: itself, or in a folder the one named after the split.

    Raises DataError if there is none, or it ends in nothing that we read.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = [f for f in sorted(place.iterdir()) if f.stem == split and f.suffix.lower() in READERS]
        if len(found) == 1:
            return found[0]
        there = ", ".join(sorted(f.name for f in place.iterdir() if f.suffix.lower() in READERS)) or "no data file"
        raise DataError(f"data.path={path} is a folder: name a file in it, or set data.split; there is: {there}")
    if not place.exists():
        names = [f.name for f in place.parent.iterdir()] if place.parent.is_dir() else []
        close = difflib.get_close_matches(place.name, names, n=1)
        hint = f"; did you mean {place.parent / close[0]}?" if close else ": give the path of a file that is there"
        raise DataError(f"data.path={path}: there is no such file{hint}")
    if place.suffix.lower() not in READERS:
        raise DataError(f"data.path={path}: a file ends in {', '.join(READERS)}; save it as one of these")
    return place


def read_file(path: Path) -> Iterator[Located]:
    """The rows of a file in its order. Raises DataError, with file:line, if the file is empty, unreadable or broken."""
    count = 0
    try:
        for row in READERS[path.suffix.lower()](path):
            yield row
            count += 1
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from None
    if not count:
        raise DataError(f"{path} holds no rows: give a file that has some")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = error.start + 1
                raise DataError(f"{path}:{number}: byte {byte} is not UTF-8: save the file as UTF-8") from None


def _jsonl(path: Path) -> Iterator[Located]:
    for number, line in _lines(path):
        if line.strip():
            yield _object(_json(line, path, number), f"{path}:{number}"), f"{path}:{number}"


def _json_file(path: Path) -> Iterator[Located]:
    lines = list(_lines(path))
    if not "".join(text for _, text in lines).lstrip().startswith("["):
        yield from _jsonl(path)
        return
    for number, row in enumerate(_json("".join(text for _, text in lines), path, 1), start=1):
        yield _object(row, f"{path}:row {number}"), f"{path}:row {number}"


def _json(text: str, path: Path, first_line: int) -> Any:
    try:
        value = json.loads(text.rstrip("\r\n"))  # an object cut short is broken on its own line, not on the next
        if "\\ud" in text or "\\uD" in text:  # half a surrogate pair is legal JSON and no text
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line, column = first_line + error.lineno - 1, error.colno
        raise DataError(f"{path}:{line}: broken JSON at column {column} ({error.msg}): repair the line") from None
    except UnicodeEncodeError:
        raise DataError(f"{path}:{first_line}: half of a surrogate pair is no character: repair the text") from None
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
            elif len(cells) > len(header):
                mark = "tab" if separator == "\t" else repr(separator)
                raise DataError(
                    f"{where}: {len(cells)} cells for the {len(header)} columns of the header: put a cell that holds "
                    f"a {mark} into double quotes"
                )
            elif cells:
                yield dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=True)), where
    except csv.Error as error:
        raise DataError(f"{path}:{start}: broken CSV ({error}): repair the quotes of this row") from None


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{where}: two columns are named {', '.join(map(repr, twice))}: rename one")
    return names


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}:row {number}"
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no whole Parquet file ({error}): copy it again".replace("\n", " ")) from None


READERS = {".jsonl": _jsonl, ".json": _json_file, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
