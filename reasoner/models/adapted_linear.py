"""Frozen linear layers with LoRA, forward and backward by hand: y_i = x W_i^T + bias_i + scaling (x A_i^T) B_i^T.

peft's own layer computes the adapter in float32 through a dozen small operations, which cost more than the products do.
Here the products are in the dtype of x, with A and B rounded to it as the engine has them; layers that read the same x
(q, k, v; gate, up) and lie side by side in one buffer are computed together, so that the base is dequantized once and
the A's are one matrix; and x is all that is kept of size. The masters and their gradients stay float32. Left out: DoRA,
and dropout without peft's layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reasoner.models import nf4
from reasoner.models.base_weights import BaseWeights


@dataclass(frozen=True, slots=True, eq=False)
class Frozen:
    """Matrices [rows[i], K] one above the other in one tensor, packed where `state` says so, and their biases."""

    weight: Tensor
    state: Any
    rows: tuple[int, ...]
    biases: tuple[Tensor | None, ...]

    def matrices(self) -> tuple[Tensor, ...]:
        """Each [rows[i], K] as numbers; dequantized together where they are packed."""
        whole = self.weight if self.state is None else nf4.dequantize(self.weight, self.state)
        return (whole,) if len(self.rows) == 1 else whole.split(self.rows)


def adapted(
    x: Tensor, frozen: Frozen, scaling: float, a: Tensor, bs: Sequence[Tensor], masters: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """n outputs [.., rows[i]] of x [.., K]: the adapter in the dtype of x, its A's as one [n r, K] and each B
    [rows[i], r], is what is computed with; its masters, n A's and n B's, are what gets the gradients."""
    with torch.no_grad():
        flat = x.reshape(-1, x.shape[-1])
        low = scaled(flat, a.t(), scaling, flat.new_empty(len(flat), len(a)))
    # A layer that runs again for its backward stops once the last tensor that it saves is there, which for a function
    # of autograd's is when its forward is over. So outputs are filled after it: nobody asks for the last one again.
    outs: tuple[Tensor, ...] = Adapted.apply(x, low, frozen, scaling, a, *bs, *masters)  # pyright: ignore[reportAssignmentType]
    fill(outs, flat, low, frozen, bs)
    return outs


@torch.no_grad()
def fill(outs: Sequence[Tensor], rows: Tensor, low: Tensor, frozen: Frozen, bs: Sequence[Tensor]) -> None:
    """Write the outputs [.., rows[i]] of x [N, K], whose scaling x A^T [N, n r] is `low`."""
    for out, matrix, bias, b, part in zip(outs, frozen.matrices(), frozen.biases, bs, _parts(low, bs), strict=True):
        # The small term first: the large one is then added as the product is written, and the sum rounded once.
        flat = out.view(-1, out.shape[-1])
        torch.mm(part, b.t(), out=flat) if bias is None else torch.addmm(bias, part, b.t(), out=flat)
        flat.addmm_(rows, matrix.t())


class Adapted(torch.autograd.Function):
    """`adapted`, but for what stands in the outputs; `low` is scaling x A^T [N, n r]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor, frozen: Frozen, scaling: float, a: Tensor, *more: Tensor
    ) -> tuple[Tensor, ...]:
        """The layers' outputs, not filled yet."""
        ctx.save_for_backward(x, low)
        # Kept by `Siblings` from step to step; saved like x, each would pass a recomputing layer's hooks in Python.
        ctx.a, ctx.bs = a, more[: len(frozen.rows)]
        ctx.frozen, ctx.scaling, ctx.master_dtype = frozen, scaling, more[-1].dtype
        return tuple(x.new_empty(*x.shape[:-1], count) for count in frozen.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x and of the masters; nothing else has one."""
        x, low = ctx.saved_tensors
        a, bs = ctx.a, ctx.bs
        frozen, scaling, dtype = ctx.frozen, ctx.scaling, ctx.master_dtype
        gs = [g.reshape(-1, g.shape[-1]) for g in gradients]
        rows = x.reshape(-1, x.shape[-1])
        low_gradient = torch.empty_like(low)
        for g, b, part in zip(gs, bs, _parts(low_gradient, bs), strict=True):
            scaled(g, b, scaling, part)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            total = low_gradient @ a
            for g, matrix in zip(gs, frozen.matrices(), strict=True):
                total.addmm_(g, matrix)
            x_gradient = total.view_as(x)
        a_gradients = product(low_gradient.t(), rows, dtype).split([b.shape[1] for b in bs])
        b_gradients = [product(g.t(), part, dtype) for g, part in zip(gs, _parts(low, bs), strict=True)]
        return x_gradient, None, None, None, None, *(None for _ in bs), *a_gradients, *b_gradients


def _parts(low: Tensor, bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The columns of scaling x A^T [N, n r] that belong to each B."""
    return (low,) if len(bs) == 1 else low.split([b.shape[1] for b in bs], dim=1)


def scaled(left: Tensor, right: Tensor, scaling: float, out: Tensor) -> Tensor:
    """scaling * left @ right, written to `out` by the product itself, whatever stands there."""
    return out.addmm_(left, right, beta=0, alpha=scaling)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`, from a float32 sum also where the factors have 16 bits."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


class Siblings:
    """Adapted layers that read the same input, computed at the first one's turn; the others take what is theirs.

    A layer asked for another input than the one before it had is computed alone.
    """

    def __init__(self, layers: "Sequence[AdaptedLinear]", weight: Tensor, state: Any):
        """`weight`: the layers' matrices one above the other, as a view of theirs; `state` where it is packed."""
        bases = [cast(nn.Linear, layer.get_base_layer()) for layer in layers]
        rows = tuple(base.out_features for base in bases)
        self.layers = tuple(layers)
        self.frozen = Frozen(weight, state, rows, tuple(cast(Tensor | None, base.bias) for base in bases))
        self._rounded: tuple[Any, Tensor, list[Tensor]] | None = None
        self.waiting: tuple[Tensor, dict[int, Tensor]] | None = None  # an input, and outputs not yet asked for

    def take(self, layer: "AdaptedLinear", x: Tensor) -> Tensor:
        """The layer's output."""
        if self.waiting is None or self.waiting[0] is not x or id(layer) not in self.waiting[1]:
            outputs = adapted(x, *self.terms(x.dtype))
            self.waiting = (x, {id(one): out for one, out in zip(self.layers, outputs, strict=True)})
            _unfinished.add(self)
        found = self.waiting[1].pop(id(layer))
        if not self.waiting[1]:
            self.waiting = None
            _unfinished.discard(self)
        return found

    def terms(self, dtype: torch.dtype) -> tuple[Frozen, float, Tensor, list[Tensor], list[Tensor]]:
        """What `adapted` asks for beside x: matrices, scaling, the adapter in this dtype, its masters."""
        masters = [layer.masters for layer in self.layers]
        a, bs = self._rounded_to(dtype, masters)
        return self.frozen, self.layers[0].scale, a, bs, [*(one for one, _ in masters), *(one for _, one in masters)]

    def _rounded_to(self, dtype: torch.dtype, masters: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """The adapter in this dtype. Kept until a master changes: by its address or by PyTorch's count of writes, which
        update.py raises for optimizers that write past it."""
        key = (dtype, *((one.data_ptr(), one._version) for pair in masters for one in pair))
        if self._rounded is None or self._rounded[0] != key:
            with torch.no_grad():
                a = masters[0][0] if len(masters) == 1 else torch.cat([one for one, _ in masters])
                self._rounded = (key, a.to(dtype), [one.to(dtype) for _, one in masters])
        return self._rounded[1], self._rounded[2]


_unfinished: set[Siblings] = set()  # those with outputs that nobody took yet


def forget() -> None:
    """Drop what waits, with the graph behind it: after a pass that an error ended between siblings."""
    while _unfinished:
        _unfinished.pop().waiting = None


class AdaptedLinear(PeftLinear):
    """peft's LoRA layer, computed by `Adapted`. Merged, switched off or with dropout it is peft's own."""

    siblings: Siblings | None = None  # those of one buffer by `join`; else itself alone, from the first call on

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[.., K] -> [.., O]."""
        if args or kwargs or not self.is_plain:
            return super().forward(x, *args, **kwargs)
        return self.group.take(self, x)

    @property
    def group(self) -> Siblings:
        """Those that it is computed with."""
        if self.siblings is None:
            weight = cast(nn.Linear, self.get_base_layer()).weight
            self.siblings = Siblings([self], weight, getattr(weight, "quant_state", None))
        return self.siblings

    @property
    def is_plain(self) -> bool:
        """Whether the adapter is simply added: it is on, not merged, and drops nothing."""
        (name,) = self.active_adapters
        dropout = cast(nn.Module, self.lora_dropout[name])
        return not (self.disable_adapters or self.merged or (dropout.training and not isinstance(dropout, nn.Identity)))

    @property
    def masters(self) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [O, r]."""
        (name,) = self.active_adapters
        return cast(Tensor, self.lora_A[name].weight), cast(Tensor, self.lora_B[name].weight)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.scaling[self.active_adapters[0]]


def join(model: nn.Module, weights: BaseWeights) -> None:
    """Have adapted layers that are neighbours in a buffer computed together, where all of a group are adapted."""
    layers = {
        name.removeprefix("base_model.model."): part
        for name, part in model.named_modules()
        if isinstance(part, AdaptedLinear)
    }
    for names in weights.groups:
        if len(names) > 1 and all(name in layers for name in names):
            weight = weights.group(names)
            joined = Siblings([layers[name] for name in names], weight, weights.fused_states.get(names[0]))
            for name in names:
                layers[name].siblings = joined
