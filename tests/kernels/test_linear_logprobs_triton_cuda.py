"""The loss head's Triton path on a card, in bfloat16, against the naive formula in float64.

Rows are flat or peaked as in the benchmark; the tiles of other cards run here too, for their numbers.
"""

import math

import pytest
import torch
from torch import Tensor

from reasoner.kernels import linear_logprobs as module
from reasoner.kernels.linear_logprobs import Logprobs, linear_logprobs
from tests.kernels.test_linear_logprobs import naive

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setattr(module, "PREFER_TRITON", True)


def make_rows(num_rows: int, vocabulary: int, width: int, peaked: bool, dtype=torch.bfloat16):
    """A random softmax of std 1; or of std 2, with one token 10 to 32 nats above in 7 of 10 rows, mostly the target."""
    draws = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=draws, device="cuda") * 0.02
    target_ids = torch.randint(vocabulary, (num_rows,), generator=draws, device="cuda")
    hidden = torch.randn(num_rows, width, generator=draws, device="cuda") / (0.02 * width**0.5)
    if peaked:
        place = torch.linspace(0, 1, num_rows, device="cuda")
        top = torch.where(place < 0.6, target_ids, target_ids.flip(0))
        height = torch.where(place < 0.7, 10 + 22 * torch.rand(num_rows, generator=draws, device="cuda"), 0.0)
        hidden = 2 * hidden + height[:, None] * weight[top] / weight[top].square().sum(1, keepdim=True)
    return hidden.to(dtype), weight.to(dtype), target_ids


def upstream(num_rows: int) -> Tensor:
    return torch.randn(num_rows, generator=torch.Generator("cuda").manual_seed(1), device="cuda")


