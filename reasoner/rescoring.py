"""What a run's rewards would have been: the completions that it kept, scored again by the rewards and weights of today,
and how the advantages move with them.

Advantages are made step by step as the trainer makes them, from `completions.jsonl` alone: no model, no tokenizer and
no data are read. Left out: what the run would have become. A policy trained on other advantages says other things.
"""

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from reasoner.config import Config
from reasoner.errors import RewardError, RunFolderError
from reasoner.grpo.advantages import EPSILON, has_signal, judge
from reasoner.grpo.kl import PENALTY
from reasoner.rewards.base import Rewards, load_rewards
from reasoner.rewards.trial import tail
from reasoner.run_folder import COMPLETIONS, read_rows
from reasoner.types import Completion, Group, Prompt, Score
from reasoner.words import plural

SHOWN = 5  # completions whose advantage moved most

Row = Mapping[str, Any]


@dataclass(slots=True)
class Sums:
    """Means of one part, or of the total, before and after: over the completions that have a value on that side."""

    before: list[float] = field(default_factory=lambda: [0.0, 0])
    after: list[float] = field(default_factory=lambda: [0.0, 0])
    changed: int = 0
    failed: int = 0

    def add(self, before: float | None, after: float | None, *, failed: bool) -> None:
        """One completion; None where the part does not apply, was not there or failed."""
        for side, value in ((self.before, before), (self.after, after)):
            if value is not None:
                side[0] += value
                side[1] += 1
        self.changed += failed or (before is None) != (after is None) or abs((before or 0) - (after or 0)) > EPSILON
        self.failed += failed


