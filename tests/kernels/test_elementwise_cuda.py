"""Norms, rotary positions and gated activations on a card, in every dtype, alone and in whole models of each family.

The kernels are forced on here, whatever a run prefers.
"""

import copy

import pytest
import torch

from reasoner.kernels import elementwise
from reasoner.models.attention import Layout
from reasoner.models.families import FAMILIES, family_of
from reasoner.models.policy import Policy
from tests.models.tiny_models import Batch, gradients, lora_of, make_batch, make_policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FUSED = [name for name, row in FAMILIES.items() if row.fused]


def prefer(wanted: bool, monkeypatch) -> None:
    for name in ("PREFER_NORM", "PREFER_ROTARY", "PREFER_GATED"):
        monkeypatch.setattr(elementwise, name, wanted)


@pytest.fixture
def cases():
    from tests.kernels import elementwise_cases  # imports triton

    return elementwise_cases


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("added", "one_plus"), [(False, False), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "width"),
    [(1, 3), (3000, 128), (1030, 896), (777, 1536), (300, 4096), (50, 8192), (5, 16_390)],
    ids=str,
)
def test_norms(num_rows, width, added, one_plus, dtype, cases):
    cases.check_norm("cuda", dtype, num_rows, width, added=added, one_plus=one_plus)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_of_transposed_heads(dtype, cases):
    cases.check_norm_of_heads("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width", "turned", "joined"),
    [
        (1, 1, 1, 2, 2, False),
        (2001, 12, 2, 128, 128, False),
        (1003, 24, 8, 128, 96, True),
        (501, 8, 4, 256, 256, False),
        (700, 9, 3, 64, 64, True),
        (333, 7, 1, 80, 54, True),
    ],
    ids=str,
)
def test_rotary_positions(tokens, heads, kv_heads, width, turned, joined, dtype, cases):
    cases.check_rotate("cuda", dtype, tokens, heads, kv_heads, width, turned=turned, joined=joined)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("overwrite", [False, True], ids=["kept", "overwritten"])
@pytest.mark.parametrize("halves", [False, True], ids=["two", "halves"])
@pytest.mark.parametrize("tanh", [False, True], ids=["silu", "gelu"])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 3), (301, 8960), (1001, 1003)], ids=str)
def test_gated_activations(num_rows, width, tanh, halves, overwrite, dtype, cases):
    cases.check_gated("cuda", dtype, num_rows, width, tanh=tanh, halves=halves, overwrite=overwrite)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("halves", [False, True], ids=["two", "halves"])
@pytest.mark.parametrize("tanh", [False, True], ids=["silu", "gelu"])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 3), (301, 8960), (1001, 1003)], ids=str)
def test_the_product_again_on_the_way_back(num_rows, width, tanh, halves, dtype, cases):
    cases.check_gated_backward("cuda", dtype, num_rows, width, tanh=tanh, halves=halves)


