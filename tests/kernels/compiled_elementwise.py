"""Norms, rotary positions and gated activations compiled on a CPU for every card, with the arguments of real calls.

test_without_a_card.py runs this file in a process of its own; compiled.py says how.
"""

import re

import pytest
import torch
from triton.runtime import driver

from reasoner.kernels import elementwise_triton as fast
from tests.kernels.compiled import CARDS, Card, built

__all__ = ["built"]  # a fixture
WIDE = re.compile(r"\bld\.global\.[\w.]*v4\.b32")  # reads 16 bytes at once
WRITES_WIDE = re.compile(r"\bst\.global\.[\w.]*v4\.b32")


def grown(*size: int) -> torch.Tensor:
    return torch.zeros(*size, dtype=torch.bfloat16, requires_grad=True)


def sums_normed(width: int) -> None:
    weight = torch.zeros(width, dtype=torch.bfloat16)
    total, out = fast.add_norm(grown(1, 20, width), grown(1, 20, width), weight, 1e-6, one_plus=True)
    (total + out).sum().backward()


def normed(width: int) -> None:
    fast.norm(grown(1, 20, width), torch.zeros(width, dtype=torch.bfloat16), 1e-6).sum().backward()


def rotations(width: int, turned: int) -> None:
    cos = torch.zeros(1, 20, turned, dtype=torch.bfloat16)
    query, key, _ = grown(1, 20, 16, width).split([12, 2, 2], dim=2)
    query, key = fast.rotate(query.transpose(1, 2), key.transpose(1, 2), cos, cos)
    (query.sum() + key.sum()).backward()


def activated(width: int) -> None:
    fast.gated(grown(1, 20, width), grown(1, 20, width), tanh=False).sum().backward()


def halves_activated(width: int) -> None:
    fast.gated(grown(1, 20, 2 * width), tanh=True).sum().backward()


def activated_again(width: int) -> None:
    gate, up, gradient = (torch.zeros(1, 20, width, dtype=torch.bfloat16) for _ in range(3))
    fast.gated_backward(gate, up, gradient, tanh=False)


def check(built, card: int, count: int) -> None:
    assert len(built) == count
    for name, shared, _ in built:
        assert shared <= CARDS[card] << 10, f"{name} asks for {shared} bytes of {CARDS[card] << 10}"


@pytest.mark.parametrize("card", CARDS)
def test_every_kernel_fits_every_card_and_moves_16_bytes_at_once(card, built):
    driver.set_active(Card(card))
    sums_normed(1536)
    rotations(128, 128)
    halves_activated(8960)
    activated_again(8960)
    check(built, card, 7)
    for name, _, ptx in built:
        assert WIDE.search(ptx) and WRITES_WIDE.search(ptx), f"{name} reads or writes numbers one by one"


def test_odd_and_large_sizes_fit_a_home_card_number_by_number(built):
    driver.set_active(Card(86))
    normed(16_384 + 6)
    rotations(80, 54)
    activated(1003)
    activated_again(1003)
    check(built, 86, 7)
    assert not any(WIDE.search(ptx) for _, _, ptx in built)
