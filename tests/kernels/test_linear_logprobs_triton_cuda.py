"""The loss head's Triton path on a card, in bfloat16, against the naive formula in float64.

Rows are flat or peaked as in the benchmark; the tiles of other cards run here too, for their numbers.
"""

import math

import pytest
import torch
from torch import Tensor

from reasoner.kernels.linear_logprobs import Logprobs, linear_logprobs
from tests.kernels.test_linear_logprobs import naive

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


# What one rounding to 16 bits is off by, of the number itself: at most, and in the mean square of numbers whose
# logarithms lie evenly, 3^-1/2 (3 / (8 ln 2))^1/2 of that.
AT_MOST = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
IN_THE_MEAN = {dtype: most * math.sqrt(1 / (8 * math.log(2))) for dtype, most in AT_MOST.items()}


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


def assert_close(
    mine: tuple[Tensor, Tensor, Tensor],
    truth: tuple[Tensor, Tensor, Tensor],
    gradient: float = 2e-3,
    worst: float | Tensor = 3.5e-3,
) -> None:
    """The bars of the loss head. A row whose gradient is below the largest by 1e8 is left to the tests of such rows.

    `worst` is a row's bar, or each row's.
    """
    off = (mine[0].double() - truth[0]).abs() / truth[0].abs().clamp(min=1)
    assert off.max() < 2e-5, f"logprobs {off.max():.1e}"
    assert (mine[1].double() - truth[1]).abs().max() < 1e-4, "entropy"
    miss, norms = (mine[2].double() - truth[2]).norm(dim=1), truth[2].norm(dim=1)
    assert miss.norm() < gradient * norms.norm(), f"gradient {miss.norm() / norms.norm():.1e}"
    rows = (miss / norms)[norms > 1e-8 * norms.max()]
    over = (miss / norms / worst)[norms > 1e-8 * norms.max()]
    assert over.max() < 1, f"worst row {rows.max():.1e}, {over.max():.2f} of its bar"


def two_roundings(hidden, weight, target_ids, truth: Tensor, temperature=1.0, soft_cap=None, logit_scale=1.0) -> Tensor:
    """What a row of the gradient may be off by at most, of its norm, if nothing but these is rounded: each token's odds
    and each element of what is handed back, to bfloat16, and between them the factor to float16."""
    logits = logit_scale * hidden.double() @ weight.double().T
    slopes = 1.0
    if soft_cap is not None:
        slopes = 1 - (logits / soft_cap).tanh().square()
        logits = soft_cap * (logits / soft_cap).tanh()
    shares = (logits / temperature).softmax(1).scatter(1, target_ids[:, None], 0.0) * slopes
    others = upstream(len(hidden)).abs() * logit_scale / temperature * (shares @ weight.double().norm(dim=1))
    return AT_MOST[torch.bfloat16] * (1 + others / truth.norm(dim=1)) + AT_MOST[torch.float16]


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
    # The bar of a row is of real widths. In 64 dimensions a token's direction is at times close to the target's, so
    # that their difference, the gradient, is small beside the rounding of that token's odds.
    worst = 3.5e-3 if width >= 640 else two_roundings(*inputs, truth[2], **shape)
    assert_close(mine, truth, worst=worst)
    assert mine[2].dtype == torch.bfloat16
    with torch.no_grad():
        plain = linear_logprobs(*inputs, **shape)
    assert_close((plain.logprobs, plain.entropy, mine[2]), truth, worst=worst)


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
    odd = make_rows(300, 5003, 333, True)
    assert_close(run(linear_logprobs, *odd), truth_of(*odd))


def test_a_target_that_is_no_column_is_said_or_its_row_alone_is_not_a_number():
    hidden, weight, target_ids = make_rows(300, 5003, 512, True)
    right = run(linear_logprobs, hidden, weight, target_ids)
    for wrong in (-100, 5003, 2**40):
        target_ids[299] = wrong
        said = pytest.raises(ValueError, match=r"target_ids must lie in 0\.\.5002")
        with said, torch.no_grad():
            linear_logprobs(hidden, weight, target_ids)
        with said:
            linear_logprobs(hidden, weight.detach().requires_grad_(), target_ids)
        for mine in (run(linear_logprobs, hidden, weight, target_ids, entropy=entropy) for entropy in (0.5, 0.0)):
            assert all(numbers[299].isnan().all() and numbers[:299].isfinite().all() for numbers in mine)
        assert all(torch.equal(one[:299], other[:299]) for one, other in zip(mine, right, strict=True))
    torch.cuda.synchronize()  # no address was out of reach


def test_strided_hidden_and_a_head_that_is_part_of_another():
    hidden, weight, target_ids = make_rows(300, 5003, 512, True)
    views = hidden.repeat_interleave(2, 0)[::2], torch.cat([weight, weight], 1)[:, :512], target_ids
    assert_close(run(linear_logprobs, *views), truth_of(hidden, weight, target_ids))


def far_rows(vocabulary: int, width: int):
    """Targets from e^-40 to e^-400: below one rival in half of the rows, below all tokens alike in the others."""
    hidden, weight, target_ids = make_rows(64, vocabulary, width, False)
    rival = (target_ids + 7) % vocabulary
    gap = torch.linspace(40, 400, 64, device="cuda")[:, None]
    has_rival = (torch.arange(64, device="cuda") % 2)[:, None]
    toward = [weight[ids].float() / weight[ids].float().square().sum(1, keepdim=True) for ids in (rival, target_ids)]
    hidden = hidden + gap * (0.5 * has_rival * toward[0] - (1 - 0.5 * has_rival) * toward[1])
    return hidden.bfloat16(), weight, target_ids


