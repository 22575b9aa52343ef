"""Rows that reasoning-gym generates: `data.name=reasoning_gym/TASK`, its own settings in `data.options`. Needs the
extra `gym`.

Row i is drawn from seed + i, so neighbouring seeds share rows; the split works by text and removes them. A row has the
columns question, answer, task and metadata: what the task's own `score_answer` needs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from reasoner.config import nearest
from reasoner.errors import DataError, MissingExtra

PREFIX = "reasoning_gym/"
OURS = ("seed", "size")


def read_gym(
    name: str, *, size: int | None, seed: int, options: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], str]]:
    """`size` generated rows with their `reasoning_gym/TASK:row N`.

    Raises DataError for an unknown task or setting or a missing size, MissingExtra without reasoning-gym.
    """
    try:
        from reasoning_gym import create_dataset
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError:
        raise MissingExtra("reasoning-gym", "gym", f"data.name={name}") from None
    task = name.removeprefix(PREFIX)
    if task not in DATASETS:
        raise DataError(f"data.name={name}: reasoning-gym has no task '{task}'{nearest(task, sorted(DATASETS))}")
    if size is None:
        raise DataError(f"data.name={name} is generated: say how many rows with data.size=ROWS")
    known = [field.name for field in fields(DATASETS[task][1])]
    for key in options:
        if key in OURS:
            raise DataError(f"data.options.{key}: write data.{key} instead")
        if key not in known:
            raise DataError(f"data.options: reasoning-gym's {task} has no setting '{key}'{nearest(key, known)}")
    try:
        generated = create_dataset(task, size=size, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(f"data.options: reasoning-gym's {task} refuses {dict(options)}: {error}") from None
    for index in range(size):
        entry = generated[index]
        row = {"question": entry["question"], "answer": entry["answer"], "task": task, "metadata": entry["metadata"]}
        yield row, f"{name}:row {index + 1}"
