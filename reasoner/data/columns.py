"""Text made from a row's columns: `"{question}\\n{options}"`.

A name in braces is a column; `{metadata[expression]}` and `{prompt[0][content]}` reach into a cell; `{{` and `}}` are
braces. Left out: format specifications and conversions (`data.map` is the place for those).
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reasoner.errors import ConfigError, DataError

PARTS = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
PATH = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])+)")


@dataclass(frozen=True, slots=True)
class Column:
    """A column's place in a template; `steps` reach into its cell."""

    written: str
    name: str
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class ColumnTemplate:
    """A template of the conf, parsed; `key` names its setting in errors.

    >>> ColumnTemplate("Q: {question}", "data.prompt").fill({"question": "2+2?"})
    'Q: 2+2?'

    Raises ConfigError for a brace that opens or closes nothing.
    """

    text: str
    key: str
    pieces: tuple[str | Column, ...] = field(init=False)

    def __post_init__(self) -> None:
        pieces: list[str | Column] = []
        end = 0
        for match in PARTS.finditer(self.text):
            pieces.append(self.text[end : match.start()])
            end = match.end()
            if match[0] in ("{{", "}}"):
                pieces.append(match[0][0])
            elif match[1]:
                pieces.append(_column(match[1]))
            else:
                raise ConfigError(
                    f"{self.key}={self.text!r}: braces that are text are doubled, {{{{ and }}}}; a column is {{NAME}}"
                )
        pieces.append(self.text[end:])
        object.__setattr__(self, "pieces", tuple(piece for piece in pieces if piece))

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns it names, in order."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Column))

    def names(self, row: Mapping[str, Any]) -> set[str]:
        """The names of the row's columns that it uses."""
        return {column.written if column.written in row else column.name for column in self.columns}

    def values(self, row: Mapping[str, Any]) -> list[str]:
        """The text of each column it names. Raises DataError, listing the columns there are, if one is missing."""
        return [cell_text(self._cell(row, column)) for column in self.columns]

    def fill(self, row: Mapping[str, Any], each: Callable[[str], str] = str) -> str:
        """The text with the row's values, each passed through `each`. Raises DataError for a missing column."""
        return "".join(
            piece if isinstance(piece, str) else each(cell_text(self._cell(row, piece))) for piece in self.pieces
        )

    def only_cell(self, row: Mapping[str, Any]) -> Any:
        """The cell itself where the template is one column and nothing else (a number is then no text yet); or None."""
        alone = self.pieces[0] if len(self.pieces) == 1 else None
        return self._cell(row, alone) if isinstance(alone, Column) else None

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

    Raises DataError for a list of chat messages, which no prompt means to print.
    """
    if isinstance(cell, str):
        return cell
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, Mapping | list | tuple):
        if isinstance(cell, list) and cell and isinstance(cell[0], Mapping) and {"role", "content"} <= set(cell[0]):
            raise DataError("a cell holds chat messages, not text: take one of them with {COLUMN[0][content]}")
        return json.dumps(cell, ensure_ascii=False, default=str)
    return str(cell)
