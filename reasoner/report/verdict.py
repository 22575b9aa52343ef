"""Whether accuracy on held-out problems really changed, in words, and on which problems.

The interval is the paired one of intervals.py: both sides answered the same problems.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from reasoner.evaluate import ProblemResult, SetResult
from reasoner.intervals import Gain
from reasoner.report.chosen import shortened, size, spread
from reasoner.words import plural

EACH = 60  # problems gained, and as many lost, that the page shows
SAME = 12  # problems that stayed right, and as many that stayed wrong


def change(before: str, after: str, old: SetResult, new: SetResult) -> dict[str, Any] | None:
    """The paired change from one row to another on one set; None with fewer than two common problems.

    Accuracies and points are in per cent, of the common problems alone.
    """
    pairs = common(old, new)
    if len(pairs) < 2:
        return None
    sides = [(a.right, b.right) for a, b in pairs]
    gain = Gain.of(sides.count((False, True)), sides.count((True, False)), len(pairs))
    return {
        "set": new.name,
        "before": before,
        "after": after,
        "before_accuracy": 100 * sum(a.right for a, _ in pairs) / len(pairs),
        "after_accuracy": 100 * sum(b.right for _, b in pairs) / len(pairs),
        "points": gain.points,
        "low": gain.low,
        "high": gain.high,
        "problems": gain.problems,
        "gained": gain.gained,
        "lost": gain.lost,
        "both": sides.count((True, True)),
        "neither": sides.count((False, False)),
        "p_value": gain.p_value,
        "needed": "" if gain.is_real else gain.needed_words(),
        "verdict": "unclear" if not gain.is_real else "up" if gain.points > 0 else "down",
    }


def common(old: SetResult, new: SetResult) -> list[tuple[ProblemResult, ProblemResult]]:
    """The problems that both answered: by what their rows hold, or by id where an older run did not say."""
    named = all(problem.problem for problem in (*old.problems, *new.problems))
    key = (lambda one: one.problem) if named else (lambda one: one.id)
    earlier = {key(problem): problem for problem in old.problems}
    return [(earlier[key(problem)], problem) for problem in new.problems if key(problem) in earlier]


def comparison(found: Mapping[str, Any] | None) -> dict[str, str]:
    """`{"tone", "title", "detail"}` of one run (`after`) against another (`before`)."""
    if found is None:
        return {
            "tone": "unclear",
            "title": "Nothing to compare the two runs by",
            "detail": "They have no held-out problems in common, so their accuracies say nothing of one another.",
        }
    first, other = found["before"], found["after"]
    accuracies = f"{found['after_accuracy']:.1f}% against {found['before_accuracy']:.1f}%"
    if found["verdict"] == "unclear":
        title = "Can't tell which of the two is better"
        doubt = f" This may be chance: {found['needed']}."
    else:
        title = f"{other} is {'better' if found['verdict'] == 'up' else 'worse'} than {first}"
        doubt = " The difference is real: interval and exact test (McNemar) leave out 0."
    return {
        "tone": found["verdict"],
        "title": title,
        "detail": f"{other} solves {accuracies} of {first}: {_measured(found)}{doubt}",
    }


def _measured(found: Mapping[str, Any]) -> str:
    return (
        f"{found['points']:+.1f} points, 95% interval {found['low']:+.1f} to {found['high']:+.1f}, on the same "
        f"{plural(found['problems'], 'problem')} of {found['set']} ({found['gained']:,} gained, "
        f"{found['lost']:,} lost)."
    )


def headline(found: Mapping[str, Any] | None) -> dict[str, str]:
    """`{"tone", "title", "detail"}` of what training changed."""
    if found is None:
        return {
            "tone": "unclear",
            "title": "No before and after to compare",
            "detail": "Accuracy was not measured twice on the same held-out problems, so nothing can be said. With "
            "stages=[evaluate,sft,evaluate,grpo,evaluate,export] a run measures before and after each stage.",
        }
    measured = _measured(found)
    moved = f"held-out accuracy from {found['before_accuracy']:.1f}% to {found['after_accuracy']:.1f}%"
    if found["verdict"] == "up":
        return {
            "tone": "up",
            "title": f"Training raised {moved}",
            "detail": f"{measured} The gain is real: interval and exact test (McNemar) leave out 0.",
        }
    if found["verdict"] == "down":
        return {
            "tone": "down",
            "title": f"Training lowered {moved}",
            "detail": f"{measured} The loss is real: interval and exact test (McNemar) leave out 0.",
        }
    return {
        "tone": "unclear",
        "title": "Can't tell whether training changed held-out accuracy",
        "detail": f"From {found['before_accuracy']:.1f}% to {found['after_accuracy']:.1f}%: {measured} This "
        f"may be chance: {found['needed']}.",
    }


def problems(
    before: str, after: str, old: SetResult, new: SetResult, asked: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
    """The problems that changed sides, with both texts: up to 60 gained and 60 lost, and a few that did not move."""
    pairs = common(old, new)
    sides = {"lost": (True, False), "gained": (False, True), "both": (True, True), "neither": (False, False)}
    items = [
        _item(kind, a, b, asked)
        for kind, side in sides.items()
        for a, b in spread(
            [(a, b) for a, b in pairs if (a.right, b.right) == side], EACH if side[0] != side[1] else SAME
        )
    ]
    return {"set": new.name, "before": before, "after": after, "items": items}


def _item(kind: str, a: ProblemResult, b: ProblemResult, asked: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    prompt, answer = asked.get(a.id, (None, None))
    return {
        "kind": kind,
        "id": a.id,
        "prompt": None if prompt is None else shortened(prompt),
        "answer": None if answer is None else shortened(answer),
        "texts": [shortened(a.text), shortened(b.text)],
        "tokens": [a.tokens, b.tokens],
        "cut": [a.cut, b.cut],
    }


def within(budget: int, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many of a list of problems as the page has room for, evenly left out."""
    kept = list(items)
    while kept and size(kept) > budget:
        kept = spread(kept, max(2, len(kept) * 2 // 3)) if len(kept) > 2 else []
    return kept
