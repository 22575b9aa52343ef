"""What drives the reward late in a run, seen inside the groups that advantages are made of: its parts, the length of
the completion, and phrases that spread.

Left out: whether a phrase or a part is good. Both are shown for someone to read.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reasoner.report.chosen import Row

MOSTLY = 0.8  # of the differences inside groups coming from one part
FOLLOWS = 0.5  # correlation of reward and length beyond which one follows the other
MIN_GROUPS, MIN_ROWS = 20, 60
PHRASE = 8  # words
SPREAD, RARE = 0.5, 0.1  # shares of the late and of the early completions that a phrase which spread stands in
SHOWN_CHARS = 160

Flag = dict[str, str]


def one_part(late: Sequence[Row], weights: Mapping[str, float], right: str | None) -> Iterator[Flag]:
    """A part other than `right` (the accuracy) that makes most of the differences of reward inside groups: its share is
    sum of (weight x part, centred) x (reward, centred) over sum of (reward, centred)^2.
    """
    whole, shares, groups = 0.0, dict.fromkeys(weights, 0.0), 0
    for rows in _groups(late):
        totals = [row["reward"] for row in rows]
        if max(totals) == min(totals):  # what centring leaves of equal numbers is rounding
            continue
        rewards = _centred(totals)
        spread = sum(value * value for value in rewards)
        groups += 1
        whole += spread
        for name, weight in weights.items():
            part = _centred([weight * (row["parts"].get(name) or 0.0) for row in rows])
            shares[name] += sum(a * b for a, b in zip(part, rewards, strict=True))
    if groups < MIN_GROUPS or right is None or right not in weights:
        return
    name = max(shares, key=lambda one: shares[one])
    if name != right and shares[name] > MOSTLY * whole:
        yield {
            "tone": "bad",
            "title": "Practice learns mostly one part of the reward",
            "text": f"In the last quarter {shares[name] / whole:.0%} of the differences of reward inside groups come "
            f"from {name}, and {shares[right] / whole:.0%} from {right}: what moves the weights is {name}. Lower its "
            f"weight (reward.parts.{name}.weight), or let it count only where the answer is right.",
        }


def length(late: Sequence[Row], right: str | None) -> Iterator[Flag]:
    """Reward that goes with length among completions of one prompt that are equally right."""
    pairs: list[tuple[float, float]] = []
    for rows in _groups(late):
        alike = defaultdict(list)
        for row in rows:
            alike[row["parts"].get(right) if right else None].append(row)
        for same in alike.values():
            tokens = _centred([row["tokens"] for row in same])
            pairs += zip(tokens, _centred([row["reward"] for row in same]), strict=True)
    told = [pair for pair in pairs if pair != (0.0, 0.0)]
    spread = math.prod(math.sqrt(sum(pair[i] ** 2 for pair in pairs)) for i in (0, 1))
    correlation = sum(a * b for a, b in pairs) / spread if spread > 0 else 0.0
    if len(told) >= MIN_ROWS and abs(correlation) > FOLLOWS:
        yield {
            "tone": "note",
            "title": f"{'Longer' if correlation > 0 else 'Shorter'} completions earn more",
            "text": f"Among late completions of one prompt that are equally right, reward and length have a "
            f"correlation of {correlation:+.2f}. Where no part is meant to do that, the policy will learn to "
            f"{'pad' if correlation > 0 else 'skip its work'}: see which part goes with length.",
        }


def phrase(early: Sequence[Row], late: Sequence[Row]) -> Iterator[Flag]:
    """A run of words that most late completions have, few early ones had, and their prompts don't hold."""
    if min(len(early), len(late)) < MIN_ROWS:
        return
    now = Counter(gram for row in late for gram in _phrases(row))
    often = [gram for gram, times in now.most_common() if times > SPREAD * len(late)]
    if not often:
        return
    before = Counter(gram for row in early for gram in _phrases(row))
    spread = next((gram for gram in often if before[gram] < RARE * len(early)), None)
    if spread is not None:
        yield {
            "tone": "note",
            "title": "A phrase spread over the completions",
            "text": f"“{spread[:SHOWN_CHARS]}” stands in {now[spread] / len(late):.0%} of the late completions, and in "
            f"{before[spread] / len(early):.0%} of the early ones. Good where the reward asks for that form; where it "
            "says nothing, it was copied because it pays: read what it earns.",
        }


def _phrases(row: Row) -> set[str]:
    words = row["completion"].split()
    grams = {" ".join(words[i : i + PHRASE]) for i in range(len(words) - PHRASE + 1)}
    asked = " ".join(row["prompt"].split())
    return {gram for gram in grams if gram not in asked}


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows of each group whose rewards are there."""
    found: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if row["reward"] is not None:
            found[row["stage_index"], row["step"], row["id"]].append(row)
    return iter(found.values())


def _centred(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [value - mean for value in values]
