"""One row, and where it came from."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One row, after `data.map`. `number` counts the rows of its source from 1, those that were dropped too.

    >>> Row(columns={"question": "2+2?", "answer": "4"}, where="train.jsonl:17", number=17)
    """

    columns: Mapping[str, Any]
    where: str
    number: int
