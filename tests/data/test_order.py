"""The order of rows: each once an epoch, resumable from any cursor. G6."""

import subprocess
import sys

import pytest

from reasoner.data.order import Order


def test_every_row_comes_once_an_epoch() -> None:
    order = Order(num_rows=7, seed=3)
    epochs = [order.take(cursor=7 * epoch, count=7) for epoch in range(5)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


@pytest.mark.parametrize("cut", [0, 1, 6, 7, 8, 20])
def test_g6_taking_on_from_a_cursor_is_taking_through(cut: int) -> None:
    whole = Order(num_rows=7, seed=3).take(cursor=0, count=21)
    assert Order(num_rows=7, seed=3).take(0, cut) + Order(num_rows=7, seed=3).take(cut, 21 - cut) == whole


def test_seeds_differ_and_nothing_else_matters() -> None:
    assert Order(100, seed=0).take(0, 100) != Order(100, seed=1).take(0, 100)
    code = "from reasoner.data.order import Order; print(Order(5, seed=0).take(3, 9))"
    told = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert told[0].stdout == told[1].stdout == f"{Order(5, seed=0).take(3, 9)}\n"


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Order(0, seed=0)
