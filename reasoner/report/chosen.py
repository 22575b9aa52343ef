"""Which completions the page shows, and which the flags are judged on, without reading a file of gigabytes whole.

The file is indexed by its lines' first keys, which the run writes before anything long; only the lines that are wanted
are parsed.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from reasoner.errors import RunFolderError

Row = dict[str, Any]
Line = tuple[int, int]  # where it begins, how many bytes
At = tuple[int, int]  # stage_index, step

STEPS = 60  # read whole, spread evenly over the run, with the first and the last
PAIRS = 40  # prompts shown early and late
MAX_CHARS = 4_000  # of a prompt or completion; a longer one loses its middle
MAX_TOKENS = 900  # shaded of a completion
HEAD = re.compile(
    rb'\{"stage": "\w+", "stage_index": (\d+), "step": (\d+), "policy_step": \d+, "id": "((?:[^"\\]|\\.)*)"'
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was picked of `total` completions over `all_steps` steps: the rows of `steps` read whole, and those that
    the page shows."""

    total: int
    all_steps: int
    steps: list[At]
    read: list[Row]
    shown: list[Row]
    pairs: list[dict[str, Any]]  # {"id", "early": rows, "late": rows}


def choose(path: Path, budget: int) -> Chosen:
    """Completions that take up to `budget` bytes of the page, the same ones every time: of each step read the
    extremes and an even draw of the others; of prompts that came twice, their first and last visit.

    Raises RunFolderError for a damaged line.
    """
    visits = _index(path) if path.exists() else {}
    if not visits:
        return Chosen(0, 0, [], [], [], [])
    positions = sorted(visits)
    wanted = spread(positions, STEPS)
    with path.open("rb") as file:
        read = {at: _parse(path, file, [line for lines in visits[at].values() for line in lines]) for at in wanted}
        pairs = _pairs(path, file, visits, budget // 3)
    left = budget - sum(size(row) for pair in pairs for row in (*pair["early"], *pair["late"]))
    total = sum(len(lines) for by_id in visits.values() for lines in by_id.values())
    everything = [row for rows in read.values() for row in rows]
    return Chosen(total, len(positions), wanted, everything, _within(left, list(read.values())), pairs)


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """At most `number` of the items, evenly, with the first and the last."""
    if len(items) <= number:
        return list(items)
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]


def _index(path: Path) -> dict[At, dict[str, list[Line]]]:
    """(stage_index, step) -> prompt id -> its lines, without a last line that a kill cut in half."""
    found: dict[At, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                head = HEAD.match(line)
                if not head:
                    raise RunFolderError(f"{path} is damaged at byte {offset}: move it away, the report does without")
                found[int(head[1]), int(head[2])][head[3].decode()].append((offset, len(line)))
            offset += len(line)
    return found


def _parse(path: Path, file: BinaryIO, lines: Sequence[Line]) -> list[Row]:
    rows = []
    for offset, length in lines:
        file.seek(offset)
        try:
            rows.append(json.loads(file.read(length)))
        except ValueError as error:
            raise RunFolderError(
                f"{path} is damaged at byte {offset}: move it away, the report does without"
            ) from error
    return rows


def _pairs(path: Path, file: BinaryIO, visits: Mapping[At, Mapping[str, Sequence[Line]]], budget: int) -> list[Row]:
    """The prompts that came twice or more, at least half a run apart if some did, whose mean reward changed most."""
    first: dict[str, At] = {}
    last: dict[str, At] = {}
    order = {at: place for place, at in enumerate(sorted(visits))}
    for at in order:
        for prompt in visits[at]:
            first.setdefault(prompt, at)
            last[prompt] = at
    apart = {prompt: order[last[prompt]] - order[first[prompt]] for prompt in first}
    widest = sorted((prompt for prompt in apart if apart[prompt]), key=lambda prompt: -apart[prompt])[: 4 * PAIRS]
    found = []
    for prompt in widest:
        early, late = (_parse(path, file, visits[side[prompt]][prompt]) for side in (first, last))
        found.append((abs(_mean_reward(late) - _mean_reward(early)), prompt, early, late))
    found.sort(key=lambda one: -one[0])
    pairs: list[Row] = []
    for _, prompt, early, late in found[:PAIRS]:
        pair = {
            "id": prompt,
            "early": [shown(row) for row in _extremes(early)],
            "late": [shown(row) for row in _extremes(late)],
            "early_reward": _mean_reward(early),
            "late_reward": _mean_reward(late),
        }
        budget -= sum(size(row) for row in (*pair["early"], *pair["late"]))
        if budget < 0:
            break
        pairs.append(pair)
    return pairs


def _mean_reward(rows: Sequence[Row]) -> float:
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    return sum(rewards) / len(rewards) if rewards else 0.0


def _extremes(rows: Sequence[Row]) -> list[Row]:
    """The best and the worst; one where all earn the same."""
    ranked = sorted(rows, key=lambda row: math.inf if row["reward"] is None else -row["reward"])
    same = ranked[0]["reward"] == ranked[-1]["reward"]
    return ranked[:1] if same else [ranked[0], ranked[-1]]


def _within(budget: int, steps: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows in the order of their steps: a first one of each step, a second one of each, as long as they fit."""
    ranked = [_ranked(rows) for rows in steps]
    kept: list[list[Row]] = [[] for _ in steps]
    for place in range(max((len(rows) for rows in ranked), default=0)):
        for mine, rows in zip(kept, ranked, strict=True):
            if place < len(rows):
                row = shown(rows[place])
                budget -= size(row)
                if budget < 0:
                    return [row for rows in kept for row in rows]
                mine.append(row)
    return [row for rows in kept for row in rows]


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """Those with shaded tokens, the best, the worst, then the others, evenly drawn first."""
    first = [row for row in rows if "token_logprobs" in row] + _extremes(rows)
    ids = {id(row) for row in first}
    others = [row for row in rows if id(row) not in ids]
    drawn = spread(others, max(2, len(others) // 8)) if others else []
    ids |= {id(row) for row in drawn}
    unique = {id(row): row for row in (*first, *drawn, *(row for row in others if id(row) not in ids))}
    return list(unique.values())


def shown(row: Row) -> Row:
    """A row of completions.jsonl as the page holds it."""
    kept = {
        "step": row["step"],
        "stage": row["stage_index"],
        "id": row["id"],
        "prompt": shortened(row["prompt"]),
        "answer": shortened(row["answer"]),
        "text": shortened(row["completion"]),
        "cut": row["finish_reason"] == "length",
        "tokens": row["tokens"],
        "reward": row["reward"],
        "parts": row["parts"],
        "advantage": row["advantage"],
    }
    if row["failures"]:
        kept["failures"] = row["failures"]
    if "token_logprobs" in row:
        kept["shades"] = row["token_logprobs"][:MAX_TOKENS]
    return kept


def shortened(text: str) -> str:
    """The text, without its middle where it is long, and with the number of characters left out said there."""
    if len(text) <= MAX_CHARS:
        return text
    half = MAX_CHARS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def size(value: Any) -> int:
    """Bytes that a value takes in the page."""
    return len(as_json(value))


def as_json(value: Any) -> bytes:
    """JSON that can stand inside a script element: no `<`, `>` or `&`, and no line end that JavaScript knows alone."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text.encode("utf-8", "backslashreplace")
