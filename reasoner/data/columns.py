"""Text made from a row's columns: `"{question}\\n{options}"`.

A name in braces is a column; `{metadata[expression]}` and `{prompt[0][content]}` reach into a cell; `{{` and `}}` are
braces. `[[...]]` around columns is a part that is left out where one of them is empty or not in the row; without a
column in it, it is text. Left out: format specifications and conversions (`data.map` is the place for those), and
optional parts inside others.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reasoner.data.values import DoubtfulText
from reasoner.errors import ConfigError, DataError

OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
PARTS = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
PATH = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])+)")


@dataclass(frozen=True, slots=True)
class Column:
    """A column's place in a template; `steps` reach into its cell."""

    written: str
    name: str
    steps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OptionalPart:
    """A part of a template that is there only where all its columns are."""

    pieces: tuple[str | Column, ...]


@dataclass(frozen=True)
class ColumnTemplate:
    """A template of the conf, parsed; `key` names its setting in errors.

    >>> ColumnTemplate("Q: {question}[[ Hint: {hint}]]", "data.prompt").fill({"question": "2+2?", "hint": None})
    'Q: 2+2?'

    Raises ConfigError for a brace that opens or closes nothing, or an optional part in another.
    """

    text: str
    key: str
    pieces: tuple[str | Column | OptionalPart, ...] = field(init=False)
    columns: tuple[Column, ...] = field(init=False)  # that it needs, in order
    optional: tuple[Column, ...] = field(init=False)  # that it uses where they are there, in order
    parts: tuple[OptionalPart, ...] = field(init=False)

    def __post_init__(self) -> None:
        pieces: list[str | Column | OptionalPart] = []
        for index, part in enumerate(OPTIONAL.split(self.text)):
            inside = index % 2 == 1
            found = self._parse(part) if not inside or "{" in part else [part]
            if not inside:
                pieces += found
            elif not any(isinstance(piece, Column) for piece in found):
                pieces += ["[[", *found, "]]"]
            elif "[[" in part:
                raise ConfigError(f"{self.key}={self.text!r}: an optional part [[...]] can't hold another")
            else:
                pieces.append(OptionalPart(tuple(found)))
        parts = tuple(piece for piece in pieces if isinstance(piece, OptionalPart))
        optional = tuple(piece for part in parts for piece in part.pieces if isinstance(piece, Column))
        object.__setattr__(self, "pieces", tuple(piece for piece in pieces if piece))
        object.__setattr__(self, "columns", tuple(piece for piece in pieces if isinstance(piece, Column)))
        object.__setattr__(self, "optional", optional)
        object.__setattr__(self, "parts", parts)

    def _parse(self, text: str) -> list[str | Column]:
        pieces: list[str | Column] = []
        end = 0
        for match in PARTS.finditer(text):
            pieces.append(text[end : match.start()])
            end = match.end()
            if match[0] in ("{{", "}}"):
                pieces.append(match[0][0])
            elif match[1]:
                pieces.append(_column(match[1]))
            else:
                raise ConfigError(
                    f"{self.key}={self.text!r}: braces that are text are doubled, {{{{ and }}}}; a column is {{NAME}}"
                )
        pieces.append(text[end:])
        return [piece for piece in pieces if piece]

    def names(self, row: Mapping[str, Any]) -> set[str]:
        """The names of the row's columns that it uses."""
        return {column.written if column.written in row else column.name for column in (*self.columns, *self.optional)}

    def values(self, row: Mapping[str, Any]) -> list[str]:
        """The text of each column it needs. Raises DataError, listing the columns there are, if one is missing."""
        return [cell_text(self._cell(row, column)) for column in self.columns]

    def wording(self, row: Mapping[str, Any], values: Sequence[str]) -> str:
        """The row's own words in it: its `values`, and those of optional parts too."""
        if self.parts:
            values = [*values, *(text for part in self._parts(row) for text in part if text)]
        return " ".join(values)

    def fill(self, row: Mapping[str, Any], each: Callable[[str], str] = str) -> str:
        """The text with the row's values, each passed through `each`. Raises DataError for a missing column."""
        texts: list[str] = []
        for piece in self.pieces:
            if isinstance(piece, str):
                texts.append(piece)
            elif isinstance(piece, Column):
                texts.append(each(cell_text(self._cell(row, piece))))
            elif self._filled(piece, row):
                texts += [
                    one if isinstance(one, str) else each(cell_text(self._cell(row, one))) for one in piece.pieces
                ]
        return "".join(texts)

    def only_cell(self, row: Mapping[str, Any]) -> Any:
        """The cell itself where the template is one column and nothing else (a number is then no text yet); or None."""
        alone = self.pieces[0] if len(self.pieces) == 1 else None
        return self._cell(row, alone) if isinstance(alone, Column) else None

    def has(self, row: Mapping[str, Any], column: Column) -> bool:
        """Whether the row has the column."""
        try:
            self._cell(row, column)
        except DataError:
            return False
        return True

    def _filled(self, part: OptionalPart, row: Mapping[str, Any]) -> bool:
        columns = [piece for piece in part.pieces if isinstance(piece, Column)]
        return all(self.has(row, column) and cell_text(self._cell(row, column)).strip() for column in columns)

    def _parts(self, row: Mapping[str, Any]) -> list[list[str]]:
        return [
            [cell_text(self._cell(row, one)) for one in piece.pieces if isinstance(one, Column)]
            for piece in self.parts
            if self._filled(piece, row)
        ]

    def _cell(self, row: Mapping[str, Any], column: Column) -> Any:
        if column.written in row:
            return row[column.written]
        cell: Any = row
        for step in (column.name, *column.steps):
            if isinstance(cell, Mapping) and step in cell:
                cell = cell[step]
            elif isinstance(cell, Sequence) and not isinstance(cell, str) and step.isdigit() and int(step) < len(cell):
                cell = cell[int(step)]
            else:
                there = ", ".join(map(str, cell if isinstance(cell, Mapping) else row))
                asked = f"no column '{column.written}', which {self.key}={self.text!r} asks for"
                raise DataError(f"{asked}; there are: {there}")
        return cell


def _column(written: str) -> Column:
    path = PATH.fullmatch(written)
    return Column(written, path[1], tuple(re.findall(r"\[([^\[\]]+)\]", path[2]))) if path else Column(written, written)


def cell_text(cell: Any) -> str:
    """A cell as text: "" for None and NaN, lists and mappings as JSON, everything else as Python writes it.

    Raises DataError for a list of chat messages, which no prompt means to print, for bytes, and for a cell whose text
    we can't be sure of.
    """
    if type(cell) is str:
        return cell
    if isinstance(cell, str):
        if isinstance(cell, DoubtfulText):
            raise DataError(cell.doubt)
        return cell
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, Mapping | list | tuple):
        if isinstance(cell, list) and cell and isinstance(cell[0], Mapping) and {"role", "content"} <= set(cell[0]):
            raise DataError("a cell holds chat messages, not text: take one of them with {COLUMN[0][content]}")
        return json.dumps(cell, ensure_ascii=False, default=str)
    if isinstance(cell, bytes | bytearray | memoryview):
        raise DataError("a cell holds bytes, not text: change it by data.map")
    return str(cell)