@dataclass(slots=True)
class Rescored:
    """What scoring a run's completions again found, summed up as they went by.

    `moved` holds (|change|, tie-break, row, new score, new advantage) of the largest changes of an advantage; `moments`
    are the sums of x, y, x^2, y^2 and xy over advantages x before and y after.
    """

    parts: dict[str, Sums]
    total: Sums = field(default_factory=Sums)
    steps: list[int] = field(default_factory=list)
    completions: int = 0
    groups: int = 0
    signal: list[int] = field(default_factory=lambda: [0, 0])  # groups whose rewards differ, before and after
    flipped: int = 0  # advantages that changed their sign
    moments: list[float] = field(default_factory=lambda: [0.0] * 5)
    moved: list[tuple[float, int, Row, Score, float]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()  # of the rewards, as at the start of a run

    @property
    def correlation(self) -> float | None:
        """Of the advantages before with those after; None where one side is constant."""
        n, (x, y, xx, yy, xy) = self.completions, self.moments
        spread = (xx - x * x / n) * (yy - y * y / n) if n else 0.0
        return (xy - x * y / n) / math.sqrt(spread) if spread > EPSILON else None


def rescore(run: Path, config: Config, *, base_dir: Path) -> Rescored:
    """Score every completion of the run's GRPO stages by `config.reward`, and judge them as `config.grpo` says.

    Files of rewards are looked for in `base_dir`. Raises RunFolderError where the run kept no completions or the file
    is damaged, RewardError where a reward can't be had.
    """
    path = run / COMPLETIONS
    if not path.is_file():
        raise RunFolderError(f"run={run}: it has no {COMPLETIONS}, so there is nothing to score again: name a GRPO run")
    steps = groupby(read_rows(path), key=lambda row: (row["stage_index"], row["step"]))
    rewards, found = None, Rescored({})
    try:
        for (_, step), rows in steps:
            kept = list(rows)
            if rewards is None:
                _check_age(path, kept[0])
                columns = set(kept[0]["columns"]).intersection(*(row["columns"] for row in kept))
                rewards = load_rewards(config.reward, base_dir=base_dir, columns=columns)
                _refuse_token_ids(rewards)
                found.notices = rewards.notices
                found.parts |= {name: Sums() for name in rewards.part_names}
            found.steps.append(step)
            _step(found, rewards, kept, config)
    finally:
        if rewards is not None:
            rewards.close()
    if rewards is None:
        raise RunFolderError(f"{path} holds no completions yet: train with this run first")
    return found


def _check_age(path: Path, row: Row) -> None:
    if "prefill" not in row:
        raise RunFolderError(
            f"{path} was written by an older version, which did not keep all that rewards see: train again to rescore"
        )


def _refuse_token_ids(rewards: Rewards) -> None:
    for part in rewards.parts:
        if "completion_ids" in part.signature.named:
            raise RewardError(
                f"reward.parts.{part.name} asks for completion_ids, which a run does not keep: score texts instead, or "
                "try it with reward conf=NAME --sample"
            )


def _step(found: Rescored, rewards: Rewards, rows: Sequence[Row], config: Config) -> None:
    """One step's completions, scored and judged anew."""
    prompts, completions = [_prompt(row) for row in rows], [_completion(row) for row in rows]
    scores = [
        _charged(score, row, config.grpo.kl_coef)
        for score, row in zip(rewards.score(prompts, completions), rows, strict=True)
    ]
    groups, olds, taken = [], [], 0
    for size in _sizes(rows, config.grpo.completions_per_prompt):
        here = slice(taken, taken + size)
        taken += size
        old = [_old_score(row) for row in rows[here]]
        groups.append(Group(prompts[here.start], tuple(completions[here]), tuple(scores[here])))
        olds.append(replace(groups[-1], scores=tuple(old)))
    judged = judge(groups, advantage=config.grpo.advantage, scale=config.grpo.advantage_scale)
    found.groups += len(groups)
    found.signal = [n + sum(map(has_signal, side)) for n, side in zip(found.signal, (olds, groups), strict=True)]
    advantages = [advantage for group in judged for advantage in group.advantages]
    for row, score, advantage in zip(rows, scores, advantages, strict=True):
        _add(found, row, score, advantage)


def _add(found: Rescored, row: Row, score: Score, advantage: float) -> None:
    found.completions += 1
    for name, sums in found.parts.items():
        failed = name in score.failures
        before = None if name in row["failures"] else row["parts"].get(name)
        sums.add(before, None if failed else score.parts.get(name), failed=failed)
    found.total.add(row["reward"], None if score.failed else score.total, failed=score.failed)
    for name, reason in score.failures.items():
        found.reasons.setdefault(name, f"{reason}, first in step {row['step']}, row {row['id']}")
    x, y = row["advantage"], advantage
    found.flipped += x * y < 0
    found.moments = [a + b for a, b in zip(found.moments, (x, y, x * x, y * y, x * y), strict=True)]
    if abs(y - x) > EPSILON:
        heapq.heappush(found.moved, (abs(y - x), -found.completions, row, score, y))
        if len(found.moved) > SHOWN:
            heapq.heappop(found.moved)


def _prompt(row: Row) -> Prompt:
    return Prompt(
        row["id"], row["prompt"], row["answer"], row["columns"], (), tuple(row["messages"]), prefill=row["prefill"]
    )


def _completion(row: Row) -> Completion:
    """The completion as rewards see it. Its token ids were not kept, only how many there were."""
    n, at = row["tokens"], row["policy_step"]
    return Completion((0,) * n, (True,) * n, (0.0,) * n, row["completion"], row["finish_reason"], at, at)


def _old_score(row: Row) -> Score:
    return Score(row["reward"] or 0.0, row["parts"], row["failures"])


def _charged(score: Score, row: Row, coef: float) -> Score:
    """The score with the penalty on KL that the run took with its reward (grpo.kl_in=reward)."""
    charged = row["parts"].get(PENALTY)
    return score if charged is None else replace(score, total=score.total + coef * charged)


def _sizes(rows: Iterable[Row], most: int) -> Iterator[int]:
    """The sizes of the groups that follow one another: rows of one prompt, at most as many as a group has."""
    for _, same in groupby(rows, key=lambda row: row["id"]):
        left = len(list(same))
        while left > 0:
            yield min(left, most)
            left -= most


def lines(run: Path, config: Config, found: Rescored) -> list[str]:
    """What was found, for people."""
    n, (before, after) = found.completions, found.signal
    told = [
        f"{plural(n, 'completion')} of {run}, steps {min(found.steps)} to {max(found.steps)}, scored again; no model "
        "was loaded",
        *found.notices,
        f"{'part':20} {'weight':>7} {'before':>8} {'after':>8} {'changed':>9} {'failed':>7}",
        *(_line(name, f"{config.reward.parts[name].weight:g}", sums) for name, sums in found.parts.items()),
        _line("total", "", found.total),
    ]
    told.append(f"groups with a signal: {before:,} of {found.groups:,} before, {after:,} after")
    together = "" if found.correlation is None else f"; their correlation is {found.correlation:.3f}"
    told.append(f"advantages that changed sign: {found.flipped:,} of {n:,} ({found.flipped / n:.1%}){together}")
    for name, reason in found.reasons.items():
        told.append(f"warning: '{name}' failed on {plural(found.parts[name].failed, 'completion')}: {reason}")
    if not found.moved:
        return [*told, "every advantage is what it was"]
    told.append("advantages that moved most:")
    for _, _, row, score, advantage in sorted(found.moved, key=lambda one: one[:2], reverse=True):
        told.append(
            f"  step {row['step']}, row {row['id']}, answer {row['answer']!r}: {tail(row['completion'])}: reward "
            f"{_number(row['reward'])} -> {_number(None if score.failed else score.total)}, advantage "
            f"{row['advantage']:+.2f} -> {advantage:+.2f}"
        )
    return told


def _line(name: str, weight: str, sums: Sums) -> str:
    before, after = (f"{total / n:8.3f}" if n else f"{'-':>8}" for total, n in (sums.before, sums.after))
    return f"{name:20} {weight:>7} {before} {after} {sums.changed:9,} {sums.failed:7,}"


def _number(value: float | None) -> str:
    return "failed" if value is None else f"{value:g}"
