"""Columns of numbers to draw: a stage's steps, thinned where there are more than a screen can show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

MAX_POINTS = 1_000  # of a curve; more steps are drawn as the means of neighbours
DIGITS = 5  # that a number keeps
NOT_DRAWN = ("stage", "stage_index", "step", "policy_step")


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`{"x": steps, "steps_a_point": 1, "series": {name: values}}` of one kind of stage; {} without a row.

    Steps count from 1 in their stage; where that kind ran twice, x is the policy's step. A value that the step could
    not measure is None.
    """
    if not rows:
        return {}
    x = "step" if len({row["stage_index"] for row in rows}) == 1 else "policy_step"
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_DRAWN)
    width = math.ceil(len(rows) / MAX_POINTS)
    pieces = [rows[i : i + width] for i in range(0, len(rows), width)]
    return {
        "x": [piece[-1][x] for piece in pieces],
        "steps_a_point": width,
        "series": {name: [mean(piece, name) for piece in pieces] for name in names},
    }


def mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean of what the rows measured under a name, None if none did."""
    found = [row[name] for row in rows if row.get(name) is not None]
    return float(f"{sum(found) / len(found):.{DIGITS}g}") if found else None
