"""A trial of the rewards, in words for people: gold, empty, wrong, random and shuffled completions of some rows, what
each part gives them and how long it takes, and the completions that break the rule.

The rule: a gold completion earns 1.0 from the accuracy part, every other one less, in that part and in total. Shuffled
ones are exempt, since a reward may look at one word alone; they are noted. Left out: what the model itself would say.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from reasoner.errors import RewardError
from reasoner.rewards.base import Rewards
from reasoner.rewards.rehearsal import completion_of
from reasoner.types import Prompt, Score

KINDS = ("gold", "empty", "wrong", "random", "shuffled")
SHOWN_BREAKS = 10
SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Tried:
    """One completion, what it earned, and the milliseconds that each part took over it.

    >>> Tried("wrong", prompt, "#### 17", Score(0.0, {"accuracy": 0.0}), {"accuracy": 0.2})
    """

    kind: str
    prompt: Prompt
    text: str
    score: Score
    ms: dict[str, float]


def completions_to_try(golds: Sequence[tuple[Prompt, str]], seed: int) -> list[tuple[str, Prompt, str]]:
    """(kind, prompt, text) for each row. Wrong is the next row's gold where its answer differs; random are as many
    words of all the golds, none with the answer in it; shuffled are its own words in another order, where there is one.
    """
    draw = random.Random(seed)
    vocabulary = sorted({word for _, text in golds for word in text.split()})
    found = []
    for (prompt, text), (other, swapped) in zip(golds, [*golds[1:], *golds[:1]], strict=True):
        own = text.split()
        found += [("gold", prompt, text), ("empty", prompt, "")]
        if other.answer != prompt.answer and swapped != text:
            found.append(("wrong", prompt, swapped))
        words = [word for word in vocabulary if prompt.answer not in word]
        if words and own:
            found.append(("random", prompt, " ".join(draw.choices(words, k=len(own)))))
        mixed = draw.sample(own, len(own))
        if mixed != own and len(own) > 1:
            found.append(("shuffled", prompt, " ".join(mixed)))
    return sorted(found, key=lambda case: KINDS.index(case[0]))


def try_out(rewards: Rewards, golds: Sequence[tuple[Prompt, str]], *, seed: int = 0) -> list[Tried]:
    """Every completion scored by every part, one call at a time so that the times are a call's own.

    Raises RewardError where a part failed on all of them, which leaves nothing to compare.
    """
    cases = completions_to_try(golds, seed)
    if cases:
        rewards.score([cases[0][1]], [completion_of(cases[0][2])])  # starts the worker, and loads what a part needs
    tried = []
    for kind, prompt, text in cases:
        ms, scores = {}, []
        for part in rewards.part_names:
            start = time.perf_counter()
            scores += rewards.score([prompt], [completion_of(text)], only=part)
            ms[part] = 1000 * (time.perf_counter() - start)
        parts = {name: value for score in scores for name, value in score.parts.items()}
        failures = {name: reason for score in scores for name, reason in score.failures.items()}
        tried.append(Tried(kind, prompt, text, Score(sum(score.total for score in scores), parts, failures), ms))
    for part in rewards.part_names if tried else ():
        if all(part in case.score.failures for case in tried):
            first = tried[0].score.failures[part]
            raise RewardError(f"the reward part '{part}' failed on all {len(tried)} completions tried: {first}")
    return tried


def breaks(tried: Sequence[Tried], accuracy: str | None) -> list[str]:
    """A line for each completion that breaks the rule, and for each failure. Without an accuracy part only totals are
    compared.
    """
    full = {id(case.prompt): case.score.total for case in tried if case.kind == "gold"}
    lines = []
    for case in tried:
        said = f"row {case.prompt.id}, {case.kind} {tail(case.text)} for the answer {tail(case.prompt.answer)}"
        got = case.score.parts.get(accuracy) if accuracy else None
        if case.score.failed:
            lines += [f"{said}: '{part}' failed: {reason}" for part, reason in case.score.failures.items()]
        elif case.kind == "gold":
            if accuracy and got is not None and got < 1.0:
                lines.append(f"{said}: '{accuracy}' gives {got:g}, not 1")
        elif case.kind == "shuffled":
            continue
        elif got is not None and got >= 1.0:
            lines.append(f"{said}: '{accuracy}' gives {got:g}, as to a right one")
        elif case.score.total >= full[id(case.prompt)]:
            lines.append(f"{said}: earns {case.score.total:g}, no less than its gold ({full[id(case.prompt)]:g})")
    return lines


def notes(tried: Sequence[Tried]) -> list[str]:
    """A line on shuffled completions that earn what their gold does, if there are any."""
    full = {id(case.prompt): case.score.total for case in tried if case.kind == "gold"}
    shuffled = [case for case in tried if case.kind == "shuffled"]
    alike = [case for case in shuffled if case.score.total >= full[id(case.prompt)]]
    if not alike:
        return []
    return [
        f"note: {len(alike)} of {len(shuffled)} shuffled completions earn as much as their gold, first "
        f"{tail(alike[0].text)}: the reward looks at single words, which a model can learn to scatter"
    ]


def tail(text: str) -> str:
    """The text's end, quoted."""
    return repr(text if len(text) <= SHOWN_CHARS else "..." + text[-SHOWN_CHARS:])


def table(tried: Sequence[Tried], rewards: Rewards) -> list[str]:
    """One line a part: its weight, its mean for each kind of completion, failures, and milliseconds a call."""
    head = f"{'part':20} {'weight':>7} " + " ".join(f"{kind:>8}" for kind in KINDS)
    lines = [f"{head} {'failed':>7} {'ms':>7} {'most ms':>8}"]
    for part in rewards.parts:
        means = [mean_cell([case.score.parts.get(part.name) for case in tried if case.kind == kind]) for kind in KINDS]
        failed = sum(part.name in case.score.failures for case in tried)
        ms = [case.ms[part.name] for case in tried] or [0.0]
        lines.append(
            f"{part.name:20} {part.weight:7g} {' '.join(means)} {failed:7} {statistics.median(ms):7.1f} {max(ms):8.1f}"
        )
    totals = [
        mean_cell([case.score.total for case in tried if case.kind == kind and not case.score.failed]) for kind in KINDS
    ]
    lines.append(f"{'total':20} {'':7} {' '.join(totals)} {sum(case.score.failed for case in tried):7}")
    counts = [f"{sum(case.kind == kind for case in tried):8}" for kind in KINDS]
    return [*lines, f"{'completions':20} {'':7} {' '.join(counts)}"]


def mean_cell(values: Sequence[float | None]) -> str:
    """The mean of those that are there, as a table's cell."""
    there = [value for value in values if value is not None]
    return f"{statistics.fmean(there):8.3f}" if there else f"{'-':>8}"


def shown(lines: Sequence[str]) -> list[str]:
    """The first lines of many, and how many more there are."""
    more = len(lines) - SHOWN_BREAKS
    return [*(f"  {line}" for line in lines[:SHOWN_BREAKS]), *([f"  and {more} more"] if more > 0 else [])]
