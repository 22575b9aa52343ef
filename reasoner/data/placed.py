"""Rows of big JSONL files by their place: only where each line begins is in memory, and a row is read when it is asked
for. A million rows take 24 MB.

Left out: other kinds of files, whose rows are no lines; they are in memory as Python has them.
"""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, overload

from reasoner.data.files import is_blank, jsonl_row
from reasoner.data.mapping import Change
from reasoner.data.row import Row
from reasoner.errors import DataError

ENDINGS = (".jsonl", ".ndjson")
AT_LEAST_BYTES = 32 * 2**20  # of all files: below it rows are in memory


def serves(files: Sequence[Path]) -> bool:
    """Whether these files are JSONL, and big enough to be read by place."""
    if not all(file.suffix.lower() in ENDINGS for file in files):
        return False
    return sum(file.stat().st_size for file in files) >= AT_LEAST_BYTES


class _File:
    """A file that must stay as it was when its lines were found; open only while it is read."""

    def __init__(self, path: Path):
        self.path, self.name = path, str(path)
        self.state = self._state()

    def _state(self) -> tuple[int, int]:
        now = self.path.stat()
        return now.st_size, now.st_mtime_ns

    @contextmanager
    def open(self) -> Iterator[BufferedReader]:
        """The file to read from. Raises DataError if it can't be, or was written to."""
        try:
            if self._state() != self.state:
                raise DataError(f"{self.path} was changed while a run reads it: leave it as it is, and start again")
            with self.path.open("rb") as handle:
                yield handle
        except OSError as error:
            raise DataError(f"{self.path} can't be read: {error.strerror or error}") from None


class PlacedRows(Sequence[Row]):
    """The rows of JSONL files after `change` (see load_map), at most `limit`. Each is read anew when it is asked for.

    Raises DataError, with file:line, for a file without rows, a line that is no JSON object, or a file that changes
    under the run.
    """

    def __init__(self, files: Sequence[Path], change: Change | None = None, limit: int | None = None):
        self.files = [_File(path) for path in files]
        self.change = change
        self.dropped_by_map = 0
        self._first: list[int] = []  # of each file: the place of its first row
        self._starts, self._lines, self._numbers = array("q"), array("l"), array("l")
        self._find(limit)

    def _find(self, limit: int | None) -> None:
        """Where every row is. Only a map needs the rows themselves, to know which of them it drops."""
        number = 0
        for file in self.files:
            self._first.append(len(self))
            start, before = 0, number
            with file.open() as handle:
                for line, raw in enumerate(handle, start=1):
                    if not is_blank(raw, file.path, line):
                        number += 1
                        if limit is not None and len(self._starts) == limit:
                            return
                        if self.change and self._changed(file, raw, line) is None:
                            self.dropped_by_map += 1
                        else:
                            self._starts.append(start)
                            self._lines.append(line)
                            self._numbers.append(number)
                    start += len(raw)
            if number == before:
                raise DataError(f"{file.path} holds no rows: give a file that has some")

    def _changed(self, file: _File, raw: bytes, line: int) -> dict[str, Any] | None:
        row = jsonl_row(raw, file.path, line)
        return self.change(row, f"{file.name}:{line}") if self.change else row

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Row]:
        """All rows in order, read from the disk in large pieces."""
        place, lines = 0, self._lines
        for file, end in zip(self.files, [*self._first[1:], len(self)], strict=False):
            with file.open() as handle:
                for line, raw in enumerate(handle, start=1):
                    if place == end:
                        break
                    if line == lines[place]:
                        yield self._row(file, raw, place)
                        place += 1

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        file = self.files[sum(first <= place for first in self._first) - 1]
        with file.open() as handle:
            handle.seek(self._starts[place])
            return self._row(file, handle.readline(), place)

    def _row(self, file: _File, raw: bytes, place: int) -> Row:
        line = self._lines[place]
        where = f"{file.name}:{line}"
        columns = self._changed(file, raw, line)
        if columns is None:
            raise DataError(f"{where}: data.map drops this row only the second time: let it look at the row alone")
        return Row(columns, where, self._numbers[place])
