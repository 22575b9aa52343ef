"""Norms, rotary positions and gated activations in Triton's interpreter, on a CPU, alone and in whole models.

test_without_a_card.py runs this file in a process of its own, with TRITON_INTERPRET=1. Left out: bfloat16 against
float64, which the interpreter doesn't sum and round as a card does.
"""

import pytest
import torch
from triton import knobs

from reasoner.kernels import elementwise, elementwise_triton
from reasoner.models import loading
from reasoner.models.families import FAMILIES
from reasoner.models.fused import fuse
from reasoner.models.policy import Policy
from tests.kernels import elementwise_cases as cases
from tests.kernels.mutants import mutated
from tests.models.tiny_models import gradients, lora_of, make_batch, make_policy

assert knobs.runtime.interpret, "set TRITON_INTERPRET=1 before this process starts"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in:RuntimeWarning")  # exp, whose inverse is then 0
DTYPES = [torch.float32, torch.float16]
FUSED = [name for name, row in FAMILIES.items() if row.fused]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("added", "one_plus"), [(False, False), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 3), (33, 64), (130, 96), (3, 5003)], ids=str)
def test_norms(num_rows, width, added, one_plus, dtype):
    cases.check_norm("cpu", dtype, num_rows, width, added=added, one_plus=one_plus)


def test_a_norm_of_transposed_heads():
    cases.check_norm_of_heads("cpu", torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width", "turned", "joined"),
    [(1, 1, 1, 2, 2, False), (67, 12, 2, 128, 128, False), (50, 3, 3, 24, 18, True), (41, 7, 1, 80, 80, True)],
    ids=str,
)
def test_rotary_positions(tokens, heads, kv_heads, width, turned, joined, dtype):
    cases.check_rotate("cpu", dtype, tokens, heads, kv_heads, width, turned=turned, joined=joined)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("halves", [False, True], ids=["two", "halves"])
@pytest.mark.parametrize("tanh", [False, True], ids=["silu", "gelu"])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 3), (5, 1100), (2, 1024)], ids=str)
def test_gated_activations(num_rows, width, tanh, halves, dtype):
    for overwrite in (False, True):
        cases.check_gated("cpu", dtype, num_rows, width, tanh=tanh, halves=halves, overwrite=overwrite)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("halves", [False, True], ids=["two", "halves"])
@pytest.mark.parametrize(("num_rows", "width", "tanh"), [(1, 3, False), (5, 1100, True), (2, 1024, False)], ids=str)
def test_the_product_again_on_the_way_back(num_rows, width, tanh, halves, dtype):
    cases.check_gated_backward("cpu", dtype, num_rows, width, tanh=tanh, halves=halves)


