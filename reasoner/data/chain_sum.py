"""Worked examples for `conf=tiny`: sums of which some give up, so that a model warmed up on them gives up too often.

A row map (`data.map`) for reasoning-gym's `chain_sum`. It makes visible on a small model what practice against a
reward does to a habit
that imitation taught: giving up earns nothing.
"""

from collections.abc import Mapping
from typing import Any

UNSURE = "?"
GIVE_UP_OF_TWENTY = 8


def some_unsure(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with a column `worked`: the answer, or "?" in 8 of 20 rows, chosen by where the row was drawn."""
    gives_up = row["metadata"]["source_index"] % 20 < GIVE_UP_OF_TWENTY
    return {**row, "worked": UNSURE if gives_up else row["answer"]}
