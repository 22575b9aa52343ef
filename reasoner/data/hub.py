"""Rows of a data set on the Hugging Face hub; the only home of the `datasets` package. Streamed rows are read as they
come, so that the first of a big set are there without the rest. Left out: the scripts that some data sets carry (never
run).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from reasoner.errors import DataError

AWAY = "without a network give a file, or a folder with one file a split (train.jsonl, test.jsonl): data.path=PLACE"


def read_hub(
    name: str, *, subset: str | None, split: str | None, revision: str | None, streaming: bool = False
) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of one split with their `name/split:row N`; with `streaming` nothing is downloaded ahead of them.

    Raises DataError if the hub, the data set, the subset or the split can't be had, and where the split must be named.
    """
    from datasets import load_dataset

    options: dict[str, Any] = {"streaming": True} if streaming else {}
    with _away(name):
        found: Any = load_dataset(name, subset, split=split, revision=revision, **options)
    if isinstance(found, dict):
        if len(found) > 1:
            there = ", ".join(map(str, found))
            raise DataError(f"data.name={name} has several splits: choose one with data.split; there are: {there}")
        split, found = next((str(key), value) for key, value in found.items())
    rows, number = iter(found), 0
    while True:
        with _away(name):
            row = next(rows, None)
        if row is None:
            break
        number += 1
        yield dict(row), f"{name}/{split}:row {number}"
    if not number:
        raise DataError(f"data.name={name}: the split {split} holds no rows")


@contextmanager
def _away(name: str) -> Iterator[None]:
    """One line for what keeps rows away; streamed ones can fail late."""
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError, httpx.HTTPError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"data.name={name} can't be loaded from the hub ({reason}): {AWAY}") from None
