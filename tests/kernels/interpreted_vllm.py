"""The kernels beside vLLM in Triton's interpreter, on a CPU: what an adapter adds, and the end of a token's step.

test_without_a_card.py runs this file in a process of its own, with TRITON_INTERPRET=1. Left out: noise,
whose logarithm is the card's own; tests/rollout/test_vllm_engine.py compares it with vLLM's draws, and has
scores that are not numbers.
"""

import pytest
import torch
from torch.nn.functional import gelu, silu
from triton import knobs

from reasoner.kernels.elementwise_triton import gated_product
from reasoner.rollout import vllm_decode_triton as card
from reasoner.rollout.vllm_adapter_triton import join, join_gated

assert knobs.runtime.interpret, "set TRITON_INTERPRET=1 before this process starts"


@pytest.mark.parametrize("num_rows", [1, 5, 33, 300])
@pytest.mark.parametrize(
    ("parts", "rank"),
    [
        ([(0, 70)], 4),
        ([(0, 30), (30, 45), (45, 130)], 32),
        ([(0, 64), (70, 133)], 16),
        ([(16, 80)], 5),
        ([(0, 60), (60, 133)], 300),
    ],
    ids=str,
)
@pytest.mark.parametrize("below", [False, True], ids=["in place", "beside"])
def test_parts_of_an_adapter_are_added_where_they_belong(num_rows, parts, rank, below):
    draws = torch.Generator().manual_seed(0)
    outputs, inputs = 133, 24
    x, w = torch.randn(num_rows, inputs, generator=draws), torch.randn(outputs, inputs, generator=draws)
    a, b = torch.randn(len(parts) * rank, inputs, generator=draws), torch.zeros(outputs, rank)
    bias = torch.randn(outputs, generator=draws) if below else None
    for begin, end in parts:
        b[begin:end] = torch.randn(end - begin, rank, generator=draws) / rank**0.5
    expected = x @ w.T + (0 if bias is None else bias)
    for i, (begin, end) in enumerate(parts):
        expected[:, begin:end] += 0.5 * (x @ a[i * rank : (i + 1) * rank].T) @ b[begin:end].T
    if below:
        both = torch.cat([x @ w.T, x @ a.T, torch.full((num_rows, 3), 9.0)], 1)
        out = torch.full((num_rows, outputs), 7.0)
        join(out, both[:, :outputs], both[:, outputs:], b, parts, bias, 0.5)
    else:
        out = x @ w.T
        join(out, out, x @ a.T, b, parts, None, 0.5)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


WIDTH = 45  # of gate and of up
HALVES = [[(0, WIDTH), (WIDTH, 2 * WIDTH)], [(0, WIDTH)], [(WIDTH, 2 * WIDTH)], [(0, 2 * WIDTH)]]


