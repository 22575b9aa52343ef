"""Is the chosen letter the right one? The reward `choice`, for multiple-choice tasks.

Left out: the text of an option in place of its letter, which another option may contain.
"""

import re

from reasoner.rewards.answers import after_thinking, final_answer, plain, same_choice

# `answer is (B)`, `Answer: **B**`, `answer is option B`; the letter stands alone.
SPOKEN = re.compile(
    r"\banswer\s{0,3}(?:is|:|=)\s{0,3}:?\s{0,3}(?:option\s|choice\s)?[\s(\[*_$]{0,6}([A-Za-z])(?![\w'])", re.IGNORECASE
)
# The word `a` and a second letter after it: `answer is A or B`, `answer is a number`.
HEDGE = re.compile(r"\s?[)\]*_$]{0,4}\s{0,3}(?:,|/|&|\bor\b|\band\b)\s{0,3}(?:option\s)?[\s(\[*_$]{0,6}[A-Za-z](?!\w)")
OPTION = re.compile(r"\(?([A-Za-z])\)?\s{0,3}[).:]\s.{0,200}", re.DOTALL)


def choice(completion: str, answer: str) -> float:
    """1.0 if the one letter chosen is the gold one; else 0.0.

    It stands after `####`, in the last box or `<answer>` tag, in `the answer is B`, or is the whole completion after
    `</think>`; `B) Paris` chooses B. Two letters, in one place or in two sentences, choose none. Raises ValueError if
    the gold is no single letter.
    """
    said = final_answer(completion)
    if said is None:
        said = _spoken(after_thinking(completion) or "")
    if match := OPTION.fullmatch(plain(said)):
        said = match[1]
    return float(same_choice(answer, said))


def _spoken(text: str) -> str:
    found = list(SPOKEN.finditer(text))
    if not found:
        return text.strip()
    letters = {match[1].upper() for match in found}
    if len(letters) > 1 or any(HEDGE.match(text, match.end(1)) for match in found):
        return ""
    word = found[-1]
    # `the answer is a number` chooses nothing
    article = word[1] == "a" and re.match(r"\s+[A-Za-z]", text[word.end(1) :])
    return "" if article else word[1]
