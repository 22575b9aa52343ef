"""Rows from wherever `data` says: Python, a file, the hub, reasoning-gym; changed by `data.map`, each knowing where it
came from.

Big JSONL files are read by place (placed.py); everything else is read into memory once, where a million rows of text
are about a gigabyte. Left out: streaming, and rows that change while we train.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasoner.config import Data
from reasoner.data.files import ENDINGS, Located, find_files, read_files
from reasoner.data.gym import PREFIX, read_gym
from reasoner.data.hub import read_hub
from reasoner.data.mapping import load_map
from reasoner.data.placed import PlacedRows, serves
from reasoner.data.python_rows import rows_from_python
from reasoner.data.row import Row
from reasoner.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a source and how many `data.map` dropped on the way."""

    rows: Sequence[Row]
    dropped_by_map: int


def read_rows(data: Data, rows: Any = None) -> Rows:
    """At most `data.limit` rows after `data.map`: of `rows` (see rows_from_python) where Python hands some in, else of
    `data.path`, else of `data.name`.

    Raises DataError naming file:line, ConfigError if nothing says where rows come from, MissingExtra without
    reasoning-gym.
    """
    change = load_map(data.map) if data.map else None
    files = find_files(data.path, data.split) if rows is None and data.path else []
    if files and data.sheet is None and serves(files):
        placed = PlacedRows(files, change, data.limit)
        return _some(Rows(placed, placed.dropped_by_map), data)
    kept: list[Row] = []
    dropped = 0
    for number, (columns, where) in enumerate(_located(data, rows), start=1):
        if data.limit is not None and len(kept) == data.limit:
            break
        changed = change(columns, where) if change else columns
        if changed is None:
            dropped += 1
        else:
            kept.append(Row(changed, where, number))
    return _some(Rows(kept, dropped), data)


def _some(rows: Rows, data: Data) -> Rows:
    if rows.dropped_by_map and not len(rows.rows):
        raise DataError(f"data.map={data.map} dropped all {rows.dropped_by_map:,} rows")
    return rows


def source_of(data: Data, rows: Any = None) -> tuple[str, ...]:
    """What tells two sources apart; sections with equal sources read the same rows, if maybe not as many of them."""
    if rows is not None:
        return ("rows",)
    if data.path:
        sheet = () if data.sheet is None else (f"sheet {data.sheet}",)
        return ("file", *(str(file.resolve()) for file in find_files(data.path, data.split)), *sheet)
    if data.name and data.name.startswith(PREFIX):
        return ("gym", data.name, json.dumps(data.options, sort_keys=True, default=str), str(data.seed))
    return ("hub", str(data.name), str(data.subset), str(data.split), str(data.revision))


def _located(data: Data, rows: Any) -> Iterator[Located]:
    if rows is not None:
        given = rows_from_python(rows, data.split)
        return ((dict(row), f"row {number}") for number, row in enumerate(given, start=1))
    if data.path:
        return read_files(find_files(data.path, data.split), data.sheet)
    if not data.name:
        raise ConfigError("nothing says where rows come from: give data.path=FILE or data.name=HUB_OR_GYM_NAME")
    if data.name.startswith(PREFIX):
        return read_gym(data.name, size=data.size, seed=data.seed, options=data.options)
    if Path(data.name).exists() or Path(data.name).suffix in ENDINGS:
        raise ConfigError(f"data.name={data.name} looks like a file: say data.path={data.name}")
    if data.streaming and data.limit is None:
        raise ConfigError(f"data.streaming reads the first rows of {data.name}: say how many with data.limit=ROWS")
    return read_hub(data.name, subset=data.subset, split=data.split, revision=data.revision, streaming=data.streaming)
