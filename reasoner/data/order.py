"""The order in which rows are taken: epoch after epoch, each a new permutation. A function of (seed, cursor) alone, so
that a run can be resumed anywhere in it.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from random import Random

from reasoner.errors import DataError

MAX_EPOCHS = 16  # without a row: more than any row rests


class Order:
    """Rows 0 to num_rows - 1 for ever; every row comes once before any comes twice.

    >>> order = Order(num_rows=3, seed=0)
    >>> order.take(cursor=0, count=2) + order.take(cursor=2, count=1) == order.take(cursor=0, count=3)
    True
    """

    def __init__(self, num_rows: int, seed: int):
        if num_rows < 1:
            raise ValueError("an order needs at least one row")
        self.num_rows = num_rows
        self.seed = seed

    def take(self, cursor: int, count: int) -> list[int]:
        """`count` row numbers from position `cursor` of the endless order on."""
        return [
            _permutation(self.num_rows, self.seed, position // self.num_rows)[position % self.num_rows]
            for position in range(cursor, cursor + count)
        ]


class Draw:
    """An order being gone through: what comes next, and where that is. A row for which `why_not` has a word is passed
    over, and counted under it in `left_out`.

    >>> draw = Draw(Order(num_rows=3, seed=0), cursor=4)
    >>> len(draw.take(2)), draw.cursor
    (2, 6)
    """

    def __init__(
        self,
        order: Order,
        cursor: int,
        why_not: Callable[[int], str | None] | None = None,
        left_out: Mapping[str, int] | None = None,
    ):
        self.order, self.cursor = order, cursor
        self.why_not = why_not
        self.left_out = Counter(left_out or {})

    def take(self, count: int) -> list[int]:
        """The next `count` row numbers. Raises DataError where sixteen epochs hold no row that is not passed over."""
        rows: list[int] = []
        passed = 0
        while len(rows) < count:
            (row,) = self.order.take(self.cursor, 1)
            self.cursor += 1
            why = self.why_not(row) if self.why_not else None
            if why is None:
                rows.append(row)
                passed = 0
                continue
            self.left_out[why] += 1
            passed += 1
            if passed > MAX_EPOCHS * self.order.num_rows:
                raise DataError(f"none of the {self.order.num_rows:,} rows can be trained on: {dict(self.left_out)}")
        return rows


@lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> list[int]:
    rows = list(range(num_rows))
    Random(f"{seed}/{epoch}").shuffle(rows)
    return rows
