"""The loss head's Triton path in Triton's interpreter, on a CPU, against the naive formula in float64.

test_without_a_card.py runs this file in a process of its own, with TRITON_INTERPRET=1: a kernel is interpreted
or compiled for good when its module is imported. Tiles are small here, so that a few rows are many blocks. Left out:
bfloat16, which the interpreter doesn't sum as a card does; float32 takes the same path, float16 that without a factor.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.runtime import interpreter

from reasoner.kernels import linear_logprobs_triton as fast
from reasoner.kernels import odds_triton, tiles
from reasoner.kernels.linear_logprobs import Logprobs
from reasoner.kernels.tiles import Tiles
from tests.kernels.mutants import mutated
from tests.kernels.test_linear_logprobs import SHAPES, make_inputs, naive

assert knobs.runtime.interpret, "set TRITON_INTERPRET=1 before this process starts"
# numpy says what a card does silently: both arms of a tl.where are made, and odds out of reach are infinite.
pytestmark = pytest.mark.filterwarnings(
    *(f"ignore:{what} encountered in:RuntimeWarning" for what in ("overflow", "divide by zero", "invalid value"))
)
NUM_ROWS, WIDTH = 15, 24  # no multiple of a tile's rows or depth; rows of a multiple of 16 bytes, as descriptors ask

plain_patch = interpreter._patch_lang_tensor


def patch_with_index(tensor, scope):
    """numpy 2.4 refuses int() of the array of one element that Triton 3.6 keeps for a number, as range() asks for."""
    plain_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = patch_with_index


def small(descriptors: bool, halves: int = 1) -> Tiles:
    return Tiles((8, 0), 1, descriptors, 4, 32, 16, 2, warps=4, stages=2, halves=halves, persistent=descriptors)


FORMS = {"pointers": small(False), "descriptors": small(True), "descriptors in halves": small(True, 2)}


@pytest.fixture(autouse=True)
def form(request, monkeypatch) -> None:
    """A form of the odds kernel, that with most to it where a test names none, in blocks of 12 rows, 96 columns."""
    monkeypatch.setattr(tiles, "TILES", (FORMS[getattr(request, "param", "descriptors in halves")],))
    monkeypatch.setattr(tiles, "block_rows", lambda *_: 12)
    monkeypatch.setattr(tiles, "sum_rows", lambda *_: 12)
    monkeypatch.setattr(tiles, "ODDS_BYTES", 2 * 12 * 96)


def by_triton(hidden, weight, target_ids, temperature=1.0, soft_cap=None, logit_scale=1.0):
    return fast.linear_logprobs_triton(hidden, weight, target_ids, temperature, soft_cap, logit_scale)


def upstream(num_rows: int) -> Tensor:
    return torch.randn(num_rows, generator=torch.Generator().manual_seed(1))


def run(function, hidden, weight, target_ids, entropy: float = 0.0, **shape) -> list[Tensor]:
    """logprobs, entropy and the gradient of hidden."""
    hidden = hidden.detach().requires_grad_()
    found = function(hidden, weight, target_ids, **shape)
    logprobs, spread = (found.logprobs, found.entropy) if isinstance(found, Logprobs) else found
    loss = (upstream(len(target_ids)) * logprobs).sum()
    (loss + entropy * spread.sum() if entropy else loss).backward()
    return [logprobs.detach(), spread.detach(), hidden.grad]


def truth_of(hidden, weight, target_ids, **how) -> list[Tensor]:
    return run(naive, hidden.double(), weight.double(), target_ids, **how)


def assert_close(mine: list[Tensor], truth: list[Tensor], gradient: float = 5e-6) -> None:
    """Logprobs to 3e-6 of max(1, |logp|), entropy to 2e-5, the gradient norm-wise."""
    off = (mine[0].double() - truth[0]).abs() / truth[0].abs().clamp(min=1)
    assert off.max() < 3e-6, f"logprobs {off.max():.1e}"
    assert (mine[1].double() - truth[1]).abs().max() < 2e-5, "entropy"
    miss = (mine[2].double() - truth[2]).norm()
    assert miss <= gradient * truth[2].norm(), f"gradient {miss / truth[2].norm():.1e}"


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize(
    ("vocabulary", "shape"),  # H2: a padded last tile must not count; 160: five whole tiles
    [(127, {}), (127, SHAPES[2]), (1, SHAPES[4]), (127, SHAPES[4]), (160, SHAPES[4])],
    ids=str,
)
def test_h2_h5_equals_the_naive_formula(vocabulary, shape):
    inputs = make_inputs(NUM_ROWS, vocabulary, WIDTH, torch.float32)
    mine, truth = run(by_triton, *inputs, **shape), truth_of(*inputs, **shape)
    assert_close(mine, truth)
    with torch.no_grad():
        plain = by_triton(*inputs, **shape)
    assert_close([plain.logprobs, plain.entropy, mine[2]], truth)


@pytest.mark.parametrize("form", ["pointers"], indirect=True)
def test_a_width_that_no_descriptor_takes():
    inputs = make_inputs(NUM_ROWS, 127, 27, torch.float32)
    assert_close(run(by_triton, *inputs), truth_of(*inputs))


def test_float16():
    inputs = make_inputs(NUM_ROWS, 127, WIDTH, torch.float16)
    mine = run(by_triton, *inputs, temperature=0.8)
    assert mine[2].dtype == torch.float16
    assert_close(mine, truth_of(*inputs, temperature=0.8), gradient=1e-3)


@pytest.mark.parametrize("wrong", [-1, 127, -100, 2**40])
def test_a_target_that_is_no_column_is_said(wrong):
    hidden, weight, target_ids = make_inputs(NUM_ROWS, 127, WIDTH, torch.float32)
    weight = torch.cat([weight, weight])[:127]  # so that the next row is a row
    target_ids[NUM_ROWS - 1] = wrong
    said = pytest.raises(ValueError, match=r"target_ids must lie in 0\.\.126")
    with said, torch.no_grad():
        by_triton(hidden, weight, target_ids)
    with said:  # no factor
        by_triton(hidden, weight.clone().requires_grad_(), target_ids)
    right = run(by_triton, hidden, weight, target_ids.clamp(0, 126))
    for entropy in (0.0, 0.5):  # by the factor, and not; nobody waits
        mine = run(by_triton, hidden, weight, target_ids, entropy=entropy)
        assert all(numbers[NUM_ROWS - 1].isnan().all() and numbers[:-1].isfinite().all() for numbers in mine)
    mine = run(by_triton, hidden, weight, target_ids)
    assert all(torch.equal(one[:-1], other[:-1]) for one, other in zip(mine, right, strict=True))


@pytest.mark.parametrize("num_rows", [0, 1])
def test_h7_few_rows(num_rows):
    inputs = make_inputs(num_rows, 127, WIDTH, torch.float32)
    mine = run(by_triton, *inputs)
    assert [tuple(x.shape) for x in mine] == [(num_rows,), (num_rows,), (num_rows, WIDTH)]
    if num_rows:
        assert_close(mine, truth_of(*inputs))
    with torch.no_grad():
        assert by_triton(*inputs).logprobs.shape == (num_rows,)


def test_strided_hidden_and_a_head_that_is_part_of_another():
    hidden, weight, target_ids = make_inputs(NUM_ROWS, 127, WIDTH, torch.float32)
    views = hidden.T.contiguous().T, torch.cat([weight, -weight], 1)[:, :WIDTH], target_ids.repeat_interleave(2)[::2]
    assert_close(run(by_triton, *views), truth_of(hidden, weight, target_ids))


def test_h3_rows_out_of_reach_of_the_odds_are_exact_and_a_broken_one_stays_alone(monkeypatch):
    hidden, weight, target_ids = make_inputs(NUM_ROWS, 127, WIDTH, torch.float32)
    toward = weight[target_ids] / weight[target_ids].square().sum(1, keepdim=True)
    hidden -= torch.linspace(40, 400, NUM_ROWS)[:, None] * toward
    mine, truth = run(by_triton, hidden, weight, target_ids), truth_of(hidden, weight, target_ids)
    assert truth[0].min() < -300
    assert_close(mine, truth)
    monkeypatch.setattr(fast, "AGAIN_ELEMENTS", 4 * 127)  # the rows in several parts
    with torch.no_grad():
        plain = by_triton(hidden, weight, target_ids)
    assert_close([plain.logprobs, plain.entropy, mine[2]], truth)
    hidden[[0, 12], 5] = torch.nan  # one in reach, one not
    broken = run(by_triton, hidden, weight, target_ids)
    others = torch.ones(NUM_ROWS, dtype=torch.bool).index_fill(0, torch.tensor([0, 12]), False)
    for one, other in zip(broken, mine, strict=True):
        assert one[~others].isnan().all() and torch.equal(one[others], other[others])
    with torch.no_grad():
        plain = by_triton(hidden, weight, target_ids)
    assert torch.equal(plain.logprobs.isnan(), ~others) and torch.equal(plain.entropy.isnan(), ~others)


FAR = {
    "plain": {},
    "scaled": {"temperature": 0.8, "logit_scale": 1.2},
    "capped": {"temperature": 0.8, "logit_scale": 1.2, "soft_cap": 90.0},
}


@pytest.fixture
def far_inputs(monkeypatch) -> tuple[Tensor, Tensor, Tensor]:
    """Targets down to e^-400 in every other row, more rows than a program looks at, more columns than it holds at once.

    All odds are one tile: the kernel of rows out of reach has tiles of its own.
    """
    monkeypatch.setattr(tiles, "TILES", (replace(small(True), rows=64, columns=512),))
    monkeypatch.setattr(tiles, "block_rows", lambda *_: 64)
    monkeypatch.setattr(tiles, "sum_rows", lambda *_: 64)
    monkeypatch.setattr(tiles, "ODDS_BYTES", 2 * 64 * 512)
    hidden, weight, target_ids = make_inputs(40, 300, 72, torch.float32)
    toward = weight[target_ids] / weight[target_ids].square().sum(1, keepdim=True)
    away = torch.linspace(40, 400, 40) * torch.tensor([0, 0, 1, 1]).repeat(10)  # the first two are peaked
    return hidden - away[:, None] * toward, weight, target_ids


@pytest.mark.parametrize("shape", FAR.values(), ids=FAR)
def test_h3_rows_out_of_reach_are_exact_without_a_wait(shape, far_inputs, monkeypatch):
    def wait(flag: Tensor):
        raise AssertionError("a call with a gradient asks nobody")

    inputs = far_inputs
    with torch.no_grad():
        plain = by_triton(*inputs, **shape)
    monkeypatch.setattr(fast, "_on_its_way", wait)
    mine, truth = run(by_triton, *inputs, **shape), truth_of(*inputs, **shape)
    beyond = truth[0] < -113
    assert 10 < beyond.sum() < 30
    assert_close(mine, truth)
    assert_close([plain.logprobs, plain.entropy, mine[2]], truth)
    miss = (mine[2].double() - truth[2]).norm(dim=1) / truth[2].norm(dim=1)
    assert miss[beyond].max() < 1e-4, f"worst row {miss[beyond].max():.1e}"
    assert all(torch.equal(one, other) for one, other in zip(run(by_triton, *inputs, **shape), mine, strict=True))


def test_h3_a_gradient_at_the_entropy_of_rows_out_of_reach(far_inputs):
    mine, truth = run(by_triton, *far_inputs, entropy=0.5), truth_of(*far_inputs, entropy=0.5)
    assert_close(mine, truth, gradient=1e-4)


@pytest.mark.parametrize("row", [0, NUM_ROWS - 1])
def test_h3_one_row_out_of_reach_is_found_in_any_block(row):
    hidden, weight, target_ids = make_inputs(NUM_ROWS, 127, WIDTH, torch.float32)
    hidden[row] -= 300 * weight[target_ids[row]] / weight[target_ids[row]].square().sum()
    mine, truth = run(by_triton, hidden, weight, target_ids), truth_of(hidden, weight, target_ids)
    assert truth[0].argmin() == row and truth[0].min() < -200
    assert_close(mine, truth)


def test_confident_rows_keep_their_relative_precision():
    hidden, weight, target_ids = make_inputs(NUM_ROWS, 127, WIDTH, torch.float32)
    toward = weight[target_ids] / weight[target_ids].square().sum(1, keepdim=True)
    hidden = 0.1 * hidden + torch.linspace(10, 60, NUM_ROWS)[:, None] * toward
    mine = run(by_triton, hidden, weight, target_ids)
    # The naive formula cancels here even in float64, so: the others' odds, summed.
    logits = hidden.double() @ weight.double().T
    odds = (logits - logits.gather(1, target_ids[:, None])).exp_().scatter_(1, target_ids[:, None], 0.0)
    total = odds.sum(1, keepdim=True)
    assert total.max() > 1e-5 and total.min() < 1e-12
    torch.testing.assert_close(mine[0].double(), -total[:, 0].log1p(), rtol=1e-4, atol=0)
    gradient = upstream(NUM_ROWS)[:, None].double() * (total * weight.double()[target_ids] - odds @ weight.double())
    miss = (mine[2].double() - gradient / (1 + total)).norm(dim=1) / gradient.norm(dim=1)
    assert miss.max() < 1e-4


def test_sums_of_more_tiles_than_are_loaded_at_once():
    draws = torch.Generator().manual_seed(0)
    partials, sums = torch.randn(2, 300, 40, generator=draws), torch.zeros(2, 50)
    odds_triton.sums_kernel[(3, 2)](
        partials, sums, 7, 37, 300, partials.stride(0), partials.stride(1), sums.stride(0), TILES=128, ROWS=16
    )
    torch.testing.assert_close(sums[:, 7:44], partials[:, :, :37].sum(1), rtol=1e-5, atol=1e-4)
    assert not sums[:, :7].any() and not sums[:, 44:].any()


def test_gradients_at_entropy_and_a_trained_head():
    hidden, weight, target_ids = make_inputs(NUM_ROWS, 127, WIDTH, torch.float32)
    shape = {"soft_cap": 3.0, "entropy": 0.5}
    assert_close(run(by_triton, hidden, weight, target_ids, **shape), truth_of(hidden, weight, target_ids, **shape))
    head, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    mine = run(by_triton, hidden, head, target_ids)
    assert_close(mine, run(naive, hidden.double(), exact, target_ids))
    assert (head.grad - exact.grad).norm() < 5e-6 * exact.grad.norm()


def test_h4_backward_twice_scaled_and_repeated():
    hidden, weight, target_ids = make_inputs(NUM_ROWS, 127, WIDTH, torch.float32)
    hidden.requires_grad_()
    found = [by_triton(hidden, weight, target_ids) for _ in range(2)]
    loss, other = (x.logprobs.sum() for x in found)
    (one,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (doubled,) = torch.autograd.grad(2 * loss, hidden)
    (again,) = torch.autograd.grad(other, hidden)
    assert torch.equal(2 * one, doubled) and torch.equal(one, again)
    assert torch.equal(found[0].entropy, found[1].entropy)


MUTANTS = {
    "the target counts among the others": (
        "columns[None, :] != targets[:, None]",
        "columns[None, :] >= 0 * targets[:, None]",
    ),
    "padding counts": ("bits = tl.where((columns < vocabulary)[None, :], bits, -1e30)", "bits = bits"),
    "no slope of the cap": ("odds = odds * slopes", "odds = odds"),
    "no slope at the target": ("own_weight *= tl.load(target_slopes + row)", "own_weight *= 1"),
    "the moment without its logarithm": ("tl.sum(odds * bits, 1)", "tl.sum(odds, 1)"),
    "p in place of 1 - p": ("top * (total / (total + own)) * gain", "top * (own / (total + own)) * gain"),
    "the next row's hidden state": ("rows - 1) + first_row", "rows - 1) + first_row + 1"),
    "the first block's rows again": ("target_bits + first_row + in_block", "target_bits + in_block"),
}


@pytest.mark.parametrize("form", ["pointers"], indirect=True)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutated_formula_is_seen(mutant, monkeypatch, tmp_path):
    module = mutated(odds_triton, *MUTANTS[mutant], tmp_path)
    monkeypatch.setattr(fast, "odds_triton", module)
    inputs = make_inputs(NUM_ROWS, 127, WIDTH, torch.float32)
    with pytest.raises(AssertionError):
        assert_close(run(by_triton, *inputs, soft_cap=3.0), truth_of(*inputs, soft_cap=3.0))


FAR_MUTANTS = {
    "sums that are not rescaled": ("total = total * decay", "total = total"),
    "moments that are not rescaled": ("* total) * decay +", "* total) +"),
    "moments against the old maximum": ("(moment + (maximum - top) * total)", "moment"),
    "products that are not rescaled": ("product = product * decay", "product = product"),
    "the last column again for padding": ("bits = tl.where(column < vocabulary, bits, -1e30)", "bits = bits"),
    "no slope of the cap": ("(share * slopes)[:, None]", "share[:, None]"),
    "another row's hidden state": ("left = tl.load(hidden + row *", "left = tl.load(hidden + 0 *"),
    "rows that lie between are left out": ("in range(first, num_rows, step)", "in range(first, num_rows, 2 * step)"),
    "rows in reach too": (">= limit", "> 0 * limit"),
    "never": (">= limit", "> float('inf')"),
}


@pytest.mark.parametrize("mutant", FAR_MUTANTS)
def test_a_mutated_formula_of_rows_out_of_reach_is_seen(mutant, far_inputs, monkeypatch, tmp_path):
    module = mutated(odds_triton, *FAR_MUTANTS[mutant], tmp_path)
    monkeypatch.setattr(fast, "odds_triton", module)
    hidden, weight, target_ids = far_inputs
    weight[299] = -0.9 * weight[target_ids[39]]  # near the largest logit where all is far
    hidden[0] = 14 * weight[target_ids[0]] / weight[target_ids[0]].square().sum()  # log p that a plain sum makes 0
    inputs = hidden, weight, target_ids
    truth = truth_of(*inputs, **FAR["capped"])
    with pytest.raises(AssertionError):
        mine = run(by_triton, *inputs, **FAR["capped"])
        assert_close(mine, truth)
        torch.testing.assert_close(mine[0][0], truth[0][0].float(), rtol=1e-4, atol=0)
