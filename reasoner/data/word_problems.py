"""Maps for the easy word-problem sets MAWPS, ASDiv and SVAMP: `data.map=reasoner.data.word_problems:NAME`.

Each gives the columns question and answer (a number as text); rows whose answer is no single number are dropped. Left
out: the columns of these files that no prompt or reward needs.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from reasoner.data.columns import cell_text

PLACEHOLDER = re.compile(r"number(\d+)")
SPACE_BEFORE_MARK = re.compile(r"\s+([.,?!'])")
ONE_NUMBER = re.compile(r"(-?\d[\d,]*(?:\.\d+)?)(?:\s*\([^()]*\))?")  # ASDiv's "9 (apples)"
POINT_ZERO = re.compile(r"\.0+$")
OPERATIONS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}
TOLERANCE = 0.01  # the files round their answers


def fill_numbers(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """MAWPS + ASDiv training rows: `number0` in Question filled from Numbers, the prefix Equation worked out in steps.

    >>> fill_numbers({"Question": "He has number0 and number1 .", "Numbers": "2.0 3.0",
    ...               "Equation": "+ number0 number1", "Answer": "5.0"})
    {'question': 'He has 2 and 3.', 'answer': '5', 'solution': '2 + 3 = 5\\n#### 5'}

    None where the equation is broken or doesn't give the answer.
    """
    numbers = [Fraction(text) for text in row["Numbers"].split()]
    try:
        steps, value = _work_out(row["Equation"].split(), numbers)
        question = PLACEHOLDER.sub(lambda match: _written(numbers[int(match[1])]), row["Question"])
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    if abs(float(value) - float(row["Answer"])) > TOLERANCE:
        return None
    answer = _written(value)
    return {"question": tidy(question), "answer": answer, "solution": "\n".join([*steps, f"#### {answer}"])}


def svamp(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """SVAMP rows: Body, which may lack its full stop, and Question as one text."""
    return _plain(f"{row['Body'].strip().rstrip('.')}. {row['Question']}", row["Answer"])


def asdiv(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """ASDiv rows: body and question as one text; `9 (apples)` answers 9."""
    return _plain(f"{row['body'].strip()} {row['question']}", row["answer"])


def mawps(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """MAWPS rows: input and target."""
    return _plain(row["input"], row["target"])


def calc(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of the Calc-X collection (its MAWPS): question and result_float."""
    return _plain(row["question"], row["result_float"])


def tidy(text: str) -> str:
    """The text without the spaces that these files put before punctuation."""
    return SPACE_BEFORE_MARK.sub(r"\1", text.strip())


def _plain(question: str, answer: Any) -> dict[str, Any] | None:
    found = ONE_NUMBER.fullmatch(cell_text(answer).strip())
    return {"question": tidy(question), "answer": POINT_ZERO.sub("", found[1].replace(",", ""))} if found else None


def _work_out(tokens: list[str], numbers: list[Fraction]) -> tuple[list[str], Fraction]:
    """The steps `a + b = c` of a prefix equation, innermost first, and its value. Raises ValueError if it is none."""
    steps: list[str] = []

    def value_of_next() -> Fraction:
        token = tokens.pop(0)
        if token in OPERATIONS:
            left, right = value_of_next(), value_of_next()
            value = OPERATIONS[token](left, right)
            steps.append(f"{_written(left)} {token} {_written(right)} = {_written(value)}")
            return value
        placeholder = PLACEHOLDER.fullmatch(token)
        return numbers[int(placeholder[1])] if placeholder else Fraction(token)

    value = value_of_next()
    if tokens:
        raise ValueError(f"{tokens} is left over")
    return steps, value


def _written(value: Fraction) -> str:
    """The number as a person writes it: no `.0`, at most four decimals."""
    return f"{float(value):.4f}".rstrip("0").rstrip(".")
