"""Rows handed in from Python: an iterable of mappings, a pandas frame, an Arrow table, a `datasets` object, or
a mapping of columns to equally long lists.

None of these packages is imported for it: what was handed in brings its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from reasoner.errors import DataError


def rows_from_python(given: Any, split: str | None = None) -> list[Mapping[str, Any]]:
    """The rows, in order; of a `DatasetDict` those of `split`.

    Raises DataError if there are none, one is no mapping, or two columns have one name.
    """
    rows = list(_rows(given, split))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} is a {type(row).__name__}, not a mapping of columns to values")
    if not rows:
        raise DataError("the rows handed in from Python are empty: was the iterable used up before?")
    return rows


def _rows(given: Any, split: str | None) -> Iterable[Any]:
    package = type(given).__module__.partition(".")[0]
    kind = type(given).__name__
    if package == "pandas" and kind == "DataFrame":
        return _of_pandas(given)
    if package == "pyarrow" and kind in ("Table", "RecordBatch"):
        from reasoner.data.parquet import rows_of_batch

        return rows_of_batch(given)
    if package == "datasets" and isinstance(given, Mapping):
        return _of_splits(given, split)
    if isinstance(given, Mapping):
        return _of_columns(given)
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise DataError(f"the data handed in from Python is a {kind}: give rows, a frame, or data.path=FILE")
    return given


def _of_pandas(frame: Any) -> Iterator[dict[str, Any]]:
    names = [str(name) for name in frame.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"the frame has two columns named {', '.join(map(repr, twice))}: rename one")
    columns = [frame.iloc[:, place] for place in range(len(names))]
    narrow = [str(column.dtype) in ("float32", "float16") for column in columns]
    cells = [column.to_numpy() if small else column for column, small in zip(columns, narrow, strict=True)]
    for row in zip(*cells, strict=True):
        yield {name: _cell(cell) for name, cell in zip(names, row, strict=True)}


def _cell(cell: Any) -> Any:
    """A cell as Python has it: no NaN, NA or NaT, numpy's numbers and arrays as Python's."""
    if type(cell).__name__ in ("NAType", "NaTType") or cell is None:
        return None
    if isinstance(cell, float) or type(cell).__name__ in ("float32", "float16"):
        return None if cell != cell else float(str(cell)) if type(cell).__module__ == "numpy" else cell
    return cell.tolist() if type(cell).__module__ == "numpy" else cell


def _of_splits(given: Mapping[str, Any], split: str | None) -> Iterable[Any]:
    if split is not None and split in given:
        return given[split]
    if len(given) == 1 and split is None:
        return next(iter(given.values()))
    there = ", ".join(map(str, given))
    raise DataError(f"the data handed in has several splits: choose one with data.split; there are: {there}")


def _of_columns(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    lists = {str(name): list(cells) for name, cells in given.items() if isinstance(cells, list | tuple)}
    if len(lists) < len(given):
        wrong = next(name for name in given if str(name) not in lists)
        raise DataError(f"the column {wrong!r} is a {type(given[wrong]).__name__}: give a list of its cells")
    lengths = {name: len(cells) for name, cells in lists.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the columns have unequal lengths ({lengths}): give each row a cell in every column")
    for cells in zip(*lists.values(), strict=True):
        yield dict(zip(lists, cells, strict=True))
