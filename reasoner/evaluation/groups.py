"""Results by a column of the rows: `by=level`, or a cell one level down: `by=metadata[num_terms]`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from reasoner.config import nearest
from reasoner.errors import DataError
from reasoner.evaluate import ProblemResult, SetResult, short_cells
from reasoner.types import Prompt

MAX_GROUPS = 24
NESTED = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")


def cell_of(columns: Mapping[str, Any], name: str) -> Any:
    """The cell that `name` speaks of, None where the row has none."""
    nested = NESTED.fullmatch(name)
    if not nested:
        return columns.get(name)
    outer = columns.get(nested[1])
    return outer.get(nested[2]) if isinstance(outer, Mapping) else None


def check_columns(names: Sequence[str], sets: Mapping[str, Sequence[Prompt]]) -> None:
    """Raises DataError, before anything is measured, for a column that no row of any set has."""
    rows = [short_cells(prompt.columns) for prompts in sets.values() for prompt in prompts]
    _check(names, rows)


def groups_of(result: SetResult, name: str) -> dict[str, SetResult]:
    """The problems by their cell in the column, in the order of the cells; at most MAX_GROUPS, the largest ones."""
    found: dict[Any, list[ProblemResult]] = {}
    for problem in result.problems:
        cell = cell_of(problem.columns, name)
        if cell is not None:
            found.setdefault(cell, []).append(problem)
    largest = sorted(found, key=lambda cell: -len(found[cell]))[:MAX_GROUPS]
    ordered = sorted(largest, key=lambda cell: (isinstance(cell, str), cell))
    title = f"{result.name}, {name}"
    return {f"{title} {cell}": SetResult(f"{title} {cell}", tuple(found[cell])) for cell in ordered}


def check_kept(names: Sequence[str], results: Sequence[SetResult]) -> None:
    """As check_columns, of problems that were measured."""
    _check(names, [problem.columns for result in results for problem in result.problems])


def _check(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    for name in names:
        if all(cell_of(row, name) is None for row in rows):
            there = dict.fromkeys(column for row in rows for column in _names(row))
            raise DataError(f"by={name}: no row has such a column with short cells{nearest(name, list(there))}")


def _names(row: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name, cell in row.items():
        names += [f"{name}[{inner}]" for inner in cell] if isinstance(cell, Mapping) else [name]
    return names
