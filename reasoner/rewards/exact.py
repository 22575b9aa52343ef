"""Rewards for tasks that need no mark around the answer: `exact` compares the whole completion, `numeric` the last
number said.
"""

import re
from fractions import Fraction

from reasoner.rewards.answers import MAX_NUMBER_CHARS, after_thinking, number, same_text

# A minus counts as a sign only where no number or bracket stands before it: 5-3 says 5 and 3.
SPOKEN_NUMBER = re.compile(r"(?:(?<![\w).])-)?[$€£¥]?(?<![A-Za-z_])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def exact(completion: str, answer: str) -> float:
    """1.0 if the whole completion, after `</think>` if it thinks, is the answer; else 0.0. For tasks whose target is
    the bare answer.

    Case, white space, full-width forms, emphasis, quotes and a closing full stop make no difference. Raises ValueError
    on an empty gold.
    """
    said = after_thinking(completion)
    return float(same_text(answer, said or ""))


def numeric(completion: str, answer: str, tolerance: float = 0.0, relative: float = 0.0) -> float:
    """1.0 if the last number said, after `</think>` if it thinks, is within `tolerance`, or within `relative` x the
    answer, of the answer; else 0.0.

    For models that give a number in free prose and mark nothing; `math` is stricter and harder to fool. Raises
    ValueError if the gold is no number or a tolerance is negative.
    """
    gold = number(answer, fractions=True)
    if gold is None:
        raise ValueError(f"the gold answer {answer!r} is no number")
    if not (tolerance >= 0 and relative >= 0):
        raise ValueError(f"tolerance={tolerance}, relative={relative}: give 0 or more")
    said = SPOKEN_NUMBER.findall(after_thinking(completion) or "")
    if not said or len(said[-1]) > MAX_NUMBER_CHARS:
        return 0.0
    value = Fraction(re.sub(r"[$€£¥,]", "", said[-1]))
    return float(abs(value - gold) <= max(Fraction(str(tolerance)), Fraction(str(relative)) * abs(gold)))
