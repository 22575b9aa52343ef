"""Rewards of conf=mine: called by parameter name with what they ask for, in worker processes, for each completion."""

import re


def score(completion: str, answer: str) -> float:
    """1.0 if the last number said is the answer, else 0.0. A column of your rows comes as a parameter of its name."""
    said = re.findall(r"-?\d+(?:\.\d+)?", completion.replace(",", ""))
    return float(bool(said) and float(said[-1]) == float(answer))


def brief(completion: str, limit: int) -> float:
    """1.0 for up to `limit` characters, then less, and 0.0 from twice as many on. Empty text earns nothing."""
    return min(1.0, max(0.0, 2 - len(completion) / limit)) if completion.strip() else 0.0
