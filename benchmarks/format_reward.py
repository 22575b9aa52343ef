"""A control's reward: for the shape of an answer, whatever it is. Imports nothing heavy, as reward workers load it."""

import re

ENDS_WITH_ANSWER = re.compile(r"####[ \t]*-?\$?[\d,]*\.?\d+\s*$")


def ends_with_answer(completion: str) -> float:
    """1.0 if the completion ends with `#### number`, else 0.0."""
    return float(bool(ENDS_WITH_ANSWER.search(completion)))
