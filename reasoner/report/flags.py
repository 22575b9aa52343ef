"""Signs that a policy earns reward without solving more, or that its answers decay: each a sentence with what was
measured and what to do.

What a single step shows (cut answers, groups without signal, failed rewards, a gap between engine and trainer, entropy)
are the console's hints, gathered here over the run. Left out: judging texts by another model.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reasoner.console import FIRST_STEPS, hints, percent
from reasoner.report import drives
from reasoner.report.chosen import Row

TENTH = 10  # the first and the last tenth of the steps are compared, at least 3 steps each
ERRORS = 3.0  # standard errors that a mean must move by to count as moved
HALF = 0.5  # of its length lost is a collapse
NGRAM = 4  # words
MIN_WORDS = 24  # of a completion that is judged for repetition
REPEATED = 0.5  # of a completion's n-grams being repeats makes it a loop
LOOPS, ALIKE = 0.1, 0.2  # shares of the completions that are flagged
HINTED = {
    "gradient": "Steps whose gradient was not finite",
    "failures": "Rewards failed",
    "cut": "Many completions were cut",
    "groups": "Few groups had a signal",
    "gap": "Engine and trainer disagreed",
    "entropy": "Entropy collapsed",
}  # of the console's hints, by their names
DIFFERENT = 3  # answers at least that the prompts of one and the same completion have

Flag = dict[str, str]


def flags(
    rows: Sequence[Row],
    completions: Sequence[Row],
    *,
    accuracy: Mapping[str, Any] | None,
    weights: Mapping[str, float],
    right: str | None,
) -> list[Flag]:
    """`{"tone": bad|note, "title", "text"}` of each sign in the GRPO stage.

    `rows` are its metrics, `completions` rows of completions.jsonl, `accuracy` the change of held-out accuracy over the
    stage as verdict.change gives it, None if it was not measured; `weights` the weights of the reward's parts, of which
    `right` says whether an answer is right.
    """
    early, late = _ends(completions)
    found = [*_reward_without_gain(rows, accuracy), *_length(rows, accuracy)]
    found += [*drives.one_part(late, weights, right), *drives.length(late, right), *drives.phrase(early, late)]
    return [*found, *_texts(late), *_hints(rows)]


def _ends(completions: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The completions of the first and of the last quarter of the steps."""
    positions = sorted({(row["stage_index"], row["step"]) for row in completions})
    n = max(1, len(positions) // 4)
    first, last = set(positions[:n]), set(positions[-n:])
    at = [(row, (row["stage_index"], row["step"])) for row in completions]
    return [row for row, place in at if place in first], [row for row, place in at if place in last]


def tenths(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]] | None:
    """What the first and the last tenth of the steps measured under a name; None with fewer than six numbers."""
    values = [row[name] for row in rows if row.get(name) is not None]
    n = max(3, len(values) // TENTH)
    return (values[:n], values[-n:]) if len(values) >= 2 * n else None


def moved(rows: Sequence[Row], name: str) -> float:
    """How far a mean moved from the first tenth to the last, 0.0 unless by more than its noise."""
    sides = tenths(rows, name)
    if sides is None:
        return 0.0
    means = [sum(side) / len(side) for side in sides]
    variance = sum(
        sum((value - mean) ** 2 for value in side) / (len(side) - 1) / len(side)
        for side, mean in zip(sides, means, strict=True)
    )
    difference = means[1] - means[0]
    return difference if abs(difference) > ERRORS * math.sqrt(variance) else 0.0


def _reward_without_gain(rows: Sequence[Row], accuracy: Mapping[str, Any] | None) -> Iterator[Flag]:
    reward = moved(rows, "reward_mean")
    if reward <= 0:
        return
    if accuracy and accuracy["verdict"] != "up":
        yield {
            "tone": "bad",
            "title": "Reward rose, held-out accuracy did not",
            "text": f"The mean reward rose by {reward:.2f} over the stage, while held-out accuracy changed by "
            f"{accuracy['points']:+.1f} points (95% {accuracy['low']:+.1f} to {accuracy['high']:+.1f}). Read late "
            "completions with a high reward: what pays there that does not solve the problem? Then change that part.",
        }
    solved = moved(rows, "solved_share")
    parts = {name: moved(rows, name) for row in rows[:1] for name in row if name.startswith("reward/")}
    risen = [name.removeprefix("reward/") for name, value in parts.items() if value > 0]
    if solved <= 0 and rows[-1].get("solved_share") is not None and risen:
        yield {
            "tone": "bad",
            "title": "Reward rose, the share of solved problems did not",
            "text": f"What rose is {', '.join(risen)}: the policy learns these parts and not the task. Lower their "
            "weight (reward.parts.NAME.weight), or let them count only where the answer is right.",
        }


def _length(rows: Sequence[Row], accuracy: Mapping[str, Any] | None) -> Iterator[Flag]:
    sides = tenths(rows, "completion_tokens_mean")
    if sides is None:
        return
    before, after = (sum(side) / len(side) for side in sides)
    if after < HALF * before and not (accuracy and accuracy["verdict"] == "up"):
        yield {
            "tone": "bad",
            "title": "Completions collapsed in length",
            "text": f"From {before:.0f} to {after:.0f} tokens on average, and accuracy did not rise. A reward that "
            "pays for a short or an empty answer does this, as does a penalty on length: read late completions.",
        }
    elif after < HALF * before:
        yield {
            "tone": "note",
            "title": "Completions became much shorter",
            "text": f"From {before:.0f} to {after:.0f} tokens on average, while accuracy rose. That is good where "
            "long answers were rambling; see that the reasoning is still there.",
        }


def repeated_share(text: str) -> float:
    """Share of a text's n-grams of four words that stood in it before; 0.0 for a short text."""
    words = text.split()
    if len(words) < MIN_WORDS:
        return 0.0
    grams = list(zip(*(words[i:] for i in range(NGRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams)


def _texts(rows: Sequence[Row]) -> Iterator[Flag]:
    if not rows:
        return
    looping = sum(repeated_share(row["completion"]) > REPEATED for row in rows) / len(rows)
    if looping > LOOPS:
        yield {
            "tone": "bad",
            "title": "Late completions repeat themselves",
            "text": f"In {percent(looping)} of the completions read from the last quarter of the run most phrases of "
            f"{NGRAM} words are repeats. The reward part `repetition` charges for that; grpo.mask_cut=true keeps loops "
            "that hit the limit out of the loss.",
        }
    texts = Counter(row["completion"].strip() for row in rows)
    answers: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        answers[row["completion"].strip()].add(row["answer"])
    text, times = next(((t, n) for t, n in texts.most_common() if len(answers[t]) >= DIFFERENT), ("", 0))
    if times > ALIKE * len(rows):
        said = "an empty text" if not text else f"“{text[:80]}{'…' if len(text) > 80 else ''}”"
        yield {
            "tone": "bad",
            "title": "The same completion answers many prompts",
            "text": f"{percent(times / len(rows))} of the completions read from the last quarter are {said}, for "
            f"prompts with {len(answers[text]):,} different answers. The policy gives one answer that pays often: see "
            "what it earns, and raise grpo.entropy_coef or lower grpo.optim.lr.",
        }


def _hints(rows: Sequence[Row]) -> Iterator[Flag]:
    """The console's hints, each once: how often, since when, and in the words of its last time."""
    entropies = [row["entropy"] for row in rows[:FIRST_STEPS] if row.get("entropy") is not None]
    at_start = sum(entropies) / len(entropies) if entropies else math.nan
    given: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for row in rows:
        measured = {name: math.nan if value is None else value for name, value in row.items()}
        for name, hint in hints(measured, at_start).items():
            given[name].append((row["step"], hint))
    for name, steps in given.items():
        first, last = steps[0][0], steps[-1][0]
        when = f"Step {first}" if len(steps) == 1 else f"{len(steps):,} of {len(rows):,} steps, from {first} to {last}"
        yield {
            "tone": "bad" if len(steps) > len(rows) / 4 else "note",
            "title": HINTED[name],
            "text": f"{when}; the last time: {steps[-1][1]}.",
        }
