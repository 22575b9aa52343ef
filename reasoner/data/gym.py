"""Rows that reasoning-gym generates: `data.name=reasoning_gym/TASK`, its own settings in `data.options`; or
`reasoning_gym/mixture`, with several tasks there, each a weight or settings with one. Needs the extra `gym`.

Row i is drawn from seed + i, so neighbouring seeds share rows; the split works by text and removes them. A row has the
columns question, answer, task and metadata: what the task's own `score_answer` needs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from reasoner.config import nearest
from reasoner.errors import DataError, MissingExtra

PREFIX = "reasoning_gym/"
MIXTURE = "reasoning_gym/mixture"
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
    if name == MIXTURE:
        yield from _mixture(size, seed, options)
        return
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


def _mixture(size: int | None, seed: int, options: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of several tasks in the shares that their weights ask for, spread evenly: any stretch of rows has them."""
    if size is None:
        raise DataError(f"data.name={MIXTURE} is generated: say how many rows with data.size=ROWS")
    if not options:
        raise DataError(f"data.name={MIXTURE}: name its tasks, data.options={{chain_sum: 2, countdown: {{weight: 1}}}}")
    weights: dict[str, float] = {}
    settings: dict[str, dict[str, Any]] = {}
    for task, node in options.items():
        own = dict(node) if isinstance(node, Mapping) else {"weight": node}
        weight = own.pop("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise DataError(f"data.options.{task}: the weight {weight!r} is no number above 0")
        weights[task], settings[task] = float(weight), own
    whole = sum(weights.values())
    taken = dict.fromkeys(weights, 0)
    order: list[str] = []
    for number in range(1, size + 1):  # the task that is furthest behind its share comes next
        task = max(weights, key=lambda one: number * weights[one] / whole - taken[one])
        taken[task] += 1
        order.append(task)
    streams: dict[str, Iterator[tuple[dict[str, Any], str]]] = {}
    for task, count in taken.items():
        if not count:
            raise DataError(
                f"data.options.{task}: its weight gives it none of data.size={size} rows: raise one of them"
            )
        with _naming(task):
            streams[task] = iter(list(read_gym(PREFIX + task, size=count, seed=seed, options=settings[task])))
    for number, task in enumerate(order, start=1):
        yield next(streams[task])[0], f"{MIXTURE}:row {number} ({task})"


@contextmanager
def _naming(task: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace("data.options", f"data.options.{task}", 1)) from None
