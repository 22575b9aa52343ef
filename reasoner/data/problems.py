"""Rows as problems: question, gold answer and worked answer as text, before any tokenizer sees them.

What compares problems (duplicates, held-out rows, overlap) works on these. A row with a blank cell where the conf wants
text is dropped and counted, never turned into the word "nan".
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from reasoner.config import Data
from reasoner.data.columns import ColumnTemplate
from reasoner.data.gold import GoldAnswer
from reasoner.data.rows import Row, Rows
from reasoner.data.shapes import Shape
from reasoner.errors import ConfigError, DataError
from reasoner.rewards.base import OWN_NAMES

CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
# Names that rewards get from us, and TRL's names for them: a column so called would be taken for ours.
SHADOWING = frozenset(OWN_NAMES) - {"answer"} | {"prompts", "completions", "completion_ids"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `question` and `completion` are guarded text (see Codec); `wording` holds the row's part of the
    question alone, so that two confs that ask the same thing in other words are seen to ask the same thing.

    >>> Problem(number=17, where="train.jsonl:17", question="Q: 2+2?", wording="2+2?", answer="4",
    ...         completion="2+2=4\\n#### 4", columns={"level": "easy"})
    """

    number: int
    where: str
    question: str
    wording: str
    answer: str
    completion: str
    columns: Mapping[str, Any]
    system: str = ""  # the row's own system text, guarded


@contextmanager
def at(where: str) -> Iterator[None]:
    """Puts the row's place in front of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def make_problems(
    rows: Rows, data: Data, guard: Callable[[str], str], *, worked: bool, shape: Shape | None = None
) -> tuple[list[Problem], Counter[str]]:
    """The problems of `rows` and counts (rows, dropped_by_map, several_turns, empty). With `worked` each has its SFT
    text, else "". `shape` reads rows of another program; `data` then has its templates.

    Raises DataError, with the row's place, for a missing column, one that shadows a reward's argument, or an answer
    that can't be found.
    """
    reader = _Reader(data, guard, worked, shape is not None)
    problems: list[Problem] = []
    counts = Counter(rows=len(rows.rows) + rows.dropped_by_map, dropped_by_map=rows.dropped_by_map)
    for row in rows.rows:
        with at(row.where):
            columns = shape.columns(row.columns) if shape else row.columns
            problem = reader.read(row, columns) if columns is not None else None
        if problem:
            problems.append(problem)
        else:
            counts["several_turns" if columns is None else "empty"] += 1
    reader.check_optional(rows)
    return problems, counts


class _Reader:
    def __init__(self, data: Data, guard: Callable[[str], str], worked: bool, has_system: bool):
        self.has_system = has_system
        self.data, self.guard = data, guard
        self.prompt = ColumnTemplate(data.prompt, "data.prompt")
        self.gold = GoldAnswer(data)
        given = data.completion is not None
        self.completion = ColumnTemplate(data.completion or "", "data.completion") if given else None
        self.worked = worked
        self.optional = dict.fromkeys(self.prompt.optional, False)
        if self.completion and worked:
            self.optional |= dict.fromkeys(self.completion.optional, False)
        if not (self.prompt.columns or self.prompt.optional):
            raise ConfigError(f"data.prompt={data.prompt!r} names no column: write {{COLUMN}} into it")

    def read(self, row: Row, columns: Mapping[str, Any]) -> Problem | None:
        """The row's problem, None if a cell that it needs is blank."""
        self._check_names(columns)
        for column, seen in self.optional.items():
            self.optional[column] = seen or self.prompt.has(columns, column)
        values = self.prompt.values(columns)
        answer = self.gold.read(columns)
        blank = not all(value.strip() for value in values) or (not answer and self.gold.template.columns)
        completion = self._completion(columns, answer) if self.worked else ""
        if blank or (self.worked and not completion.strip()):
            return None
        kept = {name: value for name, value in columns.items() if name not in SHADOWING}
        return Problem(
            number=row.number,
            where=row.where,
            question=self.prompt.fill(columns, self.guard),
            wording=self.prompt.wording(columns),
            answer=answer,
            completion=completion,
            columns={"answer_kind": self.data.answer_kind, **kept},
            system=self.guard(str(columns.get("system") or "")) if self.has_system else "",
        )

    def check_optional(self, rows: Rows) -> None:
        """Raises DataError for a column of an optional part that no row has: it would be left out unseen."""
        missing = [column.written for column, seen in self.optional.items() if not seen]
        if missing and rows.rows:
            there = ", ".join(map(str, rows.rows[0].columns))
            raise DataError(
                f"no row has the column '{missing[0]}', which an optional part [[...]] asks for; there are: {there}"
            )

    def _completion(self, columns: Mapping[str, Any], answer: str) -> str:
        if self.completion is None:
            return self.guard(answer)
        if not all(value.strip() for value in self.completion.values(columns)):
            return ""
        return self.completion.fill(columns, self._tidy)

    def _tidy(self, value: str) -> str:
        return self.guard(CALCULATOR_MARK.sub("", value) if self.data.strip_calculator_marks else value)

    def _check_names(self, columns: Mapping[str, Any]) -> None:
        clashing = SHADOWING & columns.keys()
        if not clashing:
            return
        used = self.prompt.names(columns) | self.gold.template.names(columns)
        used |= self.completion.names(columns) if self.completion else set()
        for name in sorted(clashing - used):
            raise DataError(
                f"the column '{name}' has the name of an argument that rewards get: use it in data.prompt or "
                "data.completion, or rename it with data.map"
            )
