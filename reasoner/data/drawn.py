"""Prompts and worked examples of a big source, each made when it is drawn: a million rows are not tokenized before the
first step.

What only the tokens tell (too long, a text that the template or the tokenizer can't carry) is then known row by row:
such a row is left out, never cut, and counted by whoever draws. Left out: knowing these counts at the start.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar, cast, overload

from reasoner.data.problems import Problem, Problems
from reasoner.errors import DataError, ModelError

AT_ONCE = 50_000  # problems that are made at the start instead, with exact counts: some seconds
TRIED = 1_000  # rows of a bigger source that are made at the start, so that what is wrong with all is said there
KEPT = 8_192  # made rows in memory: a step draws its rows once to see whether they serve, and once to train
UNFIT = "unfit"

T = TypeVar("T")


class Drawn(Sequence[T]):
    """Rows made on demand from `problems`; `make` gives the row or, as a word of task.COUNTS, why there is none.

    Making the first rows raises the DataError or ModelError of whatever is wrong with them; a later row of that kind
    is left out as `unfit`, so that one row can't end a night's training. Its length counts the rows left out too.
    """

    def __init__(self, problems: Problems, make: Callable[[Problem], T | str]):
        self.problems = problems
        self.columns = problems.source.columns  # that every row has
        self.first_unfit: str | None = None  # what was wrong with it
        self._make = make
        self._made = lru_cache(maxsize=KEPT)(self._guarded)
        self.none_fits = not sum(not isinstance(make(problem), str) for problem in problems[:TRIED])  # of all of those

    def _guarded(self, place: int) -> T | str:
        try:
            return self._make(self.problems[place])
        except (DataError, ModelError) as error:
            self.first_unfit = self.first_unfit or str(error)
            return UNFIT

    def why_not(self, place: int) -> str | None:
        """Why this row is left out, None if it is there."""
        made = self._made(place)
        return made if isinstance(made, str) else None

    def __len__(self) -> int:
        return len(self.problems)

    def __iter__(self) -> Iterator[T]:
        """The rows that are there, in order."""
        return (cast(T, made) for made in map(self._made, range(len(self))) if not isinstance(made, str))

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        """A row, or those of a slice that are there. Raises DataError for a row that is left out."""
        if isinstance(place, slice):
            some = map(self._made, range(*place.indices(len(self))))
            return [cast(T, made) for made in some if not isinstance(made, str)]
        made = self._made(place)
        if isinstance(made, str):
            raise DataError(f"row {place} was drawn though it is left out ({made})")
        return made


def first(rows: Sequence[T]) -> Sequence[T]:
    """All rows, or of a big source as many as can be looked at in a second."""
    return rows[:TRIED] if isinstance(rows, Drawn) else rows
