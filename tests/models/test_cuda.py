"""On a real card: the fused variable-length attention and the portable path against float32 on the CPU; dtypes."""

import copy
from pathlib import Path

import pytest
import torch

from reasoner import config
from reasoner.models import attention
from reasoner.models.attention import Layout
from reasoner.models.loading import load_model, load_tokenizer
from reasoner.models.policy import Policy
from reasoner.models.sharing import Places
from tests.models.test_sharing import learnt, shared_batch, unshared
from tests.models.tiny_models import Batch, lora_of, make_batch, make_model, make_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def to_cuda(policy: Policy, dtype: torch.dtype) -> Policy:
    return Policy(copy.deepcopy(policy.model).to("cuda", dtype), policy.family, revision=None)


def run(policy: Policy, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs, and the gradient of the first projection's A."""
    there = Batch(
        batch.token_ids.to(policy.device),
        Layout.of(batch.layout.lengths, policy.device, shared=batch.layout.shared),
        batch.completion_mask.to(policy.device),
    )
    found = policy.logprobs(there, temperature=1.0).logprobs
    first = next(iter(policy.trainable().values()))
    (gradient,) = torch.autograd.grad(found.sum(), [first])
    return found.detach().cpu(), gradient.float().cpu()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "gemma3_text"])
def test_bf16_on_the_card_errs_like_bf16_and_not_like_a_leak(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, batch = (
        make_policy(family, lora=lora_of(family), head_dim=16),
        make_batch((1, 7, 300, 1, 64, 120, 40), high=60),
    )
    policy.base.config.max_position_embeddings = 512
    truth, truth_gradient = run(policy, batch)
    calls: list[int] = []
    varlen = attention._varlen
    monkeypatch.setattr(attention, "_varlen", lambda *a: calls.append(1) or varlen(*a))
    fused, fused_gradient = run(to_cuda(policy, torch.bfloat16), batch)
    assert bool(calls) == (family != "gemma2")
    monkeypatch.setattr(attention, "varlen_supported", lambda *_: False)
    portable, portable_gradient = run(to_cuda(policy, torch.bfloat16), batch)
    for ours, twin, true in ((fused, portable, truth), (fused_gradient, portable_gradient, truth_gradient)):
        cost = (twin - true).square().mean().sqrt()
        error = (ours - true).square().mean().sqrt()
        assert error <= 1.5 * cost + 1e-3 * true.abs().max()
        assert cost < 0.15 * true.square().mean().sqrt()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "cohere", "granite"])
def test_float32_on_the_card_is_float32_on_the_cpu(family: str) -> None:
    policy, batch = make_policy(family, lora=lora_of(family)), make_batch()
    for ours, true in zip(run(to_cuda(policy, torch.float32), batch), run(policy, batch), strict=True):
        torch.testing.assert_close(ours, true, atol=2e-4, rtol=2e-4)


def test_c18_two_passes_on_the_card_give_the_same_bits() -> None:
    policy, batch = to_cuda(make_policy("llama", lora=lora_of("llama")), torch.bfloat16), make_batch()
    first, second = run(policy, batch)[0], run(policy, batch)[0]
    assert torch.equal(first, second)


# Prompts longer than a window of 5, of one token and of a kernel's tile; a group of one, completions of one token.
SHARED = shared_batch(((140, (200, 1, 64, 130)), (1, (33, 7)), (128, (128, 256)), (60, (40,)), (3, (300, 2, 1))))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "gemma3_text"])
def test_c22_shared_prompts_in_bf16_err_like_bf16(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused and portable attention, against every sequence with its own copy in float32 and in bf16."""
    policy = make_policy(family, lora=lora_of(family), head_dim=16, max_position_embeddings=512)
    truth, twin = run(policy, unshared(SHARED)), run(to_cuda(policy, torch.bfloat16), unshared(SHARED))
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(attention, "varlen_supported", lambda *_: False)
        for ours, other, true in zip(run(to_cuda(policy, torch.bfloat16), SHARED), twin, truth, strict=True):
            cost = (other - true).square().mean().sqrt()
            assert (ours - true).square().mean().sqrt() <= 1.5 * cost + 1e-3 * true.abs().max()
            assert cost < 0.15 * true.square().mean().sqrt()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_c22_shared_prompts_in_float32_on_the_card_are_those_without_sharing_on_the_cpu(family: str) -> None:
    policy = make_policy(family, lora=lora_of(family), max_position_embeddings=512)
    for ours, true in zip(run(to_cuda(policy, torch.float32), SHARED), run(policy, unshared(SHARED)), strict=True):
        torch.testing.assert_close(ours, true, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_c18_two_passes_of_shared_prompts_on_the_card_give_the_same_bits(family: str) -> None:
    """Gradients under the plain formula: the fused kernel's own backward adds what several blocks say of a query in any
    order, prompts shared or not."""
    policy = to_cuda(make_policy(family, lora=lora_of(family), max_position_embeddings=512), torch.bfloat16)
    layout = Layout.of(SHARED.layout.lengths, "cuda", shared=SHARED.layout.shared)
    there = Batch(SHARED.token_ids.cuda(), layout, SHARED.completion_mask.cuda())
    (first, its_gradients), (second, other) = learnt(policy, there), learnt(policy, there)
    assert torch.equal(first.logprobs, second.logprobs) and torch.equal(first.entropy, second.entropy)
    if family == "gemma2":
        assert all(torch.equal(gradient, other[name]) for name, gradient in its_gradients.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copies_gradients_are_summed_once_and_in_one_order(dtype: torch.dtype) -> None:
    """Sixteen takers a row, values whose sum in another order or in 16 bits is another."""
    places = Places.of(torch.arange(16 * 512, device="cuda") % 512, 512)
    draws = torch.Generator("cuda").manual_seed(0)
    each = torch.randn(16 * 512, 2, 128, generator=draws, device="cuda").exp2().mul(100).to(dtype)
    x = torch.zeros(512, 2, 128, device="cuda", dtype=dtype, requires_grad=True)
    found = [torch.autograd.grad(places.take(x), x, each)[0] for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    truth = each.double().view(16, 512, 2, 128).sum(0)
    rounding = torch.finfo(dtype).eps * (0.51 if dtype == torch.bfloat16 else 8)
    assert ((found[0].double() - truth).abs() <= rounding * truth).all()


def test_auto_is_bf16_under_an_adapter_and_float32_for_weights_that_learn(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    letters = config.Scratch(characters="".join(chr(code) for code in range(40, 100)))
    load_tokenizer(config.Model(name="letters", scratch=letters)).save_pretrained(tmp_path)
    for lora, dtype in ((lora_of("llama"), torch.bfloat16), (None, torch.float32)):
        model = config.Model(name=str(tmp_path), lora=lora)
        torch.cuda.manual_seed(3)
        before = torch.cuda.get_rng_state()
        policy = load_model(model, load_tokenizer(model), seed=0)
        assert torch.equal(torch.cuda.get_rng_state(), before)
        assert policy.device.type == "cuda" and policy.head_weight.dtype == dtype
        assert {weight.dtype for weight in policy.trainable().values()} == {torch.float32}
        assert {weight.device.type for weight in policy.model.parameters()} == {"cuda"}
