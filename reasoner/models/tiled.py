"""MLPs computed a tile of rows at a time where a batch is long, so that what is wide is wide for one tile alone.

Between a layer's two halves a token is several times as wide as anywhere else: gate, up, their product and the
gradients of the three are 168 KiB a token in an 8B Llama, more than all the rest of its layer. Rows of an MLP do not
see one another, so each tile goes forward, and in the backward forward again and backward, by itself. Under layers that
recompute this costs no further pass. Left out: MLPs with dropout that is on, whose tiles would drop other numbers the
second time, and attention, whose memory is not wide.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reasoner.models.fused import MLP

MOST_ROWS = 16_384  # tokens that are computed at once: matrices are dequantized once for them, and once for each tile
TILE_ROWS = 8192
WIDE_ROW = 14_336 * 2  # bytes of gate's row in an 8B Llama; of narrower rows as many bytes are a tile


def tile(model: nn.Module) -> int:
    """Have every module work in tiles whose class is named an MLP and that is one; how many there are. Call it after
    `fuse`."""
    # gpt-oss names its experts' block so, which routes and hands back more than rows.
    mlps = [part for part in model.modules() if type(part).__name__.endswith("MLP") and hasattr(part, "down_proj")]
    found = [part for part in mlps if not isinstance(part, Tiled)]
    for part in found:
        part.__class__ = type(f"Tiled{type(part).__name__}", (Tiled, type(part)), {})
    return len(found)


class Tiled(nn.Module):
    """Comes before a module's own class, whose forward takes each row by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] -> [.., D]."""
        wide = cast(nn.Linear, self.down_proj).in_features * x.element_size()
        most, size = (rows * max(WIDE_ROW, wide) // wide for rows in (MOST_ROWS, TILE_ROWS))
        if x.shape[:-1].numel() <= most or _drops(self):
            return super().forward(x)
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        if not torch.is_grad_enabled() or not (weights or x.requires_grad):
            return _each(super().forward, x, size)
        kept: Any = _Keep.apply(x if x.requires_grad else x.detach().requires_grad_())
        again = partial(super().forward, read=False) if isinstance(self, MLP) else super().forward
        found: Any = _Tiles.apply(kept, kept.grad_fn, super().forward, again, size, *weights)
        return found


class _Keep(torch.autograd.Function):
    """x itself, saved before the MLP runs. It is the last thing that most layers save, and a layer that runs again for
    its backward stops there: so its MLP does not run once more than its tiles need."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient


class _Tiles(torch.autograd.Function):
    """x [.., D], the node of `_Keep` that made it, a function of rows, the same for one who asks for its graph alone, a
    tile's rows, and the weights that learn."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keeper: Any,
        run: Callable[[Tensor], Tensor],
        again: Callable[[Tensor], Tensor],
        size: int,
        *weights: Tensor,
    ) -> Tensor:
        ctx.keeper, ctx.again, ctx.size, ctx.weights = keeper, again, size, weights
        return _each(run, x, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.keeper.saved_tensors
        x_gradient = torch.empty_like(x)
        sums = [torch.zeros_like(one, dtype=torch.promote_types(one.dtype, torch.float32)) for one in ctx.weights]
        rows, gradients, x_gradients = (one.view(-1, one.shape[-1]) for one in (x, gradient.contiguous(), x_gradient))
        for part in _parts(len(rows), ctx.size):
            with torch.enable_grad():
                piece = rows[None, part].detach().requires_grad_()
                out = ctx.again(piece)
            found = torch.autograd.grad(out, [piece, *ctx.weights], gradients[None, part])
            x_gradients[part] = found[0][0]
            for total, one in zip(sums, found[1:], strict=True):
                total += one
        totals = [total.to(one.dtype) for total, one in zip(sums, ctx.weights, strict=True)]
        return x_gradient, None, None, None, None, *totals


def _each(run: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """The function of each tile, put together."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor | None = None
    for part in _parts(len(rows), size):
        found = run(rows[None, part])[0]
        out = found.new_empty(len(rows), found.shape[-1]) if out is None else out
        out[part] = found
    assert out is not None
    return out.view(*x.shape[:-1], -1)


def _parts(num_rows: int, size: int) -> Iterator[slice]:
    for begin in range(0, num_rows, size):
        yield slice(begin, min(begin + size, num_rows))


def _drops(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in module.modules())
