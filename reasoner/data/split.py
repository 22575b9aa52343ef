"""Which problems train and which are held out: duplicates, the held-out split, overlap of training and evaluation.

Problems are compared by the hashes of their wordings (see wordings.py), so that none of them has to be in memory.
"""

from collections import Counter
from collections.abc import Sequence
from random import Random

import numpy as np

from reasoner.data.problems import Problems
from reasoner.data.wordings import distinct, first_of_each, text_hash, words_and_numbers
from reasoner.errors import ConfigError, DataError

# Ignoring signs merges 0.1% of MATH's problems and 0.5% of MAWPS + ASDiv, and 1.6% to 44% of generated mazes and sums.
MAX_MERGED = 0.01
NGRAM, COMMON = 13, 10
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd: two hashes make one


def exact_key(sides: Sequence[Problems]) -> str:
    """The form in which equal texts are the same problem: `words_and_numbers`, unless over 1% of these texts then
    fall together only because their signs are ignored; then `with_signs`.
    """
    signed = distinct([problems.hashes("with_signs") for problems in sides])
    plain = distinct([problems.hashes("words_and_numbers") for problems in sides])
    return "with_signs" if signed - plain > MAX_MERGED * signed else "words_and_numbers"


def drop_duplicates(problems: Problems) -> tuple[Problems, int]:
    """The first problem of each wording (in SFT: of each wording and worked answer), and how many others there were."""
    first = first_of_each(problems.hashes(exact_key([problems])) + SPREAD * problems.hashes("completion"))
    return problems.at(first), len(problems) - len(first)


def take_heldout(problems: Problems, heldout: float, seed: int, key: str = "data.heldout") -> Problems:
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
    return unique.at(np.array(Random(seed).sample(range(len(unique)), count)))


def without_heldout(problems: Problems, heldout: Problems, *, same_source: bool) -> tuple[Problems, int]:
    """The problems that are not held out, by their wording, and in the same source by their row; and how many went."""
    key = exact_key([problems, heldout])
    gone = np.isin(problems.hashes(key), heldout.hashes(key))
    if same_source:
        gone |= np.isin(problems.numbers, heldout.numbers)
    return problems.at(np.flatnonzero(~gone)), int(gone.sum())


def without_shared_ngrams(problems: Problems, others: Problems) -> tuple[Problems, int]:
    """The problems that share no run of NGRAM words and numbers with any of `others` (arXiv:2005.14165, appendix C; a
    shorter text counts whole), and how many did. A run that more than COMMON of the others have is boilerplate.
    """
    times = Counter(gram for other in others for gram in _ngrams(other.wording))
    telling = {gram for gram, n in times.items() if n <= COMMON}
    kept = [place for place, problem in enumerate(problems) if telling.isdisjoint(_ngrams(problem.wording))]
    return problems.at(np.array(kept, np.int64)), len(problems) - len(kept)


def _ngrams(text: str) -> set[bytes]:
    said = words_and_numbers(text).split()
    return {text_hash(" ".join(said[i : i + NGRAM])) for i in range(max(1, len(said) - NGRAM + 1))}


def without_overlap(problems: Problems, others: Sequence[Problems], key: str) -> tuple[Problems, int]:
    """The problems whose wording none of `others` has under this key, and how many had one."""
    known = [other.hashes(key) for other in others]
    gone = np.isin(problems.hashes(key), np.concatenate(known)) if known else np.zeros(len(problems), bool)
    return problems.at(np.flatnonzero(~gone)), int(gone.sum())
