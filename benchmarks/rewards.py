"""Rewards of controls and of trials of speed. Imports nothing heavy: reward workers load it."""

import re
from hashlib import blake2b

ENDS_WITH_ANSWER = re.compile(r"####[ \t]*-?\$?[\d,]*\.?\d+\s*$")


def ends_with_answer(completion: str) -> float:
    """1.0 if the completion ends with `#### number`, whichever number, else 0.0."""
    return float(bool(ENDS_WITH_ANSWER.search(completion)))


def coin(completion: str) -> float:
    """0.0 or 1.0 by the text's hash: each as likely, whatever the text's length, so that nearly every group is live."""
    return float(blake2b(completion.encode("utf-8", "replace"), digest_size=1).digest()[0] & 1)
