"""The kernels beside vLLM in Triton's interpreter, on a CPU: what an adapter adds, and the end of a token's step.

test_without_a_card.py runs this file in a process of its own, with TRITON_INTERPRET=1. Left out: noise,
whose logarithm is the card's own; tests/rollout/test_vllm_engine.py compares it with vLLM's draws, and has
scores that are not numbers.
"""

import pytest
import torch
from triton import knobs

from reasoner.rollout import vllm_decode_triton as card
from reasoner.rollout.vllm_adapter_triton import join

assert knobs.runtime.interpret, "set TRITON_INTERPRET=1 before this process starts"


@pytest.mark.parametrize("num_rows", [1, 5, 33, 130])
@pytest.mark.parametrize(
    ("parts", "rank"),
    [([(0, 70)], 4), ([(0, 30), (30, 45), (45, 130)], 32), ([(16, 80)], 5), ([(0, 60), (60, 133)], 300)],
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
    bounds = torch.tensor(parts, dtype=torch.int32)
    if below:
        both = torch.cat([x @ w.T, x @ a.T, torch.full((num_rows, 3), 9.0)], 1)
        out = torch.empty(num_rows, outputs)
        join(out, both[:, :outputs], both[:, outputs:], b, bounds, bias, 0.5)
    else:
        out = x @ w.T
        join(out, out, x @ a.T, b, bounds, None, 0.5)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


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
