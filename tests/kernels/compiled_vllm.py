"""The kernels beside vLLM compiled on a CPU for every card, with the arguments of real calls.

test_without_a_card.py runs this file in a process of its own; compiled.py says how.
"""

import pytest
import torch
from triton.runtime import driver

from reasoner.rollout import vllm_decode_triton as fast
from reasoner.rollout.vllm_adapter_triton import join
from tests.kernels.compiled import CARDS, Card, built
from tests.kernels.compiled_elementwise import check

__all__ = ["built"]  # a fixture


def joined(num_rows: int, rank: int) -> None:
    """Gate and up of a 1.5B model."""
    both, b = (torch.zeros(*size, dtype=torch.bfloat16) for size in ((num_rows, 2 * (8960 + rank)), (2 * 8960, rank)))
    bounds = torch.tensor([[0, 8960], [8960, 17_920]], dtype=torch.int32)
    out = torch.zeros(num_rows, 17_920, dtype=torch.bfloat16)
    join(out, both[:, :17_920], both[:, 17_920:], b, bounds, None, 2.0)
    join(out, out, both[:, 17_920:], b, bounds, torch.zeros(17_920, dtype=torch.bfloat16), 2.0)


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
    joined(64, 32)
    joined(64, 512)
    stepped(151_936)
    check(built, card, 2 * 2 + 4)
