"""The gold answer of a row: `data.answer` over its columns, cut out by `data.answer_pattern`, tidied for its kind."""

import re
from collections.abc import Mapping
from typing import Any

from reasoner.config import Data
from reasoner.data.columns import ColumnTemplate, cell_text
from reasoner.errors import ConfigError, DataError

THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
BOX = re.compile(r"\\boxed\s*")
BOXED_TOKEN = re.compile(r"\\[a-zA-Z]+|[^\s{}\\$]")  # TeX: without braces the next token is the box's content
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
EXACT_INTEGERS = 2.0**53


class GoldAnswer:
    """Reads a row's answer as text. Raises ConfigError if the pattern is no regular expression with a group."""

    def __init__(self, data: Data):
        self.template = ColumnTemplate(data.answer, "data.answer")
        self.is_number = data.answer_kind == "number"
        self.pattern = data.answer_pattern
        self.expression: re.Pattern[str] | None = None
        if self.pattern not in (None, "boxed"):
            try:
                self.expression = re.compile(self.pattern or "")
            except re.error as error:
                raise ConfigError(f"data.answer_pattern={self.pattern!r} is no regular expression ({error})") from None
            if not self.expression.groups:
                raise ConfigError(f"data.answer_pattern={self.pattern!r}: put the answer's part into (round brackets)")

    def read(self, row: Mapping[str, Any]) -> str:
        """The answer, "" where it is blank; numbers lose thousands commas and the `.0` that a JSON file gave them.

        Raises DataError if the cell holds text in which the pattern finds nothing.
        """
        cell = self.template.only_cell(row)
        if self.is_number and isinstance(cell, float) and cell.is_integer() and abs(cell) < EXACT_INTEGERS:
            cell = int(cell)
        text = (self.template.fill(row) if cell is None else cell_text(cell)).strip()
        if not text:
            return ""
        found = self._cut(text)
        if found is None:
            shown = text if len(text) <= 80 else f"...{text[-80:]}"
            found_none = f"data.answer_pattern={self.pattern} finds no answer in {shown!r}"
            raise DataError(f"{found_none}: change it, or drop such rows by data.map")
        return (THOUSANDS.sub("", found) if self.is_number and "," in found else found).strip()

    def _cut(self, text: str) -> str | None:
        if self.pattern is None:
            return text
        if self.expression is None:
            return last_boxed(text)
        match = self.expression.search(text)
        return match[1] if match else None


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{}` whose braces match, or the token after a bare `\\boxed`; else None."""
    for match in reversed(list(BOX.finditer(text))):
        if not text.startswith("{", match.end()):
            token = BOXED_TOKEN.match(text, match.end())
            if token:
                return token[0]
            continue
        depth = 0
        for brace in BRACES.finditer(text, match.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                return text[match.end() + 1 : brace.start()]
    return None
