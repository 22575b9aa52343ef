"""Rewards for the shape of a completion: `think_format`, `answer_format`, `tag_count`, `regex`. Weigh them below the
accuracy part, so that no well-formed wrong answer beats a right one.

`completion` begins with what the template wrote of it (`prefill`), so a template that opens `<think>` itself is allowed
for, and so is one that writes an empty think block in order to switch thinking off.
"""

import re
from collections.abc import Sequence

from reasoner.rewards.answers import after_thinking


def think_format(completion: str, prefill: str = "") -> float:
    """1.0 if the completion is exactly one think block and then an answer, neither of them empty; else 0.0.

    The block may be empty where the template itself wrote it so. As in DeepSeek-R1, arXiv:2501.12948 section 2.2.2.
    """
    text = completion.strip()
    if text.count("<think>") != 1 or text.count("</think>") != 1 or not text.startswith("<think>"):
        return 0.0
    reasoning, _, answer = text.removeprefix("<think>").partition("</think>")
    return float(bool(reasoning.strip() or "</think>" in prefill) and bool(answer.strip()))


def answer_format(completion: str, prefill: str = "", strict: bool = True) -> float:
    """1.0 for `<think>...</think><answer>...</answer>`, each tag once, in order, neither block empty; else 0.0.

    Strict: only white space stands outside the blocks. Soft: other text may, before, between and after them.
    """
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    places = [completion.find(tag) for tag in tags]
    if any(completion.count(tag) != 1 for tag in tags) or places != sorted(places):
        return 0.0
    before, thought, between, answer, after = re.split("|".join(tags), completion)
    if not (thought.strip() or "</think>" in prefill) or not answer.strip():
        return 0.0
    return float(not strict or not (before + between + after).strip())


def tag_count(completion: str, prefill: str = "", tags: Sequence[str] = ("think", "answer")) -> float:
    """The share of the tags that stand where they should: 1 / (2 x tags) for each opening and each closing one.

    A tag earns only if it is there exactly once and in the order of `tags`; a closing one only with text before it. For
    models that never reach the whole format by chance; `answer_format` once they do. Raises ValueError without tags.
    """
    if not tags or not all(re.fullmatch(r"[\w-]+", tag) for tag in tags):
        raise ValueError(f"tags={list(tags)}: give names such as think, without brackets")
    earned, end = 0, 0
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        start, stop = completion.find(opening), completion.find(closing)
        opened = completion.count(opening) == 1 and start >= end
        if not opened:
            continue
        earned += 1
        end = start + len(opening)
        filled = completion[end:stop].strip() or closing in prefill
        if completion.count(closing) == 1 and stop >= end and filled:
            earned += 1
            end = stop + len(closing)
    return earned / (2 * len(tags))


def regex(completion: str, pattern: str, whole: bool = False, thinking: bool = False) -> float:
    """1.0 if the text after `</think>` (all of it with `thinking`) has a match of `pattern`, or is one with `whole`.

    For shapes that nothing else here knows, such as a date or a heading. `.` takes line ends and white space around the
    text is passed over. A slow pattern is ended by the part's limit and is a failure. Raises ValueError for a pattern
    that is none.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from None
    text = completion if thinking else after_thinking(completion)
    if text is None:
        return 0.0
    return float(bool(compiled.fullmatch(text.strip()) if whole else compiled.search(text.strip())))