def run(function, hidden, weight, target_ids, entropy: float = 0.0, **shape) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, entropy and the gradient of hidden."""
    hidden = hidden.detach().requires_grad_()
    found = function(hidden, weight, target_ids, **shape)
    logprobs, spread = (found.logprobs, found.entropy) if isinstance(found, Logprobs) else found
    loss = (upstream(len(target_ids)) * logprobs).sum()
    (loss + entropy * spread.sum() if entropy else loss).backward()
    return logprobs.detach(), spread.detach(), hidden.grad


def truth_of(hidden, weight, target_ids, **how) -> tuple[Tensor, Tensor, Tensor]:
    return run(naive, hidden.double(), weight.double(), target_ids, **how)


def assert_close(mine: tuple[Tensor, Tensor, Tensor], truth: tuple[Tensor, Tensor, Tensor], worst: float = 3.5e-3):
    """The bars of the loss head. A row whose gradient is below the largest by 1e8 is left to the tests of such rows."""
    off = (mine[0].double() - truth[0]).abs() / truth[0].abs().clamp(min=1)
    assert off.max() < 2e-5, f"logprobs {off.max():.1e}"
    assert (mine[1].double() - truth[1]).abs().max() < 1e-4, "entropy"
    miss, norms = (mine[2].double() - truth[2]).norm(dim=1), truth[2].norm(dim=1)
    assert miss.norm() < 2e-3 * norms.norm(), f"gradient {miss.norm() / norms.norm():.1e}"
    rows = (miss / norms)[norms > 1e-8 * norms.max()]
    assert rows.max() < worst, f"worst row {rows.max():.1e}"


CASES = [
    (50_257, 768, {}),
    (151_936, 896, {"temperature": 0.7}),
    (128_256, 256, {"logit_scale": 0.5}),
    (262_144, 64, {"soft_cap": 30.0}),
    (257, 64, {"soft_cap": 30.0, "temperature": 1.3}),
]


@pytest.mark.parametrize("peaked", [False, True], ids=["flat", "peaked"])
@pytest.mark.parametrize(("vocabulary", "width", "shape"), CASES, ids=str)
def test_within_the_bars_of_float64(vocabulary, width, shape, peaked):
    inputs = make_rows(555, vocabulary, width, peaked)
    mine, truth = run(linear_logprobs, *inputs, **shape), truth_of(*inputs, **shape)
    assert_close(mine, truth)
    assert mine[2].dtype == torch.bfloat16
    with torch.no_grad():
        plain = linear_logprobs(*inputs, **shape)
    assert_close((plain.logprobs, plain.entropy, mine[2]), truth)


def test_bf16_twice_gives_the_same_bits_and_many_blocks_agree(monkeypatch):
    from reasoner.kernels import tiles

    inputs = make_rows(1000, 50_257, 512, True)
    first, second = run(linear_logprobs, *inputs), run(linear_logprobs, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    monkeypatch.setattr(tiles, "ODDS_BYTES", 8 << 20)
    monkeypatch.setattr(tiles, "PRODUCT_BYTES", 4 * 512 * 256)
    assert_close(run(linear_logprobs, *inputs), truth_of(*inputs))


@pytest.mark.parametrize("wrong", [{"temperature": 1.01}, {"logit_scale": 0.99}, {"soft_cap": 30.0}], ids=str)
def test_a_mutated_formula_is_seen(wrong):
    inputs = make_rows(300, 5000, 256, True)
    with pytest.raises(AssertionError):
        assert_close(run(linear_logprobs, *inputs, **wrong), truth_of(*inputs))


def test_rows_by_row_forms_of_other_cards(monkeypatch):
    """The tiles of cards without an accelerator for loads, and of inputs that it refuses, on this card."""
    from reasoner.kernels import linear_logprobs_triton as fast
    from reasoner.kernels import tiles

    inputs = make_rows(300, 5003, 512, True)
    truth = truth_of(*inputs, soft_cap=40.0)
    for row in tiles.TILES:
        if row.capability >= (10, 0):
            continue  # asks for another kind of matmul
        monkeypatch.setattr(fast, "tiles_for", lambda hidden, weight, row=row: row)
        assert_close(run(linear_logprobs, *inputs, soft_cap=40.0), truth)
    monkeypatch.undo()
    monkeypatch.setattr(module, "PREFER_TRITON", True)
    odd = make_rows(300, 5003, 333, True)
    assert_close(run(linear_logprobs, *odd), truth_of(*odd))


def test_strided_hidden_and_a_head_that_is_part_of_another():
    hidden, weight, target_ids = make_rows(300, 5003, 512, True)
    views = hidden.repeat_interleave(2, 0)[::2], torch.cat([weight, weight], 1)[:, :512], target_ids
    assert_close(run(linear_logprobs, *views), truth_of(hidden, weight, target_ids))


def test_h3_rows_out_of_reach_of_the_odds_are_exact():
    """Targets from e^-40 to e^-400, and one row that is not finite, which stays alone with it."""
    hidden, weight, target_ids = make_rows(64, 5000, 512, False)
    rival = (target_ids + 7) % 5000
    gap = torch.linspace(40, 400, 64, device="cuda")[:, None] / 2
    toward = [weight[ids].float() / weight[ids].float().square().sum(1, keepdim=True) for ids in (rival, target_ids)]
    inputs = (hidden + gap * (toward[0] - toward[1])).bfloat16(), weight, target_ids
    mine, truth = run(linear_logprobs, *inputs), truth_of(*inputs)
    assert truth[0].min() < -300
    assert_close(mine, truth)
    inputs[0][60, 5] = torch.nan  # of a row that torch already does again: as many rows, the same matmuls
    broken = run(linear_logprobs, *inputs)
    assert broken[0][60].isnan()
    others = torch.arange(64, device="cuda") != 60
    for one, other in zip(broken, mine, strict=True):
        assert torch.equal(one[others], other[others])


def test_confident_rows_keep_their_relative_precision():
    hidden, weight, target_ids = make_rows(64, 5000, 512, False)
    toward = weight[target_ids].float() / weight[target_ids].float().square().sum(1, keepdim=True)
    inputs = (0.3 * hidden + torch.linspace(20, 40, 64, device="cuda")[:, None] * toward).bfloat16(), weight, target_ids
    mine = run(linear_logprobs, *inputs)
    # The naive formula cancels here even in float64, so: the others' odds, summed.
    logits = inputs[0].double() @ weight.double().T
    odds = (logits - logits.gather(1, target_ids[:, None])).exp_().scatter_(1, target_ids[:, None], 0.0)
    logprobs = -odds.sum(1).log1p()
    assert logprobs.max() > -1e-12
    assert ((mine[0].double() - logprobs) / logprobs).abs().max() < 2e-4
    factor = odds.sum(1, keepdim=True) * weight.double()[target_ids] - odds @ weight.double()
    gradient = upstream(64)[:, None].double() * factor / (1 + odds.sum(1, keepdim=True))
    assert ((mine[2].double() - gradient).norm(dim=1) / gradient.norm(dim=1)).max() < 4e-3


@pytest.mark.parametrize("num_rows", [0, 1, 129])
def test_h7_few_rows(num_rows):
    inputs = make_rows(max(num_rows, 1), 1000, 64, True)
    inputs = (inputs[0][:num_rows], inputs[1], inputs[2][:num_rows])
    mine = run(linear_logprobs, *inputs)
    assert [tuple(x.shape) for x in mine] == [(num_rows,), (num_rows,), (num_rows, 64)]
    if num_rows:
        assert_close(mine, truth_of(*inputs))


def test_gradients_at_entropy_a_trained_head_and_float16():
    inputs = make_rows(200, 3000, 128, True)
    assert_close(run(linear_logprobs, *inputs, entropy=0.5), truth_of(*inputs, entropy=0.5), worst=1e-2)
    halves = make_rows(200, 3000, 128, True, torch.float16)
    assert_close(run(linear_logprobs, *halves), truth_of(*halves), worst=math.inf)  # tiny rows are 0 in float16
    weight = inputs[1].clone().requires_grad_()
    exact = inputs[1].double().requires_grad_()
    hidden = run(linear_logprobs, inputs[0], weight, inputs[2])[2]
    truth = run(naive, inputs[0].double(), exact, inputs[2])[2]
    for mine, expected in ((hidden, truth), (weight.grad, exact.grad)):
        assert (mine.double() - expected).norm() < 3e-3 * expected.norm()


def test_h4_backward_twice_and_scaled():
    hidden, weight, target_ids = make_rows(100, 1000, 64, True)
    hidden.requires_grad_()
    loss = linear_logprobs(hidden, weight, target_ids).logprobs.sum()
    (one,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (doubled,) = torch.autograd.grad(2 * loss, hidden)
    assert torch.equal(one, again)
    assert torch.equal(2 * one, doubled)


def test_h1_offsets_past_2_to_the_31():
    """Rows of the head 2^31 elements and more into one buffer, of which only those places are written."""
    stride, vocabulary, width = 1 << 18, 9000, 64
    weight = torch.empty(vocabulary * stride, dtype=torch.bfloat16, device="cuda").view(vocabulary, stride)[:, :width]
    hidden, small, target_ids = make_rows(150, vocabulary, width, True)
    weight.copy_(small)
    assert_close(run(linear_logprobs, hidden, weight, target_ids), truth_of(hidden, small, target_ids))


def test_memory_beside_the_outputs_is_under_a_quarter_gib():
    hidden, weight, target_ids = make_rows(16_384, 151_936, 1536, True)
    hidden.requires_grad_()
    linear_logprobs(hidden[:300], weight, target_ids[:300]).logprobs.sum().backward()
    hidden.grad = None
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    found = linear_logprobs(hidden, weight, target_ids)
    found.logprobs.sum().backward()
    assert hidden.grad is not None
    peak = torch.cuda.max_memory_allocated() - held - hidden.grad.nbytes
    assert peak < 0.25 * 2**30, f"{peak / 2**20:.0f} MiB"
