"""What every tracker is sent, by the same names in all of them: `stage/name`, and completions as one table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("step", "id", "prompt", "answer", "completion", "reward", "advantage", "tokens", "finish_reason")
PROJECT = "reasoner"  # or experiment, as some call it
OFF = "it is off; every number is in metrics.jsonl"


def numbers(stage: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row of metrics.jsonl.

    >>> numbers("grpo", {"step": 3, "reward_mean": 0.5, "kl": math.nan, "note": "x"})
    {'grpo/step': 3, 'grpo/reward_mean': 0.5}
    """
    return {f"{stage}/{name}": value for name, value in row.items() if _is_number(value)}


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells of rows of completions.jsonl; a reward part is a column `parts/NAME`."""
    parts = dict.fromkeys(name for row in rows for name in row["parts"])
    cells = [[*(row[name] for name in COLUMNS), *(row["parts"].get(name) for name in parts)] for row in rows]
    return [*COLUMNS, *(f"parts/{name}" for name in parts)], cells


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
