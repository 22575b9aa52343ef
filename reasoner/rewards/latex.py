"""When two LaTeX answers are the same: math-verify on sizes it can handle, asked both ways.

math-verify bounds its work with SIGALRM, so this runs in a process's main thread only; the workers call rewards there.
Left out: a demand for simplest form. `2+2` passes for 4, so data whose golds are numbers says answer_kind=number.
"""

import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

ALARM_S = 2
MAX_CHARS = 512
MAX_DEPTH = 20  # brackets inside brackets; the parser's time grows steeply with them
TOO_LARGE = re.compile(
    r"\d{31}"  # a number of 31 digits
    r"|\^\s?\{?\s?-?\d{4}"  # a power of 1,000 and more
    r"|\d\s?\}?\s?\^\s?\{?\s?\d{1,9}\s?\}?\s?\^"  # 9^{9^9}
    r"|\d{4}\s?!"  # the factorial of 1,000 and more
)
PERCENT = re.compile(r"\s?\\?%$")
EQUALS = re.compile(r"(?<![<>!:])=")


def same_latex(gold: str, said: str) -> bool:
    """True if math-verify takes `said` for `gold` and `gold` for `said`; a closing per cent sign is passed over, as
    units are.

    Both ways, because one way alone takes `17=18` for 18. False for a chain of equations (`x=4=5`) where the gold has
    none, and for what no gold is like: over 512 characters, 20 brackets deep, a number of over 30 digits, powers or
    factorials of 1,000 and more. Raises ValueError if the gold itself can't be read or is that large, TimeoutError if
    math-verify gives no verdict in 2 s.
    """
    right = _read_gold(gold)
    said = _bare(said)
    chained = len(EQUALS.findall(said)) > max(1, len(EQUALS.findall(gold)))
    if not said or chained or "$" in said.replace("\\$", "") or _too_large(said):
        return False
    try:
        value = _read(said)
        return bool(value) and _verify(right, value) and _verify(value, right)
    except TimeoutException:
        raise TimeoutError(f"math-verify gave no verdict on {said[:80]!r} in {ALARM_S} s") from None


@lru_cache(maxsize=4096)
def _read_gold(gold: str) -> list[Any]:
    text = _bare(gold)
    if _too_large(text):
        raise ValueError(f"the gold answer {gold[:80]!r} is too large to check")
    try:
        value = _read(text)
    except TimeoutException:
        raise TimeoutError(f"math-verify didn't read the gold answer {gold!r} in {ALARM_S} s") from None
    if not value:
        raise ValueError(
            f"math-verify can't read the gold answer {gold!r}: set data.answer_kind to number, choice or text"
        )
    return value


def _bare(text: str) -> str:
    text = text.strip()
    if len(text) > 2 and text.startswith("$") and text.endswith("$"):
        text = text[1:-1].strip("$")
    elif text.startswith("$"):
        text = text[1:]
    return PERCENT.sub("", text.strip()).strip()


def _too_large(text: str) -> bool:
    depth = deepest = 0
    for character in text[: MAX_CHARS + 1]:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return len(text) > MAX_CHARS or deepest > MAX_DEPTH or bool(TOO_LARGE.search(text))


def _read(text: str) -> list[Any]:
    # Without the dollars math-verify reads 392 of the 500 golds of MATH-500; with them all.
    return parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=ALARM_S, raise_on_error=True)


def _verify(gold: list[Any], said: list[Any]) -> bool:
    # With set against relation in both directions, so that 1 < x < 2 and (1, 2) are the same whichever is the gold.
    return verify(gold, said, allow_set_relation_comp=True, timeout_seconds=ALARM_S, raise_on_error=True)
