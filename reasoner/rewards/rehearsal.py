"""A rehearsal of the rewards before a model is loaded: gold completions must earn full marks, and nothing may break on
bad ones.

Left out: a judgement of how good a reward is. That a wrong completion earns as much as a gold one is said, not refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from reasoner.config import nearest
from reasoner.errors import RewardError
from reasoner.rewards.base import Rewards
from reasoner.types import Completion, Prompt, Score

LONG_CHARS = 20_000
BAD_COMPLETIONS = {
    "an empty completion": "",
    "a completion of control and other characters": "\x00\x07\ufffd \u202e\U0001f600 </think> \\boxed{ ####",
    "a long completion": "12 and so on, " * (LONG_CHARS // 14),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A completion to try, in words too."""

    prompt: Prompt
    text: str
    what: str
    right: bool


def rehearse(rewards: Rewards, golds: Sequence[tuple[Prompt, str]], *, accuracy: str | None = None) -> list[str]:
    """Warnings, one line each, after scoring `golds` (prompts with the text of a right completion) and bad completions
    of them.

    Bad are an empty, a garbled and a long completion, and the next prompt's gold where its answer differs. `accuracy`
    names the part that must give every gold 1.0. Raises RewardError (which part, which row, what came back, what to do)
    if a part fails on any completion, applies to none of them, or if the accuracy part gives a gold less than 1.0.
    Scores come three times: by the workers of the run, and by one worker alone in this and in reverse order. A
    difference is a warning.
    """
    if accuracy is not None and accuracy not in rewards.part_names:
        raise RewardError(
            f"evaluate.accuracy={accuracy} is no part of the reward{nearest(accuracy, list(rewards.part_names))}"
        )
    if not golds:
        return []
    cases = _cases(golds)
    prompts = [case.prompt for case in cases]
    completions = [completion_of(case.text) for case in cases]
    scores = rewards.score(prompts, completions)
    for score, case in zip(scores, cases, strict=True):
        _check_failures(score, case)
    _check_applies(rewards, scores)
    if accuracy is not None:
        _check_golds(accuracy, golds, scores[: len(golds)])
    with replace(rewards, workers=1) as alone:  # one process sees it all, so that what it remembers shows
        again = [alone.score(prompts, completions), alone.score(prompts[::-1], completions[::-1])[::-1]]
    changed = [case.what for case, first, *others in zip(cases, scores, *again, strict=True) if others != [first] * 2]
    warnings = _order_warnings(scores, cases)
    if changed:
        warnings.append(
            f"scored three times, {changed[0]} got different scores: a reward should depend on its arguments alone, "
            "not on what was scored before, the process or chance"
        )
    return warnings


def _cases(golds: Sequence[tuple[Prompt, str]]) -> list[Case]:
    """The golds first, then bad completions of the first prompt, then the next prompt's gold where that is wrong."""
    right = [Case(prompt, text, f"the gold completion of row {prompt.id}", True) for prompt, text in golds]
    first = golds[0][0]
    bad = [Case(first, text, f"{what} for row {first.id}", False) for what, text in BAD_COMPLETIONS.items()]
    following = [*golds[1:], golds[0]]
    swapped = [
        Case(prompt, text, f"the gold completion of row {other.id} for row {prompt.id}", False)
        for (prompt, _), (other, text) in zip(golds, following, strict=True)
        if other.answer != prompt.answer
    ]
    return right + bad + swapped


def completion_of(text: str) -> Completion:
    """A finished completion of this text; one token a word, since no tokenizer is loaded yet, and the stop token."""
    n = len(text.split()) + 1
    return Completion((0,) * n, (True,) * n, (0.0,) * n, text, "stop", policy_step_min=0, policy_step_max=0)


def _check_failures(score: Score, case: Case) -> None:
    for part, reason in score.failures.items():
        raise RewardError(
            f"the reward part '{part}' failed on {case.what} (gold answer {case.prompt.answer!r}): {reason}; "
            f"it must return a float or None for every completion, within reward.parts.{part}.timeout_s"
        )


def _check_applies(rewards: Rewards, scores: Sequence[Score]) -> None:
    for part in rewards.part_names:
        if not any(part in score.parts for score in scores):
            raise RewardError(
                f"the reward part '{part}' returned None (does not apply) for all {len(scores)} completions tried: "
                f"return a float where it applies, or remove reward.parts.{part}"
            )


def _check_golds(accuracy: str, golds: Sequence[tuple[Prompt, str]], scores: Sequence[Score]) -> None:
    wrong = [i for i, score in enumerate(scores) if score.parts.get(accuracy, 1.0) < 1.0]
    if wrong:
        prompt, text = golds[wrong[0]]
        raise RewardError(
            f"the reward part '{accuracy}' gives {len(wrong)} of {len(golds)} gold completions less than 1.0, first "
            f"row {prompt.id}: gold answer {prompt.answer!r}, completion ending in {text[-60:]!r}, score "
            f"{scores[wrong[0]].parts[accuracy]:g}; "
            "make data.answer, data.answer_kind, data.completion and the reward agree"
        )


def _order_warnings(scores: Sequence[Score], cases: Sequence[Case]) -> list[str]:
    """A line for the first wrong completion that earns no less than the gold one of the same prompt."""
    golds = {id(case.prompt): score.total for score, case in zip(scores, cases, strict=True) if case.right}
    for score, case in zip(scores, cases, strict=True):
        if not case.right and score.total >= golds[id(case.prompt)]:
            return [
                f"{case.what} earns {score.total:g}, no less than the gold completion of that row "
                f"({golds[id(case.prompt)]:g}): weigh accuracy so that a right completion always earns more"
            ]
    return []
