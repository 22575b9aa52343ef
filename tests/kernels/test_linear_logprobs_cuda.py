"""The loss head's torch path on a card, in bfloat16 and whole rows a tile, against the naive formula in float64."""

import pytest
import torch

from reasoner.kernels import linear_logprobs as module
from reasoner.kernels.linear_logprobs import linear_logprobs
from tests.kernels.test_linear_logprobs import make_inputs, naive, upstream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREFER_TRITON", False)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_card(function, hidden, weight, target_ids, **shape) -> dict[str, torch.Tensor]:
    """Values and gradients of a random loss."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    found = function(hidden, weight, target_ids, **shape)
    logprobs, entropy = found if isinstance(found, tuple) else (found.logprobs, found.entropy)
    to_logprobs, to_entropy = (x.to(DEVICE) for x in upstream(len(target_ids)))
    ((to_logprobs * logprobs).sum() + (to_entropy * entropy).sum()).backward()
    return {"logprobs": logprobs, "entropy": entropy, "d_hidden": hidden.grad, "d_head_weight": weight.grad}


@pytest.mark.parametrize(("vocabulary", "soft_cap"), [(50_257, None), (49_152, 3.0), (1000, None)])
def test_bf16_costs_its_rounding_and_no_more(vocabulary: int, soft_cap: float | None, monkeypatch) -> None:
    monkeypatch.setattr(module, "CUDA_TILE_ELEMENTS", 200 * vocabulary)  # several tiles, the last one shorter
    inputs = [x.to(DEVICE) for x in make_inputs(1111, vocabulary, 64, torch.bfloat16)]
    mine = on_card(linear_logprobs, *inputs, soft_cap=soft_cap)
    truth = on_card(naive, inputs[0].double(), inputs[1].double(), inputs[2], soft_cap=soft_cap)
    worst = (mine["logprobs"].double() - truth["logprobs"]).abs() / truth["logprobs"].abs().clamp(min=1)
    assert worst.max() < 2e-5
    assert (mine["entropy"].double() - truth["entropy"]).abs().max() < 1e-4
    for name in ("d_hidden", "d_head_weight"):
        off = (mine[name].double() - truth[name]).norm() / truth[name].norm()
        assert off < 3e-3, (name, off)
    again = on_card(linear_logprobs, *inputs, soft_cap=soft_cap)
    assert all(torch.equal(mine[name], again[name]) for name in ("logprobs", "entropy", "d_hidden"))
    mutant = on_card(linear_logprobs, *inputs, soft_cap=soft_cap, temperature=1.01)
    assert (mutant["d_hidden"].double() - truth["d_hidden"]).norm() > 5e-3 * truth["d_hidden"].norm()


def test_memory_beside_the_outputs_is_a_few_tiles() -> None:
    hidden = torch.randn(8192, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(151_936, 256, device="cuda", dtype=torch.bfloat16)
    target_ids = torch.randint(151_936, (8192,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    linear_logprobs(hidden, weight, target_ids).logprobs.sum().backward()
    peak = torch.cuda.max_memory_allocated() - held
    assert peak < 0.1 * 4 * 8192 * 151_936, f"{peak / 2**20:.0f} MiB"
