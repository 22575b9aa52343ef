"""The loss head's kernels compiled on a CPU for every card of the table, with the arguments of real calls.

test_without_a_card.py runs this file in a process of its own: it tells Triton that a card is there, for good.
A call to the loss head goes as far as each launch, where the kernel is compiled, ptxas included, and not started.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from reasoner.kernels import linear_logprobs_triton as fast
from reasoner.kernels import tiles

# KiB of shared memory that a block may ask for: A100, RTX 30, RTX 40, H100, B200, RTX 50 (CUDA C++ Programming Guide,
# table "Technical Specifications per Compute Capability").
CARDS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma", 100: "tcgen05.mma", 120: "mma.sync"}
# (gradient, soft cap)
FOR_A_GRADIENT = ["factor_kernel", "exact_kernel", "scaled_rows_kernel"]
CALLS = [(True, None), (True, 30.0), (False, None)]


@dataclass(frozen=True)
class Card:
    """What Triton asks of a driver before it compiles."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def built(monkeypatch) -> list[tuple[str, int, str]]:
    """Of each launch, in order: the kernel, bytes of shared memory that it asks for, its PTX."""
    found, launch = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        found.append((self.fn.__name__, kernel.metadata.shared, kernel.asm["ptx"]))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return found


def call(card: int, width: int, gradient: bool, soft_cap: float | None, monkeypatch) -> None:
    """The loss head as that card would run it, on a few rows and a ragged vocabulary."""
    driver.set_active(Card(card))
    chosen = tiles.tiles_for(divmod(card, 10), CARDS[card] << 10, aligned=width % 8 == 0)
    monkeypatch.setattr(fast, "tiles_for", lambda *_: chosen)
    hidden = torch.zeros(20, width, dtype=torch.bfloat16, requires_grad=gradient)
    weight, target_ids = torch.zeros(600, width, dtype=torch.bfloat16), torch.zeros(20, dtype=torch.int64)
    found = fast.linear_logprobs_triton(hidden, weight, target_ids, 1.0, soft_cap, 1.0)
    if gradient:
        found.logprobs.sum().backward()


@pytest.mark.parametrize(("gradient", "soft_cap"), CALLS, ids=["gradient", "gradient, cap", "values"])
@pytest.mark.parametrize("card", CARDS)
def test_every_kernel_fits_every_card(card, gradient, soft_cap, built, monkeypatch):
    call(card, 1536, gradient, soft_cap, monkeypatch)
    names = ["target_dots_kernel", "odds_kernel", "sums_kernel", *FOR_A_GRADIENT * gradient]
    assert [name for name, _, _ in built] == names
    for name, shared, _ in built:
        assert shared <= CARDS[card] << 10, f"{name} asks for {shared} bytes of {CARDS[card] << 10}"
    assert INSTRUCTION[card] in built[1][2]


@pytest.mark.parametrize("card", [86, 90])
def test_a_wide_model_fits_too(card, built, monkeypatch):
    call(card, 8192, True, 30.0, monkeypatch)
    assert max(shared for _, shared, _ in built) <= CARDS[card] << 10


def test_inputs_that_the_accelerator_refuses_take_pointers(built, monkeypatch):
    call(90, 1530, True, None, monkeypatch)
    assert "cp.async.bulk.tensor" not in built[1][2]
    assert built[1][1] <= CARDS[90] << 10


def test_a_tile_too_large_for_a_home_card_is_seen(built, monkeypatch):
    large = next(row for row in tiles.TILES if row.capability == (9, 0))
    monkeypatch.setattr(tiles, "TILES", (replace(large, capability=(8, 0), shared_bytes=0),))
    call(120, 64, True, None, monkeypatch)
    assert built[1][1] > CARDS[120] << 10