# D=3584 and 1536 hold 4 and 8 columns of a row at a time, 512 holds 32.
@pytest.mark.parametrize(
    ("vocabulary", "width", "shape"),
    [
        (5000, 512, {}),
        (5003, 3584, {}),
        (151_936, 1536, {}),
        (5003, 896, {"soft_cap": 90.0, "temperature": 0.5}),
        (5003, 333, {}),
    ],
    ids=str,
)
def test_h3_rows_out_of_reach_of_the_odds_are_exact(vocabulary, width, shape):
    """And one row that is not finite stays alone with it."""
    inputs = far_rows(vocabulary, width)
    mine, truth = run(linear_logprobs, *inputs, **shape), truth_of(*inputs, **shape)
    assert truth[0].min() < -300 and (truth[0] < -113).sum() > 30
    assert_close(mine, truth)
    with torch.no_grad():
        plain = linear_logprobs(*inputs, **shape)
    assert_close((plain.logprobs, plain.entropy, mine[2]), truth)
    inputs[0][[0, 60], 5] = torch.nan  # one in reach, one not
    broken = run(linear_logprobs, *inputs, **shape)
    others = torch.ones(64, dtype=torch.bool, device="cuda")
    others[[0, 60]] = False
    for one, other in zip(broken, mine, strict=True):
        assert one[~others].isnan().all() and torch.equal(one[others], other[others])


@pytest.fixture
def waits_are_errors():
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_a_call_with_a_gradient_never_waits_for_the_card(monkeypatch, waits_are_errors):
    from reasoner.kernels import linear_logprobs_triton as fast

    def wait(flag: Tensor):
        raise AssertionError("by an event")

    inputs, to_logprobs = far_rows(5000, 512), upstream(64)
    hidden = inputs[0].requires_grad_()
    linear_logprobs(*inputs).logprobs.backward(to_logprobs)  # kernels are compiled, libraries take their workspaces
    monkeypatch.setattr(fast, "_on_its_way", wait)
    waits_are_errors()
    linear_logprobs(hidden, *inputs[1:]).logprobs.backward(to_logprobs)


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
    # Odds under 2^-62 are under 2^-126 as they are kept, where the card's exp2 gives 0.
    lost = odds.where(odds < 2.0**-62, 0.0).sum(1) / odds.sum(1)
    assert lost.max() < 1e-3
    assert ((mine[0].double() - logprobs).abs() < (2e-4 + lost) * -logprobs).all()
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
    """By the torch path's backward pass, which rounds twice to the inputs' dtype: the gradient at the logits, and what
    is handed back. The two are independent, so their squares add; 15% are left for chance, as in 128 dimensions the
    directions of two tokens are not quite independent."""
    twice = {dtype: 1.15 * math.sqrt(2) * mean for dtype, mean in IN_THE_MEAN.items()}
    inputs = make_rows(200, 3000, 128, True)
    bars = {"gradient": twice[torch.bfloat16], "worst": 1e-2}
    assert_close(run(linear_logprobs, *inputs, entropy=0.5), truth_of(*inputs, entropy=0.5), **bars)
    halves = make_rows(200, 3000, 128, True, torch.float16)
    bars = {"gradient": twice[torch.float16], "worst": math.inf}  # tiny rows are 0 in float16
    assert_close(run(linear_logprobs, *halves), truth_of(*halves), **bars)
    weight = inputs[1].clone().requires_grad_()
    exact = inputs[1].double().requires_grad_()
    hidden = run(linear_logprobs, inputs[0], weight, inputs[2])[2]
    truth = run(naive, inputs[0].double(), exact, inputs[2])[2]
    for mine, expected in ((hidden, truth), (weight.grad, exact.grad)):
        assert (mine.double() - expected).norm() < twice[torch.bfloat16] * expected.norm()


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


@pytest.mark.parametrize("num_again", [0, 1000], ids=["in reach", "rows out of reach"])
@pytest.mark.parametrize(("vocabulary", "width"), [(151_936, 1536), (262_144, 640)])
def test_memory_beside_the_outputs_is_under_a_quarter_gib(vocabulary, width, num_again):
    hidden, weight, target_ids = make_rows(16_384, vocabulary, width, True)
    hidden[:num_again] -= 200 * weight[target_ids[:num_again]] / weight[0].float().square().sum().bfloat16()
    hidden.requires_grad_()

    def peak_of_a_call() -> float:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        found = linear_logprobs(hidden, weight, target_ids)
        if found.logprobs.requires_grad:
            found.logprobs.sum().backward()
        assert (found.logprobs[:num_again] < -112).all()
        outputs = hidden.grad.nbytes if hidden.grad is not None else 0
        hidden.grad = None
        return (torch.cuda.max_memory_allocated() - held - outputs) / 2**30

    peak_of_a_call()  # libraries take their workspaces
    peaks = [peak_of_a_call()]
    with torch.no_grad():
        peaks.append(peak_of_a_call())
    assert max(peaks) < 0.25, f"{peaks} GiB"
