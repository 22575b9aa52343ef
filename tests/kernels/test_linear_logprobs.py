"""linear_logprobs against the naive formula in float64, which holds [N, V] and is the only truth here.

In every random batch half of the rows are peaked (the target has nearly all of the mass, or nearly none).
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reasoner.kernels import linear_logprobs as module
from reasoner.kernels.linear_logprobs import linear_logprobs

SHAPES = [
    {},
    {"temperature": 0.6},
    {"logit_scale": 0.0625},
    {"soft_cap": 3.0},
    {"temperature": 1.7, "soft_cap": 3.0, "logit_scale": 0.5},
]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def naive(hidden, head_weight, target_ids, temperature=1.0, soft_cap=None, logit_scale=1.0):
    logits = logit_scale * hidden @ head_weight.T
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    logp = torch.log_softmax(logits / temperature, dim=1)
    return logp.gather(1, target_ids[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def make_inputs(num_rows: int, vocabulary: int, width: int = 8, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    head_weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    hidden = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    target_ids = torch.randint(vocabulary, (num_rows,), generator=generator)
    toward = head_weight[target_ids] / head_weight[target_ids].square().sum(1, keepdim=True)
    hidden[0::4] += 20 * toward[0::4]  # p near 1
    hidden[1::4] -= 15 * toward[1::4]  # p near 0
    return hidden.to(dtype), head_weight.to(dtype), target_ids


def upstream(num_rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, num_rows, generator=torch.Generator().manual_seed(7), dtype=torch.float64).unbind()


def run(function, hidden, head_weight, target_ids, **shape) -> dict[str, Tensor]:
    """Values and gradients, for a random upstream gradient a row at logprobs and at entropy."""
    hidden, head_weight = hidden.detach().requires_grad_(), head_weight.detach().requires_grad_()
    out = function(hidden, head_weight, target_ids, **shape)
    logprobs, entropy = (out.logprobs, out.entropy) if isinstance(out, module.Logprobs) else out
    to_logprobs, to_entropy = upstream(len(target_ids))
    ((to_logprobs * logprobs).sum() + (to_entropy * entropy).sum()).backward()
    return {"logprobs": logprobs, "entropy": entropy, "d_hidden": hidden.grad, "d_head_weight": head_weight.grad}


def assert_same(mine: dict[str, Tensor], truth: dict[str, Tensor], **tolerance: float) -> None:
    for name, expected in truth.items():
        torch.testing.assert_close(
            mine[name].double(), expected.double(), msg=lambda m, name=name: f"{name}: {m}", **tolerance
        )


@pytest.fixture(params=["full tiles", "tiny tiles"])
def tiles(request, monkeypatch):
    if request.param == "tiny tiles":
        monkeypatch.setattr(module, "TILE_COLUMNS", 5)
        monkeypatch.setattr(module, "TILE_ELEMENTS", 15)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 5, 127, 129, 512])  # H2: a padded last tile must not count
@pytest.mark.usefixtures("tiles")
def test_h2_h5_equals_the_naive_formula(vocabulary, shape):
    inputs = make_inputs(10, vocabulary)
    assert_same(run(linear_logprobs, *inputs, **shape), run(naive, *inputs, **shape), **EXACT)


def test_equals_the_naive_formula_over_several_real_tiles():
    inputs = make_inputs(530, 2 * module.TILE_COLUMNS + 3, width=4)
    assert module.TILE_ELEMENTS // module.TILE_COLUMNS < 530
    assert_same(run(linear_logprobs, *inputs, temperature=0.8), run(naive, *inputs, temperature=0.8), **EXACT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("tiles")
def test_gradcheck(shape):
    hidden, head_weight, target_ids = make_inputs(6, 11, width=3)

    def function(hidden, head_weight):
        out = linear_logprobs(hidden, head_weight, target_ids, **shape)
        return out.logprobs, out.entropy

    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), head_weight.requires_grad_()))


def without_slope(hidden, head_weight, target_ids, temperature, soft_cap, logit_scale):
    logits = logit_scale * hidden @ head_weight.T
    logits = logits + (soft_cap * torch.tanh(logits / soft_cap) - logits).detach()
    logp = torch.log_softmax(logits / temperature, dim=1)
    return logp.gather(1, target_ids[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def with_padding(hidden, head_weight, target_ids, **shape):
    return naive(hidden, torch.cat([head_weight, head_weight.new_zeros(3, head_weight.shape[1])]), target_ids, **shape)


MUTANTS = {
    "temperature dropped (C1)": lambda h, w, y, temperature, **kw: naive(h, w, y, **kw),
    "logprobs / T (C1)": lambda h, w, y, temperature, **kw: tuple(x / temperature for x in naive(h, w, y, **kw)),
    "T before the cap (H5)": lambda h, w, y, temperature, logit_scale, **kw: naive(
        h, w, y, logit_scale=logit_scale / temperature, **kw
    ),
    "cap dropped (H5)": lambda h, w, y, soft_cap, **kw: naive(h, w, y, **kw),
    "slope of the cap dropped (H5)": without_slope,
    "scale dropped (H5)": lambda h, w, y, logit_scale, **kw: naive(h, w, y, **kw),
    "shifted by one (B3)": lambda h, w, y, **kw: naive(h, w, y.roll(1), **kw),
    "padding columns read as 0 (H2)": with_padding,
    "entropy's gradient dropped": lambda h, w, y, **kw: (lambda out: (out[0], out[1].detach()))(naive(h, w, y, **kw)),
    "head's gradient dropped": lambda h, w, y, **kw: naive(h, w.detach() + 0 * w, y, **kw),
    "rounded to bfloat16 (C20)": lambda h, w, y, **kw: tuple(x.bfloat16().double() for x in naive(h, w, y, **kw)),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mutated_formula_is_seen(mutant):
    inputs, shape = make_inputs(12, 19), {"temperature": 1.7, "soft_cap": 3.0, "logit_scale": 0.5}
    with pytest.raises(AssertionError, match=r"logprobs|entropy|d_hidden|d_head_weight"):
        assert_same(run(mutant, *inputs, **shape), run(linear_logprobs, *inputs, **shape), rtol=1e-3, atol=1e-4)


def test_b3_c1_hand_logits():
    """With head_weight = 1 hidden is the logits. Row 0: p = 1/8, 2/8, 5/8; at T = 0.5 p = 1/30, 4/30, 25/30."""
    hidden = torch.tensor([[math.log(1), math.log(2), math.log(5)], [0, 0, 50]], dtype=torch.float64)
    out = linear_logprobs(hidden, torch.eye(3, dtype=torch.float64), torch.tensor([1, 0]))
    assert out.logprobs.tolist() == pytest.approx([math.log(2 / 8), -50], abs=1e-12)
    assert out.entropy[0].item() == pytest.approx(-sum(p / 8 * math.log(p / 8) for p in (1, 2, 5)), abs=1e-12)
    out = linear_logprobs(hidden, torch.eye(3, dtype=torch.float64), torch.tensor([1, 2]), temperature=0.5)
    assert out.logprobs.tolist() == pytest.approx([math.log(4 / 30), 0], abs=1e-12)
    assert out.entropy[0].item() == pytest.approx(-sum(p / 30 * math.log(p / 30) for p in (1, 4, 25)), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.usefixtures("tiles")
def test_c20_h6_half_inputs_are_summed_in_float32(dtype):
    """At most four times the error of the naive formula in float32, and for a gradient one rounding to its dtype."""
    hidden, head_weight, target_ids = make_inputs(16, 300, width=32, dtype=dtype)
    shape = {"temperature": 0.7, "soft_cap": 30.0}
    truth = run(naive, hidden.double(), head_weight.double(), target_ids, **shape)
    plain = run(naive, hidden.float(), head_weight.float(), target_ids, **shape)
    mine = run(linear_logprobs, hidden, head_weight, target_ids, **shape)
    for name, expected in truth.items():
        gradient = name.startswith("d_")
        assert mine[name].dtype == (dtype if gradient else torch.float32)
        error, allowed = (mine[name] - expected).abs().max(), 4 * (plain[name] - expected).abs().max()
        assert error <= allowed + torch.finfo(dtype if gradient else torch.float32).eps * expected.abs().max(), name


def test_c20_no_bfloat16_sum_and_no_float16_overflow():
    ones = torch.ones(1, 1024, dtype=torch.bfloat16)  # a bfloat16 sum of ones stops at 256
    out = linear_logprobs(ones, torch.cat([ones, 0 * ones]), torch.tensor([1]), temperature=1024)
    assert out.logprobs.item() == pytest.approx(-math.log1p(math.e), rel=1e-6)
    big = torch.full((1, 1), 300, dtype=torch.float16)  # 90,000 is inf in float16
    out = linear_logprobs(big, torch.cat([big, 0 * big]), torch.tensor([0]), temperature=90_000)
    assert out.logprobs.item() == pytest.approx(-math.log1p(1 / math.e), rel=1e-6)


def test_c20_autocast_does_not_reach_the_head():
    inputs = make_inputs(8, 50, dtype=torch.float32)
    truth = run(linear_logprobs, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mine = run(linear_logprobs, *inputs)
    assert all(torch.equal(mine[name], truth[name]) for name in truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_h3_large_gaps_stay_finite(dtype):
    """Gap 200 at T = 0.5: logp -400, gradient of hidden (w_target - w_max) / T."""
    hidden = torch.tensor([[200.0, 0.0], [1e4, 0.0], [0.0, 200.0]], dtype=dtype, requires_grad=True)
    out = linear_logprobs(hidden, torch.eye(2, dtype=dtype), torch.tensor([1, 1, 1]), temperature=0.5)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert out.logprobs.tolist() == pytest.approx([-400, -20_000 + 20_000 - float(hidden[1, 0].detach()) / 0.5, 0])
    assert out.entropy.tolist() == pytest.approx([0, 0, 0], abs=1e-30)
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[-2, 2], [-2, 2], [0, 0]]


def test_confident_rows_keep_their_relative_precision():
    """p = 1 - e^-30: float32's log_softmax says 0 here, and its gradient (1 - p) is 0 too."""
    hidden = torch.tensor([[30.0, 0.0], [0.0, 0.0]], requires_grad=True)
    out = linear_logprobs(hidden, torch.eye(2), torch.tensor([0, 0]))
    out.logprobs.sum().backward()
    tiny = math.exp(-30)
    assert out.logprobs.tolist() == pytest.approx([-tiny, -math.log(2)], rel=1e-5)
    assert out.entropy.tolist() == pytest.approx([31 * tiny, math.log(2)], rel=1e-5)
    assert hidden.grad is not None
    assert hidden.grad[0].tolist() == pytest.approx([tiny, -tiny], rel=1e-5)


