"""The kernels beside vLLM compiled on a CPU for every card, with the arguments of real calls.

test_without_a_card.py runs this file in a process of its own; compiled.py says how.
"""

import re

import pytest
import torch
from triton.runtime import driver

from reasoner.rollout import vllm_decode_triton as fast
from reasoner.rollout.vllm_adapter_triton import join, join_gated
from tests.kernels.compiled import CARDS, Card, built
from tests.kernels.compiled_elementwise import WIDE, WRITES_WIDE, check

__all__ = ["built"]  # a fixture


def joined(num_rows: int, rank: int) -> None:
    """q, k, v with their biases, below the matrix, and a down projection in place, of a 1.5B model."""
    both, b, low = (zeros(*size) for size in ((num_rows, 2048 + 3 * rank), (2048, rank), (num_rows, rank)))
    bounds = (0, 1536), (1536, 1792), (1792, 2048)
    join(zeros(num_rows, 2048), both[:, :2048], both[:, 2048:], b, bounds, zeros(2048), 2.0)
    out = zeros(num_rows, 1536)
    join(out, out, low, b[:1536], [(0, 1536)], None, 2.0)


def gated(num_rows: int, rank: int) -> None:
    """Its gate and up, below the matrix."""
    both, b, out = zeros(num_rows, 2 * (8960 + rank)), zeros(2 * 8960, rank), zeros(num_rows, 8960)
    bounds = (0, 8960), (8960, 17_920)
    join_gated(out, both[:, :17_920], both[:, 17_920:], b, bounds, None, 2.0, tanh=False)


def zeros(*size: int) -> torch.Tensor:
    return torch.zeros(*size, dtype=torch.bfloat16)


def stepped(vocabulary: int) -> None:
    rows = fast.Rows.empty(64, 8, torch.device("cpu"))
    tiles = fast.Tiles.empty(64, vocabulary, torch.device("cpu"))
    positions, lengths, token_ids = torch.zeros(64, dtype=torch.int64), *torch.zeros(2, 64, dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):  # vLLM makes Gemma's head without our method: 16 bits
        fast.pick(torch.zeros(64, vocabulary, dtype=dtype), positions, rows, tiles)
    last, computed = torch.zeros(64, 1, dtype=torch.int64), torch.zeros(64, dtype=torch.int32)
    fast.take(tiles, rows, 64, vocabulary, last, computed, token_ids, positions, lengths)
    fast.place(rows.slots, positions, torch.zeros(64, 32, dtype=torch.int32), 16, torch.zeros(64, dtype=torch.int64))


@pytest.mark.parametrize("card", CARDS)
def test_every_kernel_fits_every_card(card, built):
    driver.set_active(Card(card))
    for size in ((64, 32), (300, 160)):  # what is usual, and the largest tiles
        joined(*size)
        gated(*size)
    stepped(151_936)
    check(built, card, 2 * 3 + 4)


@pytest.mark.parametrize("rows", [8, 64, 300])
def test_an_adapters_kernels_ask_for_all_they_read_before_they_wait(rows, built):
    """All before the first that waits for other threads; 16 bytes at once where a tile has as many
    for a thread."""
    driver.set_active(Card(90))
    joined(rows, 32)
    gated(rows, 32)
    for name, _, ptx in built:
        reads = [found.start() for found in re.finditer(r"\bld\.global", ptx)]
        assert len(reads) >= 3 and max(reads) < ptx.index("bar.sync"), name
        assert WIDE.search(ptx) and (rows == 8 or WRITES_WIDE.search(ptx)), name
    assert len(built) == 3


def test_numbers_of_rows_that_share_a_tile_share_a_kernel(built):
    driver.set_active(Card(90))
    for rows in (1, 2, 4, 8, 16):
        joined(rows, 32)
        gated(rows, 32)
    assert len(built) == 5 * 3 and len({ptx for _, _, ptx in built}) == 3
