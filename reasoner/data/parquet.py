"""Rows of a Parquet file, each with its `file:row N`. Types are the file's; a 32-bit float is written as its file
means it (0.1, not 0.10000000149). Left out: files spread over folders by a column's value.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reasoner.errors import DataError

ROWS_AT_ONCE = 1024


def read_parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows in order. Raises DataError if the file is not whole."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
            if twice:
                raise DataError(f"{path}: two columns are named {', '.join(map(repr, twice))}: rename one")
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                for row in rows_of_batch(batch):
                    number += 1
                    yield row, f"{path}:row {number}"
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} is no whole Parquet file ({reason}): copy it again") from None
    except OSError as error:
        if error.errno:
            raise
        raise DataError(f"{path} is no whole Parquet file ({str(error).splitlines()[0]}): copy it again") from None


def rows_of_batch(batch: Any) -> list[dict[str, Any]]:
    """The rows of an Arrow batch or table."""
    import pyarrow

    narrow = [
        name
        for name, kind in zip(batch.schema.names, batch.schema.types, strict=True)
        if pyarrow.types.is_float32(kind) or pyarrow.types.is_float16(kind)
    ]
    rows: list[dict[str, Any]] = batch.to_pylist()
    if narrow:
        shortest = {
            name: [_shortest(value) for value in batch.column(name).to_numpy(zero_copy_only=False)] for name in narrow
        }
        for index, row in enumerate(rows):
            for name in narrow:
                row[name] = row[name] if row[name] is None else shortest[name][index]
    return rows


def _shortest(value: Any) -> float:
    return float(str(value))
