"""Which problems train and which are held out: duplicates, the held-out split, overlap of training and evaluation.

Three forms of a problem's wording are compared. `words_and_numbers` ignores punctuation and signs, so that differences
of typesetting hide no duplicate; `with_signs` keeps + - < and the like, for arithmetic and mazes, where they are the
problem; `words` ignores numbers too. Left out: paraphrases (nothing here understands a text).
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from random import Random

from reasoner.data.problems import Problem
from reasoner.errors import ConfigError, DataError

Key = Callable[[str], str]
WORDS_AND_NUMBERS = re.compile(r"[^\W_]+")
WITH_SIGNS = re.compile(r"[^\W_]+|[^\w\s.,;:?!'\"$`]|_")
WORDS = re.compile(r"[^\W\d_]+")
# Ignoring signs merges 0.1% of MATH's problems and 0.5% of MAWPS + ASDiv, and 1.6% to 44% of generated mazes and sums.
MAX_MERGED = 0.01


def words_and_numbers(text: str) -> str:
    """The text's words and numbers."""
    return " ".join(WORDS_AND_NUMBERS.findall(_folded(text)))


def with_signs(text: str) -> str:
    """The text's words, numbers and every sign but sentence punctuation."""
    return " ".join(WITH_SIGNS.findall(_folded(text)))


def words(text: str) -> str:
    """The text's words; a text without words stays itself, so that sums in digits are not all one problem."""
    return " ".join(WORDS.findall(_folded(text))) or with_signs(text)


def exact_key(texts: Iterable[str]) -> Key:
    """The key under which equal texts are the same problem: `words_and_numbers`, unless over 1% of these texts then
    fall together only because their signs are ignored; then `with_signs`.
    """
    signed = {with_signs(text) for text in texts}
    plain = {words_and_numbers(text) for text in signed}
    return with_signs if len(signed) - len(plain) > MAX_MERGED * len(signed) else words_and_numbers


def drop_duplicates(problems: Sequence[Problem]) -> tuple[list[Problem], int]:
    """The first problem of each wording (in SFT: of each wording and worked answer), and how many others there were."""
    key = exact_key(problem.wording for problem in problems)
    first: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        first.setdefault((key(problem.wording), with_signs(problem.completion)), problem)
    return list(first.values()), len(problems) - len(first)


def take_heldout(problems: Sequence[Problem], heldout: float, seed: int, key: str = "data.heldout") -> list[Problem]:
    """The held-out problems, drawn with `seed`: `heldout` rows, or that share if below 1; no two have one wording.
    `key` names the setting in errors.

    Raises DataError if there are not more problems than are to be held out, ConfigError if `heldout` asks for none or
    for part of a row.
    """
    if not heldout or (heldout >= 1 and heldout != int(heldout)):
        raise ConfigError(
            f"{key}={heldout:g}: the stage `evaluate` wants a number of rows or a share below 1, or else sets "
            "named under evaluate.sets"
        )
    unique, _ = drop_duplicates(problems)
    count = int(heldout) if heldout >= 1 else max(1, round(heldout * len(unique)))
    if count >= len(unique):
        there = f"{count:,} of only {len(unique):,} different problems"
        raise DataError(f"{key}={heldout:g} asks for {there}: lower it or give more rows")
    return Random(seed).sample(unique, count)


def without_heldout(
    problems: Sequence[Problem], heldout: Sequence[Problem], *, same_source: bool
) -> tuple[list[Problem], int]:
    """The problems that are not held out, by their wording, and in the same source by their row; and how many went."""
    key = exact_key(problem.wording for side in (problems, heldout) for problem in side)
    wordings = {key(problem.wording) for problem in heldout}
    places = {problem.where for problem in heldout} if same_source else set()
    kept = [problem for problem in problems if problem.where not in places and key(problem.wording) not in wordings]
    return kept, len(problems) - len(kept)


def without_overlap(problems: Sequence[Problem], others: Collection[Problem], key: Key) -> tuple[list[Problem], int]:
    """The problems whose wording none of `others` has under this key, and how many had one."""
    known = {key(problem.wording) for problem in others}
    kept = [problem for problem in problems if key(problem.wording) not in known]
    return kept, len(problems) - len(kept)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
