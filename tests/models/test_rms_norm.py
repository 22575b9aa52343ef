"""Our norm is transformers' within rounding, in every family whose norms are plain; the others keep theirs."""

import pytest
import torch
from torch import Tensor

from reasoner.models.families import FAMILIES
from reasoner.models.rms_norm import PLAIN_FAMILIES, RMSNorm, replace_norms
from tests.models.tiny_models import make_model

SHARED = [name for name, row in FAMILIES.items() if row.shares]


def truth(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SHARED)
def test_every_plain_norm_is_replaced_by_its_equal(family: str, dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(0)
    model = make_model(family).to(dtype)
    theirs = {name: part for name, part in model.named_modules() if type(part).__name__.endswith("RMSNorm")}
    keys = model.state_dict().keys()
    found = replace_norms(model, family)
    assert found == (len(theirs) if family in PLAIN_FAMILIES else 0) and model.state_dict().keys() == keys
    for name, norm in theirs.items():
        norm.weight.data.copy_(1 + 0.5 * torch.randn(norm.weight.shape, generator=draws))
        ours = model.get_submodule(name)
        assert isinstance(ours, RMSNorm) is (family in PLAIN_FAMILIES)
        if not isinstance(ours, RMSNorm):
            continue
        assert ours.weight is norm.weight
        x = 1e-3 * torch.randn(3, 5, norm.weight.shape[0], generator=draws).to(dtype)  # eps counts
        exact = truth(x, norm.weight, norm.variance_epsilon).detach()
        error = [float((one(x).detach().double() - exact).norm() / exact.norm()) for one in (ours, norm)]
        assert error[0] <= max(1.01 * error[1], 1e-6)
        assert float((truth(x, norm.weight.detach(), 0) - exact).norm() / exact.norm()) > 0.01


def test_its_gradients_are_those_of_the_formula() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(torch.nn.Parameter(torch.rand(6, dtype=torch.float64)), 1e-5)
    torch.testing.assert_close(norm(x), truth(x, norm.weight, 1e-5))
    assert torch.autograd.gradcheck(norm, (x,))
