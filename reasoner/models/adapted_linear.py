"""A frozen linear layer with LoRA, forward and backward by hand: y = x W^T + bias + scaling (x A^T) B^T.

peft's own layer computes the adapter in float32 through a dozen small operations, which cost more than the products do:
six tenths of an update's time at 135M on an H100. Here the products are four in the dtype of x, with A and B rounded to
it as the engine has them, the base is dequantized once a pass, and x (which the siblings of a projection share) is all
that is kept of size. The masters and their gradients stay float32. Left out: DoRA, and dropout without peft's layer.
"""

from typing import Any, cast

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from reasoner.models import nf4


class Adapted(torch.autograd.Function):
    """x [.., K], W [O, K] (packed where `state` says so), A [r, K], B [O, r] -> [.., O], in the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, state: Any, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        """The layer's output."""
        out = linear(x, weight, bias) if state is None else nf4.matmul(x, weight, state, bias)
        low = linear(x, a.to(x.dtype))
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(low.view(-1, low.shape[-1]), b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.state, ctx.scaling = state, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x, A and B; the base has none."""
        x, low, weight, a, b = ctx.saved_tensors
        (gradient,) = gradients
        g = gradient.reshape(-1, gradient.shape[-1])
        rows, low = x.reshape(-1, x.shape[-1]), low.view(-1, low.shape[-1])
        low_gradient = (g @ b.to(g.dtype)).mul_(ctx.scaling)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            matrix = weight if ctx.state is None else nf4.dequantize(weight, ctx.state)
            x_gradient = (g @ matrix).addmm_(low_gradient, a.to(g.dtype)).view_as(x)
        a_gradient = _product(low_gradient.t(), rows, a.dtype)
        b_gradient = _product(g.t(), low, b.dtype).mul_(ctx.scaling)
        return x_gradient, None, None, None, a_gradient, b_gradient, None


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`, from a float32 sum also where the factors have 16 bits."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


class AdaptedLinear(PeftLinear):
    """peft's LoRA layer, computed by `Adapted`. Merged, switched off or with dropout it is peft's own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[.., K] -> [.., O]."""
        (name,) = self.active_adapters
        dropout = cast(nn.Module, self.lora_dropout[name])
        drops = dropout.training and not isinstance(dropout, nn.Identity)
        if self.disable_adapters or self.merged or drops or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base = cast(nn.Linear, self.get_base_layer())
        a, b = cast(Tensor, self.lora_A[name].weight), cast(Tensor, self.lora_B[name].weight)
        out: Any = Adapted.apply(
            x, base.weight, getattr(base.weight, "quant_state", None), base.bias, a, b, self.scaling[name]
        )
        return out
