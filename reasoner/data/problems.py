"""Rows as problems: question, gold answer and worked answer as text, before any tokenizer sees them.

What compares problems (duplicates, held-out rows, overlap) works on hashes of these texts, so a problem is made when it
is asked for, and of rows that are read again from their file none stays in memory. A row with a blank cell where the
conf wants text is dropped and counted, never turned into the word "nan".
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from reasoner.config import Data
from reasoner.data.columns import ColumnTemplate
from reasoner.data.gold import GoldAnswer
from reasoner.data.row import Row
from reasoner.data.rows import Rows
from reasoner.data.shapes import Shape
from reasoner.data.wordings import Hashes, Wordings, text_hash, with_signs
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


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Every problem of some rows, in order: how one is made, and what all of them are compared by."""

    make: Callable[[int], Problem]  # by place; the same each time
    numbers: NDArray[np.int64]  # of the rows, see Row
    wordings: Mapping[str, Hashes]  # by form, and `completion`: with_signs of the worked answer
    columns: frozenset[str]  # that every one of them has


class Problems(Sequence[Problem]):
    """Some problems of a source. Each is made when it is asked for."""

    def __init__(self, source: Source, places: NDArray[np.int64] | None = None):
        self.source = source
        self.places = np.arange(len(source.numbers)) if places is None else places

    def at(self, chosen: NDArray[np.int64]) -> "Problems":
        """Those at these places of this sequence."""
        return Problems(self.source, self.places[chosen])

    def hashes(self, form: str) -> Hashes:
        """Of each problem: see Source.wordings."""
        return self.source.wordings[form][self.places]

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The number of each problem's row in its source."""
        return self.source.numbers[self.places]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Problem: ...
    @overload
    def __getitem__(self, place: slice) -> "Problems": ...
    def __getitem__(self, place: int | slice) -> "Problem | Problems":
        if isinstance(place, slice):
            return Problems(self.source, self.places[place])
        return self.source.make(int(self.places[place]))


@contextmanager
def at(where: str) -> Iterator[None]:
    """Puts the row's place in front of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def make_problems(
    rows: Rows,
    data: Data,
    guard: Callable[[str], str],
    *,
    worked: bool,
    shape: Shape | None = None,
    masked: bool = False,
) -> tuple[Problems, Counter[str]]:
    """The problems of `rows` and counts (rows, dropped_by_map, several_turns, empty). With `worked` each has its SFT
    text, else "". `shape` reads rows of another program; `data` then has its templates. With `masked` their words are
    compared too, numbers aside.

    Raises DataError, with the row's place, for a missing column, one that shadows a reward's argument, or an answer
    that can't be found.
    """
    reader = _Reader(data, guard, worked, shape)
    wordings = Wordings(words=masked)
    places, numbers, completions = array("q"), array("q"), bytearray()
    counts: Counter[str] = Counter()
    common: frozenset[str] | None = None
    known: frozenset[str] | None = None
    for place, row in enumerate(rows.rows):
        try:
            columns = reader.columns(row)
            found = reader.look(columns) if columns is not None else None
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
        if columns is None or found is None:
            counts["several_turns" if columns is None else "empty"] += 1
            continue
        if reader.checked is not known:  # other names than the row before has
            known = reader.checked
            common = known if common is None else common & known
        places.append(place)
        numbers.append(row.number)
        wordings.add(found.wording)
        if worked:
            completions += text_hash(with_signs(found.completion))
    counts["rows"], counts["dropped_by_map"] = len(rows.rows) + rows.dropped_by_map, rows.dropped_by_map
    if len(rows.rows):
        reader.check_optional(rows.rows[0])
    of_rows = np.frombuffer(places, dtype=np.int64)
    hashes = {form: wordings.hashes(form) for form in wordings.forms}
    hashes["completion"] = np.frombuffer(completions, dtype="<u8") if worked else np.zeros(len(places), np.uint64)
    source = Source(
        make=lambda place: reader.read(rows.rows[int(of_rows[place])]),
        numbers=np.frombuffer(numbers, dtype=np.int64),
        wordings=hashes,
        columns=(common or frozenset()) - SHADOWING | {"answer_kind"},
    )
    return Problems(source), counts


class _Look(NamedTuple):
    """What tells a row's problem from others."""

    wording: str
    answer: str
    completion: str  # not guarded


class _Reader:
    def __init__(self, data: Data, guard: Callable[[str], str], worked: bool, shape: Shape | None):
        self.shape = shape
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
        self.checked: frozenset[str] = frozenset()  # the names of the last row that had no clash

    def columns(self, row: Row) -> Mapping[str, Any] | None:
        """The row's columns as the shape has them, None for a conversation of several turns."""
        return self.shape.columns(row.columns) if self.shape else row.columns

    def look(self, columns: Mapping[str, Any]) -> _Look | None:
        """What the row's problem is compared by, None if a cell that it needs is blank."""
        if columns.keys() != self.checked:
            self._check_names(columns)
            self.checked = frozenset(columns)
        for column, seen in self.optional.items():
            self.optional[column] = seen or self.prompt.has(columns, column)
        values = self.prompt.values(columns)
        answer = self.gold.read(columns)
        blank = not all(map(str.strip, values)) or (not answer and self.gold.template.columns)
        completion = self._completion(columns, answer, str) if self.worked else ""
        if blank or (self.worked and not completion.strip()):
            return None
        return _Look(self.prompt.wording(columns, values), answer, completion)

    def read(self, row: Row) -> Problem:
        """The problem of a row of which `look` found one. Raises DataError, with the row's place, for text that no
        prompt can hold, and where `data.map` gives the row otherwise than before.
        """
        with at(row.where):
            columns = self.columns(row)
            found = self.look(columns) if columns is not None else None
            if columns is None or found is None:
                raise DataError(
                    f"data.map={self.data.map} gives this row otherwise the second time: let it be a "
                    "function of the row alone"
                )
            kept = {name: value for name, value in columns.items() if name not in SHADOWING}
            return Problem(
                number=row.number,
                where=row.where,
                question=self.prompt.fill(columns, self.guard),
                wording=found.wording,
                answer=found.answer,
                completion=self._completion(columns, found.answer, self.guard) if self.worked else "",
                columns={"answer_kind": self.data.answer_kind, **kept},
                system=self.guard(str(columns.get("system") or "")) if self.shape and self.shape.brings_system else "",
            )

    def check_optional(self, first: Row) -> None:
        """Raises DataError for a column of an optional part that no row has: it would be left out unseen."""
        missing = [column.written for column, seen in self.optional.items() if not seen]
        if missing:
            there = ", ".join(map(str, first.columns))
            raise DataError(
                f"no row has the column '{missing[0]}', which an optional part [[...]] asks for; there are: {there}"
            )

    def _completion(self, columns: Mapping[str, Any], answer: str, guard: Callable[[str], str]) -> str:
        if self.completion is None:
            return guard(answer)
        if not all(value.strip() for value in self.completion.values(columns)):
            return ""
        strip = self.data.strip_calculator_marks
        return self.completion.fill(columns, lambda value: guard(CALCULATOR_MARK.sub("", value) if strip else value))

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
