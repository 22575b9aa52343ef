"""When two texts ask the same: three forms of a wording, and their hashes, by which a million rows compare in little
memory.

`words_and_numbers` ignores punctuation and signs, so that differences of typesetting hide no duplicate; `with_signs`
keeps + - < and the like, for arithmetic and mazes, where they are the problem; `words` ignores numbers too. Left out:
paraphrases (nothing here understands a text), and a second look where two hashes are equal: among a million texts two
different ones meet in 64 bits with a chance of 3 in 100 million.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_digest

Hashes = NDArray[np.uint64]
FORMS = ("words_and_numbers", "with_signs", "words")
WORDS_AND_NUMBERS = re.compile(r"[^\W_]+")
WITH_SIGNS = re.compile(r"[^\W_]+|[^\w\s.,;:?!'\"$`]|_")
WORDS = re.compile(r"[^\W\d_]+")


def words_and_numbers(text: str) -> str:
    """The text's words and numbers."""
    return " ".join(WORDS_AND_NUMBERS.findall(_folded(text)))


def with_signs(text: str) -> str:
    """The text's words, numbers and every sign but sentence punctuation."""
    return " ".join(WITH_SIGNS.findall(_folded(text)))


def words(text: str) -> str:
    """The text's words; a text without words stays itself, so that sums in digits are not all one problem."""
    return " ".join(WORDS.findall(_folded(text))) or with_signs(text)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _table(kept: re.Pattern[str]) -> bytes:
    """For bytes.translate: what the pattern keeps of ASCII in lower case, a space for everything else."""
    return bytes(ord(chr(code).lower()) if kept.fullmatch(chr(code)) else 32 for code in range(128)) + bytes(128)


PLAIN_ASCII, WORDS_ASCII = _table(WORDS_AND_NUMBERS), _table(WORDS)
NO_SIGNS = bytes(code for code in range(128) if chr(code).isalnum() or not WITH_SIGNS.fullmatch(chr(code)))


class Wordings:
    """The hashes of many wordings, text by text, in each of FORMS; `words` only where asked for.

    >>> wordings = Wordings()
    >>> wordings.add("2 + 2"), wordings.add("2+2")
    >>> wordings.hashes("with_signs")[0] == wordings.hashes("with_signs")[1]
    True
    """

    def __init__(self, *, words: bool = False):
        self._hashes = {form: bytearray() for form in FORMS if words or form != "words"}

    def add(self, text: str) -> None:
        """One more text."""
        hashes = self._hashes
        if not text.isascii():
            for form, found in hashes.items():
                found += text_hash(MAKERS[form](text))
            return
        raw = text.encode()  # the same forms, eight times as fast
        plain = xxh3_64_digest(b" ".join(raw.translate(PLAIN_ASCII).split()))
        signs = text_hash(with_signs(text)) if raw.translate(None, NO_SIGNS) else plain
        hashes["words_and_numbers"] += plain
        hashes["with_signs"] += signs
        if "words" in hashes:
            found = b" ".join(raw.translate(WORDS_ASCII).split())
            hashes["words"] += xxh3_64_digest(found) if found else signs

    @property
    def forms(self) -> tuple[str, ...]:
        """Those of FORMS that were asked for."""
        return tuple(self._hashes)

    def hashes(self, form: str) -> Hashes:
        """One for each text: [N]."""
        return np.frombuffer(self._hashes[form], dtype="<u8")


def text_hash(text: str) -> bytes:
    """The hash of a text as it is; of a Unicode text that UTF-8 can't say too."""
    return xxh3_64_digest(text.encode("utf-8", "surrogatepass"))


MAKERS: dict[str, Callable[[str], str]] = {
    "words_and_numbers": words_and_numbers,
    "with_signs": with_signs,
    "words": words,
}


def first_of_each(hashes: Hashes) -> NDArray[np.int64]:
    """The places of the first of each hash, in order."""
    return np.sort(np.unique(hashes, return_index=True)[1])


def distinct(sides: Sequence[Hashes]) -> int:
    """How many different hashes there are in all."""
    ranked = np.sort(np.concatenate(sides))
    return int(np.count_nonzero(ranked[1:] != ranked[:-1])) + min(1, len(ranked))
