"""An MLP's second half, down(activation(gate) * up), as one function that keeps gate and up alone.

The product is as wide as gate, and down's adapter asks for it once more in the backward. There the kernel that reads
gate and up for their gradients makes it again on the way, over the memory of its own gradient, so that nobody keeps it.
Left out: what the kernels of kernels/elementwise.py do not take, and a down projection that is not one adapted layer
by itself, whose adapter is simply added (adapted_linear.py): there the product is computed and handed on.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reasoner.models.adapted_linear import AdaptedLinear, Frozen, fill, product, scaled


def gated_down(
    down: nn.Module, kernels: ModuleType, gate: Tensor, up: Tensor | None, *, tanh: bool, read: bool = True
) -> Tensor:
    """[.., I] twice, or without up [.., 2 I] of both, -> [.., O]. `kernels`: what `elementwise.fast` found. Nobody else
    may read gate and up after the backward pass, of which there is one: their gradients are written over them. An
    output that nobody will `read`, but go backward from, may be left empty."""
    if not (isinstance(down, AdaptedLinear) and down.is_plain and len(down.group.layers) == 1):
        return down(kernels.gated(gate, up, tanh=tanh, overwrite=True))
    frozen, scaling, a, (b,), masters = down.group.terms(gate.dtype)
    gate, up = gate.contiguous(), None if up is None else up.contiguous()
    # A layer that runs again for its backward stops here: the rest is done after the function (adapted_linear.adapted).
    out: Tensor = GatedDown.apply(gate, up, kernels, tanh, frozen, scaling, a, b, *masters)  # pyright: ignore[reportAssignmentType]
    if not read:
        return out
    with torch.no_grad():
        active = kernels.gated_product(gate, up, tanh=tanh)
        del gate, up  # the last that holds them where no graph does: the product with the base needs memory of its own
        rows = active.view(-1, active.shape[-1])
        fill([out], rows, scaled(rows, a.t(), scaling, rows.new_empty(len(rows), len(a))), frozen, [b])
    return out


class GatedDown(torch.autograd.Function):
    """`gated_down`, but for what stands in the output."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        kernels: ModuleType,
        tanh: bool,
        frozen: Frozen,
        scaling: float,
        a: Tensor,
        b: Tensor,
        *masters: Tensor,
    ) -> Tensor:
        """The output, not filled yet."""
        ctx.save_for_backward(*(gate,) if up is None else (gate, up))
        ctx.kernels, ctx.tanh, ctx.frozen, ctx.scaling, ctx.a, ctx.b = kernels, tanh, frozen, scaling, a, b
        ctx.master_dtype = masters[0].dtype
        return gate.new_empty(*gate.shape[:-1], *frozen.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of gate and up, over both, and of the masters; nothing else has one."""
        over = ctx.saved_tensors
        gate, up = over if len(over) == 2 else (*over, None)
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        low_gradient = scaled(g, ctx.b, ctx.scaling, g.new_empty(len(g), len(ctx.a)))
        needed = any(ctx.needs_input_grad[:2])
        if needed:
            (matrix,) = ctx.frozen.matrices()
            active = (low_gradient @ ctx.a).addmm_(g, matrix)  # the gradient of what it is in a moment
            ctx.kernels.gated_backward(gate, up, active, tanh=ctx.tanh)
        else:
            active = ctx.kernels.gated_product(gate, up, tanh=ctx.tanh).view(len(g), -1)
        low = scaled(active, ctx.a.t(), ctx.scaling, torch.empty_like(low_gradient))
        a_gradient = product(low_gradient.t(), active, ctx.master_dtype)
        b_gradient = product(g.t(), low, ctx.master_dtype)
        found = [one.detach() if needed else None for one in over]
        return found[0], (found[1] if len(over) == 2 else None), *(None,) * 6, a_gradient, b_gradient
