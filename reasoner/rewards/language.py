"""Rewards for how a completion is written: `language`, and `repetition` of word n-grams. Standard library only.

Left out: telling close languages apart in a line or two, which takes a trained model.
"""

import re
import unicodedata
from collections import Counter
from itertools import islice

# A letter's script is the first word of its Unicode name.
SCRIPTS = {
    "zh": {"CJK"},
    "ja": {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"},
    "ko": {"HANGUL", "CJK"},
    "ru": {"CYRILLIC"},
    "uk": {"CYRILLIC"},
    "el": {"GREEK"},
    "ar": {"ARABIC"},
    "he": {"HEBREW"},
    "hi": {"DEVANAGARI"},
    "th": {"THAI"},
}
# Words that a text in the language can hardly do without; those that two of these languages share are left out below.
WORDS = {
    "en": "the of and to is that it for was with as are this be from by have not which so we has an",
    "de": "der die das und ist nicht von den mit dem ein eine auf sich des wir auch als werden also sind haben",
    "fr": "le les des et est une dans que qui pas pour sur au avec sont nous du ce donc cette ont il elle",
    "es": "el los las y es una que por con para no del se lo como entonces son tiene al hay esta cada",
    "it": "il gli di e una che per con non del della sono si come quindi ha nel questo alla ogni abbiamo",
    "pt": "o os as e uma que para com não do da em são por se como então tem ao um cada nos dos",
    "nl": "de het een en van is dat niet op te zijn met voor dus we er aan ook die bij heeft wordt",
}
LATEX = re.compile(r"\\[A-Za-z]+")
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+|[^\w\s]")
LETTERS = re.compile(r"[^\W\d_]+")
MIN_TELLING_WORDS = 4
MAX_CHARS = 50_000  # of a completion that are looked at


def language(completion: str, language: str = "en") -> float | None:
    """The share of letters in the language's script; 0.0 where the words are more of another language of that script.

    Known: en de fr es it pt nl by script and common words, zh ja ko ru uk el ar he hi th by script alone. None for a
    text without a letter. For models that change language while thinking (DeepSeek-R1, arXiv:2501.12948 section 2.3.2);
    weigh it low. Raises ValueError for a language that isn't known.
    """
    if language not in SCRIPTS and language not in WORDS:
        raise ValueError(f"language={language!r}: there are {', '.join([*WORDS, *SCRIPTS])}")
    words = LETTERS.findall(LATEX.sub(" ", completion[:MAX_CHARS]))
    letters = Counter(character for word in words for character in word)
    if not letters:
        return None
    scripts = SCRIPTS.get(language, {"LATIN"})
    share = sum(n for letter, n in letters.items() if _script(letter) in scripts) / letters.total()
    return share if language in SCRIPTS or _sounds_like(language, words) else 0.0


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ")[0]


def _sounds_like(language: str, words: list[str]) -> bool:
    """False if the telling words are more of another language; with too few of them nobody can say."""
    said = Counter(word.lower() for word in words)
    found = {name: sum(said[word] for word in own) for name, own in TELLING.items()}
    return sum(found.values()) < MIN_TELLING_WORDS or found[language] == max(found.values())


def _telling() -> dict[str, set[str]]:
    counted = Counter(word for words in WORDS.values() for word in set(words.split()))
    return {name: {word for word in words.split() if counted[word] == 1} for name, words in WORDS.items()}


TELLING = _telling()


def repetition(completion: str, n: int = 4) -> float:
    """-(1 - different n-grams / n-grams): 0.0 where no n words come twice, near -1.0 for one phrase again and again.

    Words in lower case; a Chinese, Japanese or Korean character and a mark are words too. arXiv:2502.03373 appendix
    C.2, in words, not tokens. For completions that run in circles until the limit. Raises ValueError unless n > 0.
    """
    if n < 1:
        raise ValueError(f"n={n}: give 1 or more")
    words = [match[0].lower() for match in WORD.finditer(completion[:MAX_CHARS])]
    grams = list(zip(*(islice(words, i, None) for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) - 1 if grams else 0.0
