"""What a completion gives as its answer, and when two answers of a kind are the same. Standard library only; every
pattern is linear.

Left out: partial credit, and the search for an answer in free prose. A completion says which text is its answer (`####
18`, `\\boxed{18}` or `<answer>18</answer>`) or it has none, so that a number in passing is never taken for one.
"""

import re
import unicodedata
from fractions import Fraction

MARK = "####"
MAX_NUMBER_CHARS = 100  # nobody writes a longer one; it bounds the work of the patterns below
TOLERANCE = Fraction(1, 10_000)  # relative, for golds that are not whole: 0.3333 says 1/3

BRACES = re.compile(r"\\boxed\s{0,4}\{|\\.|[{}]", re.DOTALL)
# A control token with text behind it, or a speaker's line: a turn that the model made up.
NEXT_TURN = re.compile(
    r"(?:<\|[^|<>\s]{1,40}\|>|<(?:start_of_turn|end_of_turn|eos|bos|s|/s)>)\s{0,20}\S"
    r"|^[ \t]*(?:#{1,3}[ \t]*)?(?:user|human|assistant|question|problem|instruction|q)[ \t]?:",
    re.IGNORECASE | re.MULTILINE,
)
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textrm|mbox|mathrm|mathbf)\s?\{([^{}]*)\}")
DEGREES = re.compile(r"\^\s?\{?\s?\\circ\s?\}?|°")
LATEX_SPACES = re.compile(r"\\[,;: ]|~")
NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s?[$€£¥]?\s?(?P<sign_after_currency>[-+]?)"
    r"(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?P<decimals>\.\d+)?(?P<exponent>[eE][-+]?\d{1,3})?"
    r"\s*%?(?:\s*(?P<unit>[A-Za-z][A-Za-z.'/-]*(?:\s+[A-Za-z][A-Za-z.'/-]*){0,4})(?:\^?\{?[23]\}?)?)?"
)
FRACTION = re.compile(r"(?P<sign>[-+]?)(?:\\[dt]?frac\{(\d+)\}\{(\d+)\}|\\[dt]?frac\s?(\d)(\d)|(\d+)\s?/\s?(\d+))")
NOT_UNITS = {"hundred", "thousand", "million", "billion", "trillion", "dozen", "half", "k", "bn"} | {
    *("or", "and", "to", "not", "plus", "minus", "times", "over", "by", "divided", "squared", "cubed")
}


def after_thinking(text: str) -> str | None:
    """The text after the last `</think>`, all of it where nobody thinks; None while a think block is open."""
    answer = text.rpartition("</think>")[2]
    return None if "<think>" in answer else answer


def final_answer(text: str) -> str | None:
    """What stands after the first `####`, to the end of its line, in the last brace-matched `\\boxed{}`, or in the last
    closed `<answer>` tag: whichever begins last.

    None where there is none, where a think block is open, and where the model went on with a turn of its own after
    an answer.
    """
    said = after_thinking(text)
    if said is None:
        return None
    found = [place for place in (_marked(said), _boxed(said), _tagged(said)) if place]
    if not found or NEXT_TURN.search(said, min(first for first, _, _ in found)):
        return None
    _, start, end = max(found, key=lambda place: place[1])
    return said[start:end].strip()


def _marked(text: str) -> tuple[int, int, int] | None:
    """Where the answer's first mark ends, and from where to where the answer itself stands."""
    at = text.find(MARK)
    if at < 0:
        return None
    start = at + len(MARK)
    end = text.find("\n", start)
    return start, start, len(text) if end < 0 else end


def _boxed(text: str) -> tuple[int, int, int] | None:
    """The end of the first closed box, and the start and end of the last one's content (last by where it opens)."""
    open_braces: list[int | None] = []  # a box's start, None for any other brace
    boxes: list[tuple[int, int]] = []
    for token in BRACES.finditer(text):
        if token[0].startswith("\\boxed"):
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                boxes.append((start, token.start()))
    if not boxes:
        return None
    return boxes[0][1], *max(boxes)


def _tagged(text: str) -> tuple[int, int, int] | None:
    """The end of the first closed tag's content, and from where to where the last one's goes."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return None
    first = text.find("</answer>", text.find("<answer>"))
    return first, start + len("<answer>"), end


def same_number(gold: str, said: str) -> bool:
    """True if `said` is one literal number equal to `gold`: exactly where the gold is whole, else within 1e-4 of it.

    A currency sign, thousands commas, a per cent sign, a full stop and up to five words of unit are passed over; a
    second number, a sum, an equation and a word such as `thousand` make it no literal number. A fraction counts only
    where the gold is not whole. Raises ValueError if the gold is no number.
    """
    right = number(gold, fractions=True)
    if right is None:
        raise ValueError(f"the gold answer {gold!r} is no number: set data.answer_kind to latex, choice or text")
    if right.denominator == 1:
        return number(said) == right
    value = number(said, fractions=True)
    return value is not None and abs(value - right) <= TOLERANCE * abs(right)


def number(text: str, *, fractions: bool = False) -> Fraction | None:
    """The one literal number that the text is, exactly; None if it is anything else."""
    if len(text) > 4 * MAX_NUMBER_CHARS:
        return None
    text = plain(text)
    if len(text) > MAX_NUMBER_CHARS:
        return None
    if fractions and (match := FRACTION.fullmatch(text)):
        over, under = (int(group) for group in match.groups()[1:] if group)
        return Fraction(-over if match["sign"] == "-" else over, under) if under else None
    match = NUMBER.fullmatch(text)
    if not match or not (match["whole"] or match["decimals"]) or (match["sign"] and match["sign_after_currency"]):
        return None
    if any(word.strip(".'").lower() in NOT_UNITS for word in (match["unit"] or "").split()):
        return None
    digits = (match["whole"] or "0").replace(",", "") + (match["decimals"] or "") + (match["exponent"] or "")
    value = Fraction(digits)
    return -value if "-" in (match["sign"], match["sign_after_currency"]) else value


def plain(text: str) -> str:
    """The text without what only dresses it: full-width forms, LaTeX spaces and text commands, degrees, emphasis, a
    closing full stop.
    """
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u2013", "-")
    text = text.replace("\\!", "").replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    text = LATEX_SPACES.sub(" ", DEGREES.sub("", TEXT_COMMAND.sub(r" \1", text)))
    text = text.strip(" \t\r\n*_`").rstrip(".").strip(" \t\r\n*_`")
    for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(text) > len(opening) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip()
    return text


def same_choice(gold: str, said: str) -> bool:
    """True if both are the same single letter; brackets, emphasis, case and a full stop are passed over. ValueError:
    no letter as gold.
    """
    right = _letter(gold)
    if right is None:
        raise ValueError(f"the gold answer {gold!r} is no single letter: set data.answer_kind to number, latex or text")
    return _letter(said) == right


def _letter(text: str) -> str | None:
    letter = plain(text).strip(" ()[]{}:.*")
    return letter.upper() if len(letter) == 1 and letter.isalpha() else None


def same_text(gold: str, said: str) -> bool:
    """True if both texts are equal but for case, white space, width of characters, emphasis, quotes and a full stop.

    Raises ValueError if nothing of the gold is left then.
    """
    right = normalized(gold)
    if not right:
        raise ValueError(f"the gold answer {gold!r} is empty")
    return normalized(said) == right


def normalized(text: str) -> str:
    """The text in the one form that same_text compares."""
    return " ".join(plain(text).strip("\"'“”").split()).rstrip(".!").casefold()