def low_and_b(num_rows: int, parts: list[tuple[int, int]], rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Small whole numbers, and eighths of them: their sums are exact in any order."""
    draws = torch.Generator().manual_seed(0)
    low = torch.randint(-2, 3, (num_rows, len(parts) * rank), generator=draws)
    b = torch.zeros(2 * WIDTH, rank)
    for begin, end in parts:
        b[begin:end] = torch.randint(-2, 3, (end - begin, rank), generator=draws) / (8 if rank < 100 else 64)
    return low.to(dtype), b.to(dtype)


@pytest.mark.parametrize("num_rows", [1, 33, 70])
@pytest.mark.parametrize("parts", HALVES, ids=["both", "gate", "up", "one of both"])
@pytest.mark.parametrize(("rank", "tanh"), [(5, False), (32, True), (300, False)], ids=["5", "32, tanh", "300"])
def test_of_gate_and_up_comes_their_gated_product(num_rows, parts, rank, tanh):
    low, b = low_and_b(num_rows, parts, rank, torch.float32)
    draws = torch.Generator().manual_seed(1)
    base, bias = (torch.randn(*size, generator=draws) for size in ((num_rows, 2 * WIDTH), (2 * WIDTH,)))
    for beside in (None, bias):
        gate_up = base.clone() if beside is None else base + beside
        for i, (begin, end) in enumerate(parts):
            gate_up[:, begin:end] += 0.5 * low[:, i * rank : (i + 1) * rank] @ b[begin:end].T
        gate, up = gate_up.chunk(2, 1)
        expected = (gelu(gate, approximate="tanh") if tanh else silu(gate)) * up
        both = torch.cat([base, low, torch.full((num_rows, 3), 9.0)], 1)
        kept = both.clone()
        out = torch.full((num_rows, WIDTH), 7.0)
        join_gated(out, both[:, : 2 * WIDTH], both[:, 2 * WIDTH :], b, parts, beside, 0.5, tanh=tanh)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(both, kept)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("num_rows", [16, 64, 130])
def test_its_bits_are_those_of_the_trainers_activation_over_both_in_16_bits(num_rows, tanh):
    low, b = low_and_b(num_rows, HALVES[0], 32, torch.float16)
    base = (torch.randint(-2000, 2000, (num_rows, 2 * WIDTH), generator=torch.Generator().manual_seed(1)) / 1024).half()
    given = base, low, b, HALVES[0], None, 0.5
    gate_up, out = torch.empty_like(base), base.new_empty(num_rows, WIDTH)
    join(gate_up, *given)
    join_gated(out, *given, tanh=tanh)
    assert torch.equal(out, gated_product(gate_up, None, tanh=tanh))
    exact = torch.empty(base.shape)
    join(exact, *(one.float() for one in given[:3]), *given[3:])
    once = gated_product(exact, None, tanh=tanh).half()  # rounded at the end alone
    assert (out != once).float().mean() > 0.03


def test_a_part_that_ends_within_a_half_is_our_own_mistake():
    low, b = low_and_b(3, [(0, 30)], 4, torch.float32)
    with pytest.raises(AssertionError):
        join_gated(torch.empty(3, WIDTH), torch.zeros(3, 2 * WIDTH), low, b, [(0, 30)], None, 0.5, tanh=False)


class Step:
    """Six rows of a batch, of which two have no sequence, over eight slots of a runner."""

    def __init__(self, vocabulary: int):
        self.rows = card.Rows.empty(6, 3, torch.device("cpu"))
        self.rows.slots[:] = torch.tensor([5, 0, 7, 2, -1, -1], dtype=torch.int32)
        self.tiles = card.Tiles.empty(6, vocabulary, torch.device("cpu"))
        self.last = torch.full((8, 1), -7)
        self.computed = torch.arange(10, 18, dtype=torch.int32)
        self.token_ids = torch.full((6,), -1, dtype=torch.int32)
        self.positions = torch.full((6,), -1)
        self.lengths = torch.zeros(6, dtype=torch.int32)

    def end(self, scores: torch.Tensor) -> None:
        card.pick(scores, self.positions, self.rows, self.tiles)
        card.take(
            self.tiles, self.rows, 6, scores.shape[1], self.last, self.computed, self.token_ids, self.positions,
            self.lengths,
        )  # fmt: skip


@pytest.mark.parametrize("vocabulary", [5, 4096, 9001])
def test_the_likeliest_is_drawn_written_down_and_read_by_the_next_step(vocabulary):
    step = Step(vocabulary)
    draws = torch.Generator().manual_seed(0)
    for number in range(2):
        scores = 30 * torch.randn(6, vocabulary, generator=draws)
        scores[1, -1] = 200.0  # in the last tile
        step.end(scores)
        best = scores[:4].argmax(1)
        logprobs = scores[:4].log_softmax(1).gather(1, best[:, None])[:, 0]
        assert step.rows.drawn[number, 0, :4].tolist() == best.tolist()
        torch.testing.assert_close(step.rows.drawn[number, 1, :4].view(torch.float32), logprobs)
        assert step.rows.steps.tolist() == [number + 1] * 4 + [0, 0]
        slots = [5, 0, 7, 2]
        assert step.last[slots, 0].tolist() == best.tolist() == step.token_ids[:4].tolist()
        assert step.computed[slots].tolist() == [slot + 11 + number for slot in slots] == step.positions[:4].tolist()
        assert step.lengths[:4].tolist() == [slot + 12 + number for slot in slots]
    others = [1, 3, 4, 6]
    assert step.last[others, 0].tolist() == [-7] * 4 and step.computed[others].tolist() == [11, 13, 14, 16]
    assert step.token_ids[4:].tolist() == step.positions[4:].tolist() == [-1, -1] and not step.lengths[4:].any()
    assert not step.rows.drawn[:, :, 4:].any() and not step.rows.drawn[2].any()


def test_a_position_has_its_place_in_the_cache():
    slots = torch.tensor([5, 0, -1, 2, 3], dtype=torch.int32)
    positions = torch.tensor([0, 33, 1, 47, 48])
    table = torch.tensor([[4, 9, 2], [7, 1, 8], [3, 3, 3], [6, 5, 11], [1, 2, 3]], dtype=torch.int32)
    out = torch.full((5,), -5)
    card.place(slots, positions, table, 16, out)
    assert out.tolist() == [64, 8 * 16 + 1, -1, 11 * 16 + 15, -1]  # of no sequence, and behind the last block: -1