def test_h4_upstream_gradients_are_honoured():
    hidden, head_weight, target_ids = make_inputs(10, 23)

    def grads(loss_of, **needs):
        h, w = (
            hidden.clone().requires_grad_(needs.get("h", True)),
            head_weight.clone().requires_grad_(needs.get("w", True)),
        )
        loss_of(linear_logprobs(h, w, target_ids)).backward()
        return h.grad, w.grad

    one, two = grads(lambda out: out.logprobs.sum()), grads(lambda out: 2 * out.logprobs.sum())
    assert all(torch.equal(2 * a, b) for a, b in zip(one, two, strict=True))
    entropy_only = grads(lambda out: out.entropy.sum())
    both = grads(lambda out: out.entropy.sum() + out.logprobs.sum())
    for a, b, c in zip(one, entropy_only, both, strict=True):
        torch.testing.assert_close(a + b, c, **EXACT)
    frozen_head, frozen_hidden = (
        grads(lambda out: out.logprobs.sum(), w=False),
        grads(lambda out: out.logprobs.sum(), h=False),
    )
    assert frozen_head[1] is None
    assert torch.equal(frozen_head[0], one[0])
    assert frozen_hidden[0] is None
    assert torch.equal(frozen_hidden[1], one[1])


def test_h4_h6_backward_twice_and_run_twice_give_the_same_bits():
    inputs = make_inputs(40, 501, dtype=torch.float32)
    first, second = run(linear_logprobs, *inputs), run(linear_logprobs, *inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    hidden = inputs[0].clone().requires_grad_()
    out = linear_logprobs(hidden, *inputs[1:])
    loss = out.logprobs.sum() + out.entropy.sum()
    loss.backward(retain_graph=True)
    assert hidden.grad is not None
    once = hidden.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * once)