def test_h4_backward_twice_doubled_and_of_one_output_alone():
    x, residual, weight = (*torch.randn(2, 4, 8), torch.ones(8))
    x.requires_grad_(), residual.requires_grad_()
    total, out = elementwise_triton.add_norm(x, residual, weight, 1e-6)
    (one,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (doubled,) = torch.autograd.grad(2 * out.sum(), residual, retain_graph=True)
    (sums,) = torch.autograd.grad(total.sum(), x, retain_graph=True)
    (both,) = torch.autograd.grad(out.sum() + total.sum(), x)
    assert torch.equal(2 * one, doubled) and torch.equal(sums, torch.ones_like(x))
    torch.testing.assert_close(both, one + 1)


def test_h4_a_second_backward_over_gradients_that_were_overwritten_raises():
    gate, up = (torch.randn(3, 8).requires_grad_() for _ in range(2))
    loss = elementwise_triton.gated(gate * 1, up * 1, tanh=False, overwrite=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def counted(monkeypatch) -> list[str]:
    """From here on the kernels take everything; the names of the operations that they do."""
    calls: list[str] = []
    for name in ("norm", "add_norm", "rotate", "gated", "gated_product", "gated_backward"):
        function = getattr(elementwise_triton, name)
        monkeypatch.setattr(
            elementwise_triton,
            name,
            lambda *a, name=name, function=function, **k: calls.append(name) or function(*a, **k),
        )
    monkeypatch.setattr(elementwise, "supported", lambda *tensors: True)
    for name in ("PREFER_NORM", "PREFER_ROTARY", "PREFER_GATED"):
        monkeypatch.setattr(elementwise, name, True)
    return calls


def vary_norms(policy: Policy) -> None:
    """A norm's weight is 1 or 0 where a model begins; here each is its own."""
    draws = torch.Generator().manual_seed(3)
    for name, weight in policy.base.named_parameters():
        if "norm" in name:
            weight.data += 0.5 * torch.randn(weight.shape, generator=draws)


def numbers(policy: Policy) -> list[torch.Tensor]:
    found = policy.logprobs(make_batch(), temperature=1.0).logprobs
    return [found.detach(), *gradients(policy, found.sum()).values()]


@pytest.mark.parametrize(("family", "recomputed"), [(name, name in ("llama", "gemma2")) for name in FUSED])
def test_a_fused_model_is_the_plain_one(family, recomputed, monkeypatch):
    policy = make_policy(family, lora=lora_of(family), **({"partial_rotary_factor": 0.5} if family == "phi3" else {}))
    vary_norms(policy)
    plain = numbers(policy)
    keys = policy.model.state_dict().keys()
    layers = 2
    assert fuse(policy.base, family) == layers * 3 + sum("norm.weight" in key for key in keys)
    assert policy.model.state_dict().keys() == keys and fuse(policy.base, family) == 0
    assert all(torch.equal(one, other) for one, other in zip(numbers(policy), plain, strict=True))
    if recomputed:
        loading.recompute_layers(policy.base, family)
        policy.train_mode(dropout=False)
    calls = counted(monkeypatch)
    found = numbers(policy)
    heads = 2 * any("q_norm" in key for key in keys)
    expected = {
        "rotate": layers,
        "gated_product": layers,
        "gated_backward": layers,
        "add_norm": 2 * layers,
        "norm": (2 * family.startswith("gemma") + heads) * layers,
    }
    times = {name: calls.count(name) for name in expected}
    once = {"gated_backward"} if family.startswith("gemma") else {"gated_backward", "gated_product"}
    last = 1
    assert times == {
        name: number + number // layers * (recomputed and name not in once) + last * (name == "norm")
        for name, number in expected.items()
    } and len(calls) == sum(times.values())
    for one, other in zip(found, plain, strict=True):
        assert float((one - other).norm()) <= 2e-5 * float(other.norm())


def test_what_kernels_do_not_take_is_transformers_own(monkeypatch):
    """A norm that is trained, a cache, and an operation that was not measured."""
    policy = make_policy("llama")
    fuse(policy.base, "llama")
    calls = counted(monkeypatch)
    policy.logprobs(make_batch(), temperature=1.0)
    assert set(calls) == {"rotate", "gated", "gated_product"}
    monkeypatch.setattr(elementwise, "PREFER_GATED", False)
    calls.clear()
    ends = torch.tensor([0, 3], dtype=torch.int32)
    layer, angles = policy.base.model.layers[0].self_attn, (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="past_key_values"):
        layer(torch.zeros(1, 3, 32), angles, past_key_values=object(), cu_seq_lens_q=ends)
    calls.clear()
    policy.base.set_attn_implementation("sdpa")
    with torch.no_grad():
        policy.base.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert not calls


MUTANTS = {
    "a sum over the tile's width": ("tl.sum(value * value, 1) / WIDTH", "tl.sum(value * value, 1) / BLOCK"),
    "a tenth of eps": ("/ WIDTH + eps)", "/ WIDTH + 0.1 * eps)"),
    "weight in place of 1 + weight": ("        factor += 1\n    result", "        factor += 0\n    result"),
    "1 + weight forgotten on the way back": ("        factor += 1\n    normed", "        factor += 0\n    normed"),
    "no projection": ("- normed * along[:, None]", "- 0 * along[:, None]"),
    "the sum's gradient left out": ("result += tl.load(d_total", "result += 0 * tl.load(d_total"),
    "back by the same angles": ("sine = -sine", "sine = sine"),
    "pairs side by side": ("source_row + HALF + column", "source_row + 1 + column"),
    "the angle of the next token": ("angle = token[:, None]", "angle = (token[:, None] + 1) % tokens"),
    "the rest is lost": ("tl.load(source_row + rest, mask=there)", "0 * tl.load(source_row + rest, mask=there)"),
    "silu's slope without its second term": ("sigmoid + active * (1 - sigmoid) * slope", "sigmoid"),
    "a slope of 1 in gelu": ("(1 + 0.134145 * square)", "(1 + 0.044715 * square)"),
    "gelu's cube left out": ("gate * (1 + 0.044715 * square)", "gate * 1"),
    "up and gate exchanged": ("(gradient * active)", "(gradient * factor)"),
    "the product in another order": ("(active * factor).to(d_out", "(value * (sigmoid * factor)).to(d_out"),
    "the gradient stays where the product belongs": ("(active * factor).to(d_out", "gradient.to(d_out"),
    "the first rows again": ("row = program // blocks\n", "row = program // blocks * 0\n"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutated_formula_is_seen(mutant, monkeypatch, tmp_path):
    module = mutated(elementwise_triton, *MUTANTS[mutant], tmp_path)
    monkeypatch.setattr(cases, "elementwise_triton", module)
    with pytest.raises(AssertionError):
        cases.check_everything_small("cpu", torch.float32)


def test_the_case_of_the_mutants_passes_without_one():
    cases.check_everything_small("cpu", torch.float32)