def test_twice_gives_the_same_bits():
    from reasoner.kernels import elementwise_triton as fast

    x, weight = (
        torch.randn(1, 3000, 1536, device="cuda", dtype=torch.bfloat16),
        torch.ones(1536, device="cuda").bfloat16(),
    )
    found = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        total, out = fast.add_norm(leaf, x, weight, 1e-6)
        fast.gated(total, out, tanh=True).square().sum().backward()
        found.append((out.detach(), leaf.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_h1_offsets_past_2_to_the_31():
    """Rows of 2^31 numbers and more together, and a row's end far from its beginning; only the last are looked at."""
    from reasoner.kernels import elementwise_triton as fast

    width, num_rows = 2048, (1 << 20) + 64
    x = torch.zeros(1, num_rows, width, device="cuda", dtype=torch.bfloat16)
    x[0, -64:] = torch.randn(64, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(fast.norm(x, weight, 1e-6)[:, -64:], fast.norm(x[:, -64:], weight, 1e-6))
        assert torch.equal(fast.gated(x, x, tanh=False)[:, -64:], fast.gated(x[:, -64:], x[:, -64:], tanh=False))
        angles = torch.randn(1, num_rows, 128, device="cuda", dtype=torch.bfloat16)
        far = fast.rotate(*(x.view(1, num_rows, 16, 128).transpose(1, 2) for _ in range(2)), angles, angles)[1]
        near = x[:, -64:].view(1, 64, 16, 128).transpose(1, 2)
        assert torch.equal(far[:, :, -64:], fast.rotate(near, near, angles[:, -64:], angles[:, -64:])[1])


def test_what_is_supported():
    x = torch.zeros(2, 4, device="cuda", dtype=torch.bfloat16)
    assert elementwise.supported(x, x)
    assert not elementwise.supported(x, x.float())
    assert not elementwise.supported(x[:0])
    assert not elementwise.supported(x.double())
    assert not elementwise.supported(x.cpu())


def numbers(policy: Policy, batch: Batch) -> list[torch.Tensor]:
    """Logprobs, then the gradient of every A and B, in float64."""
    there = Batch(
        batch.token_ids.to(policy.device),
        Layout.of(batch.layout.lengths, policy.device),
        batch.completion_mask.to(policy.device),
    )
    found = policy.logprobs(there, temperature=1.0).logprobs
    return [one.double().cpu() for one in (found.detach(), *gradients(policy, found.sum()).values())]


def error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> tuple[float, float]:
    """Relative, of the logprobs and of all gradients together."""
    parts = [torch.cat([one.flatten() for one in side]) for side in (found[1:], truth[1:])]
    return (
        float((found[0] - truth[0]).norm() / truth[0].norm()),
        float((parts[0] - parts[1]).norm() / parts[1].norm()),
    )


SEEDS = 12  # of one model the two paths' errors differ by chance


@pytest.mark.parametrize("family", FUSED)
def test_a_model_with_kernels_errs_like_the_plain_one(family, monkeypatch):
    sums = {"plain": [0.0, 0.0], "fused": [0.0, 0.0]}
    for seed in range(SEEDS):
        policy = make_policy(
            family, lora=lora_of(family), head_dim=16, hidden_size=64, intermediate_size=136, seed=seed
        )
        batch = make_batch((1, 7, 63, 1, 50, 33), seed=seed, high=60)
        policy.model.to(torch.bfloat16)
        there = Policy(copy.deepcopy(policy.model).to("cuda"), policy.family, revision=None)
        policy.model.to(torch.float32)  # of the rounded weights
        truth = numbers(policy, batch)
        prefer(False, monkeypatch)
        plain = numbers(there, batch)
        prefer(True, monkeypatch)
        fused = numbers(there, batch)
        assert not torch.equal(fused[0], plain[0])
        for name, found in (("plain", plain), ("fused", fused)):
            for place, one in enumerate(error(found, truth)):
                sums[name][place] += one**2
    for ours, theirs in zip(sums["fused"], sums["plain"], strict=True):
        assert theirs > 0 and ours**0.5 <= 1.25 * theirs**0.5, f"{(ours / theirs) ** 0.5:.2f} times the plain error"


@pytest.mark.parametrize("family", FUSED)
def test_a_model_with_kernels_in_float32_is_the_plain_one(family, monkeypatch):
    policy = make_policy(family, lora=lora_of(family))
    batch = make_batch()
    truth = numbers(policy, batch)
    there = Policy(copy.deepcopy(policy.model).to("cuda"), policy.family, revision=None)
    prefer(True, monkeypatch)
    assert max(error(numbers(there, batch), truth)) < 2e-4


def test_a_family_without_kernels_says_so_where_they_are_used(monkeypatch):
    policies = {name: make_policy(name).model.to("cuda") for name in ("llama", "cohere")}
    for wanted in (False, True):
        prefer(wanted, monkeypatch)
        notes = {name: Policy(model, family_of(model.config), revision=None).notes for name, model in policies.items()}
        assert notes["llama"] == () and len(notes["cohere"]) == wanted
    assert "cohere" in notes["cohere"][0]
