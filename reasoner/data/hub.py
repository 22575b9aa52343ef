"""Rows of a data set on the Hugging Face hub; the only home of the `datasets` package. Left out: streaming, and the
scripts that some data sets carry (never run).
"""

from collections.abc import Iterator
from typing import Any

from reasoner.errors import DataError

AWAY = "without a network give a file, or a folder with one file a split (train.jsonl, test.jsonl): data.path=PLACE"


def read_hub(
    name: str, *, subset: str | None, split: str | None, revision: str | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of one split with their `name/split:row N`.

    Raises DataError if the hub, the data set, the subset or the split can't be had, and where the split must be named.
    """
    import httpx
    from datasets import Dataset, DatasetDict, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        found = load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError, DatasetsError, httpx.HTTPError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"data.name={name} can't be loaded from the hub ({reason}): {AWAY}") from None
    if isinstance(found, DatasetDict):
        if len(found) > 1:
            there = ", ".join(map(str, found))
            raise DataError(f"data.name={name} has several splits: choose one with data.split; there are: {there}")
        split, found = next((str(key), value) for key, value in found.items())
    assert isinstance(found, Dataset)
    if not len(found):
        raise DataError(f"data.name={name}: the split {split} holds no rows")
    for number, row in enumerate(found, start=1):
        yield dict(row), f"{name}/{split}:row {number}"