def test_second_derivatives_are_refused():
    hidden, head_weight, target_ids = make_inputs(4, 9)
    hidden.requires_grad_()
    out = linear_logprobs(hidden, head_weight, target_ids)
    (grad,) = torch.autograd.grad(out.logprobs.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_h7_strided_sliced_and_transposed_inputs_are_exact():
    """Small whole numbers: the matmuls are exact whatever their order, so the results must be equal bit by bit."""
    generator = torch.Generator().manual_seed(0)
    big = torch.randint(-3, 4, (60, 40), generator=generator).double()
    ids = torch.randint(31, (40,), generator=generator)
    views = {
        "row-selected": (big[torch.arange(60) % 3 == 0][:20, :7], big[:31, :7], ids[:20]),
        "sliced": (big[1:41:2, 3:38:5], big[5:36, 2:9], ids[::2]),
        "transposed": (big[:7, :20].T, big[:7, 9:40].T, ids.flip(0)[20:]),
        "expanded": (big[:1, :7].expand(20, 7), big[:31, :7], ids[:1].expand(20)),
    }
    for name, (hidden, head_weight, target_ids) in views.items():
        mine = run(linear_logprobs, hidden, head_weight, target_ids)
        plain = run(
            linear_logprobs,
            *(x.clone(memory_format=torch.contiguous_format) for x in (hidden, head_weight, target_ids)),
        )
        assert torch.equal(mine["logprobs"], plain["logprobs"]), name
        assert torch.equal(mine["entropy"], plain["entropy"]), name
        assert_same(mine, run(naive, hidden, head_weight, target_ids), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_h7_no_rows(dtype):
    hidden, head_weight = (
        torch.zeros(0, 4, dtype=dtype, requires_grad=True),
        torch.ones(9, 4, dtype=dtype, requires_grad=True),
    )
    out = linear_logprobs(hidden, head_weight, torch.zeros(0, dtype=torch.int64))
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert out.logprobs.shape == out.entropy.shape == (0,)
    assert out.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert hidden.grad is not None and hidden.grad.shape == (0, 4)
    assert head_weight.grad is not None and torch.equal(head_weight.grad, torch.zeros_like(head_weight))


@pytest.mark.parametrize("bad", [-100, -1, 9, 151_936])
def test_h7_targets_outside_the_vocabulary_are_refused_before_any_work(bad):
    """A head of 2^40 columns, in no memory: touching it would end the test."""
    hidden, head_weight = torch.zeros(1).expand(3, 2**40), torch.zeros(1).expand(9, 2**40)
    with pytest.raises(ValueError, match=rf"0\.\.8, not .*{bad}"):
        linear_logprobs(hidden, head_weight, torch.tensor([0, bad, 8]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": math.nan}, "temperature=nan must be above 0"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0 must be above 0"),
        ({"logit_scale": math.inf}, "logit_scale=inf must be finite"),
        ({"hidden": torch.zeros(1, 2, 3)}, r"expects hidden \[N, D\]"),
        ({"hidden": torch.zeros(2, 4)}, "N and D must agree"),
        ({"hidden": torch.zeros(5, 3)}, "N and D must agree"),
        ({"head_weight": torch.zeros(0, 3)}, "V be at least 1"),
        ({"hidden": torch.zeros(2, 3, dtype=torch.int64)}, "expects floating"),
        ({"target_ids": torch.zeros(2, dtype=torch.int32)}, "int64 target_ids"),
        ({"head_weight": torch.zeros(4, 3, device="meta")}, "different devices"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {
        "hidden": torch.zeros(2, 3),
        "head_weight": torch.zeros(4, 3),
        "target_ids": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**{**arguments, **change})


MEASURE = """
import resource, sys
import torch
from reasoner.kernels.linear_logprobs import linear_logprobs

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

def naive(hidden, head_weight, target_ids):
    logp = (hidden @ head_weight.T).log_softmax(1)
    return logp.gather(1, target_ids[:, None]).sum() - (logp.exp() * logp).sum()

def lean(hidden, head_weight, target_ids):
    out = linear_logprobs(hidden, head_weight, target_ids)
    return out.logprobs.sum() + out.entropy.sum()

def inputs(num_rows, vocabulary, width):
    hidden = torch.randn(num_rows, width, requires_grad=True)
    return hidden, torch.randn(vocabulary, width), torch.randint(vocabulary, (num_rows,))

function = {"naive": naive, "lean": lean}[sys.argv[1]]
function(*inputs(2, 9, 4)).backward()  # loads what torch loads late
hidden, head_weight, target_ids = inputs(*map(int, sys.argv[2:]))
before = status("VmRSS")
try:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    peak = lambda: status("VmHWM")
except OSError:
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # since the start: at least the true one
function(hidden, head_weight, target_ids).backward()
print(peak() - before - hidden.grad.nbytes)
"""


def extra_share(function: str, num_rows: int, vocabulary: int, width: int) -> float:
    """Peak extra memory of forward and backward as a share of the full float32 logits."""
    command = [sys.executable, "-c", MEASURE, function, str(num_rows), str(vocabulary), str(width)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    return int(done.stdout) / (4 * num_rows * vocabulary)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident set is read from /proc")
def test_peak_extra_memory_is_under_5_percent_of_the_logits():
    assert extra_share("lean", 4096, 151_936, 64) < 0.05
    assert extra_share("naive", 512, 151_936, 64) > 1  # the measure sees the logits
