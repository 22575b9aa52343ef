"""The loss head: hidden states -> log-probability of each target and entropy of each row. No logits leave it.

Here are the operation, the choice of an implementation, and the torch one, the truth that every faster one is held
against; linear_logprobs_triton.py is the one for cards. Left out: a target that means "skip this row" (callers select
the rows they train, so prompts cost no matmul), a bias (no family we load has one), and second derivatives.

How the torch one works. The [N, V] logits are made a tile of rows and columns at a time, in float32 (float64 if an
input is; 16-bit inputs on a GPU are multiplied as they are and summed in float32), used, and made again in the backward
pass: 3 matmuls of 2NVD instead of 2, for a memory of three tiles. A tile leaves three numbers a row: its maximum m, and
the sums of e^(x-m) and of (x-m) e^(x-m) over its columns other than the target; the tiles of a row are merged at the
end. The target stays out of the sums because a trained model lives near p = 1: log p = log sigmoid(x_target - logsumexp
of the others) and 1 - p = -expm1(log p) keep their relative precision there, while x_target - logsumexp of all and
1 - exp(log p) cancel to nothing.
"""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 2 M logits a tile, 8 MiB in float32: large enough for full matmul speed on a CPU, small beside [N, V].
TILE_COLUMNS = 4096
TILE_ELEMENTS = 512 * TILE_COLUMNS
# On a GPU launches cost more than cache misses: whole rows, 32 M logits (128 MiB), a tenth of the operations.
CUDA_TILE_ELEMENTS = 32 << 20
# Whether cards that can take the Triton path do: measured to be 3 to 9 times faster than the torch path, on an H100.
PREFER_TRITON = True


@dataclass(frozen=True, slots=True, eq=False)
class Logprobs:
    """Per-token numbers of N rows, float32 (float64 from float64 inputs), in nats.

    >>> Logprobs(logprobs=tensor([-0.2, -1.4]), entropy=tensor([0.5, 1.1]))
    """

    logprobs: Tensor  # [N] log p(target)
    entropy: Tensor  # [N] -sum_j p_j log p_j


def linear_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
) -> Logprobs:
    """Log-probability of each target and entropy of each row, as Logprobs of two vectors [N].

    From hidden [N, D], head_weight [V, D] and target_ids [N] int64. It equals, to the rounding of float32 and without
    ever holding [N, V]:

        logits   = logit_scale * hidden @ head_weight.T
        logits   = soft_cap * tanh(logits / soft_cap)       if soft_cap is given (Gemma 2, arXiv:2408.00118 section 2)
        logp     = log_softmax(logits / temperature, dim=1)
        logprobs = logp[i, target_ids[i]]
        entropy  = -(exp(logp) * logp).sum(dim=1)

    Differentiable in hidden and, if it requires grad, head_weight, for gradients arriving at logprobs and at entropy.
    Inputs may be bfloat16, float16, float32 or float64 and strided in any way; gradients come back in the input's
    dtype, summed in float32 or better. The same inputs give the same bits. Raises ValueError on a wrong shape, dtype or
    device, a temperature or soft_cap that is not above 0, a target outside [0, V). The last is not said, as
    that would wait for the card, by the Triton path in bfloat16 where hidden needs a gradient and the head none: such a
    row's numbers and gradient are NaN.
    """
    _check(hidden, head_weight, target_ids, temperature, soft_cap, logit_scale)
    # The one place where an implementation is chosen.
    if PREFER_TRITON and triton_supported(hidden, head_weight):
        from reasoner.kernels import linear_logprobs_triton as fast

        return fast.linear_logprobs_triton(hidden, head_weight, target_ids, temperature, soft_cap, logit_scale)
    check_targets(target_ids, head_weight.shape[0])
    return linear_logprobs_torch(hidden, head_weight, target_ids, temperature, soft_cap, logit_scale)


def triton_supported(hidden: Tensor, head_weight: Tensor) -> bool:
    """Whether linear_logprobs_triton takes these: Triton and an NVIDIA card of compute capability 8.0 or newer, 16-bit
    inputs of one dtype and of at least one column, each row of the head in one piece."""
    return (
        hidden.is_cuda
        and torch.version.hip is None
        and hidden.dtype == head_weight.dtype
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and hidden.shape[1] > 0
        and head_weight.stride(1) == 1
        and head_weight.stride(0) >= head_weight.shape[1]
        and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
        and find_spec("triton") is not None
    )


def linear_logprobs_torch(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    temperature: float,
    soft_cap: float | None,
    logit_scale: float,
) -> Logprobs:
    """`linear_logprobs` for inputs that are already checked, in plain torch, on any device."""
    shape = LogitShape(temperature, soft_cap, logit_scale)
    logprobs, entropy = _LinearLogprobs.apply(hidden, head_weight, target_ids, shape)
    return Logprobs(logprobs, entropy)


@dataclass(frozen=True, slots=True)
class LogitShape:
    """What happens to a dot product before the softmax, and its derivative."""

    temperature: float
    soft_cap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if self.soft_cap is None:
            return _scaled_product(hidden, weight, self.logit_scale / self.temperature)
        capped = _scaled_product(hidden, weight, self.logit_scale / self.soft_cap).tanh_()
        return capped.mul_(self.soft_cap / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the cap at these logits, None where it is 1; the constant factor is `gain`."""
        if self.soft_cap is None:
            return None
        return (logits * (self.temperature / self.soft_cap)).square_().neg_().add_(1)  # tanh' = 1 - tanh^2

    @property
    def gain(self) -> float:
        return self.logit_scale / self.temperature


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target_ids: Tensor, shape: LogitShape
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            known = forward_in_tiles(hidden, weight, target_ids, shape)
        ctx.save_for_backward(hidden, weight, target_ids, *known)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return known.logprobs, known.entropy

    @staticmethod
    @once_differentiable  # whose type hides the name of ctx
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, target_ids, *known = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            wants = ctx.needs_input_grad[:2]
            d_hidden, d_weight = backward_in_tiles(
                hidden, weight, target_ids, RowNumbers(*known), ctx.shape, wants, *grads
            )
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None


class RowNumbers(NamedTuple):
    """What a forward pass knows of its rows and a backward pass asks for, each [N]."""

    logprobs: Tensor
    entropy: Tensor
    log_total: Tensor  # the log of the softmax's denominator


def forward_in_tiles(hidden: Tensor, weight: Tensor, target_ids: Tensor, shape: LogitShape) -> RowNumbers:
    """A forward pass that keeps no logits."""
    num_rows = hidden.shape[0]
    columns = _column_slices(weight)
    target_logits = hidden.new_empty(num_rows, dtype=_precision(hidden, weight))
    maxima, sums, moments = target_logits.new_empty(3, len(columns), num_rows)
    for k, cols in enumerate(columns):
        tile_weight = _operand(weight[cols], hidden)
        for rows in _row_slices(hidden, cols):
            x = shape.logits(_operand(hidden[rows], weight), tile_weight)
            at_target = _targets_in(target_ids[rows], cols, weight.shape[0])
            target_logits[rows][at_target[0]] = x[at_target]
            torch.amax(x, 1, out=maxima[k, rows])
            x -= maxima[k, rows, None]
            e = x.exp()
            e[at_target] = 0
            torch.sum(e, 1, out=sums[k, rows])
            torch.sum(x.mul_(e), 1, out=moments[k, rows])
    return _merge(maxima, sums, moments, target_logits)


def _merge(maxima: Tensor, sums: Tensor, moments: Tensor, target_logits: Tensor) -> RowNumbers:
    """From the tiles' statistics [K, N], which leave the target out."""
    maximum = maxima.amax(0)
    shift = maxima - maximum
    decay = shift.exp()
    others = (sums * decay).sum(0)
    moment = ((moments + shift * sums) * decay).sum(0)
    target = target_logits - maximum
    logprobs = torch.nn.functional.logsigmoid(target - others.log())
    log_total = torch.log1p(others + target.expm1())  # e^target - 1 first: exact where the target is the maximum
    share = target.exp()
    entropy = log_total - (moment + target * share) / (others + share)
    return RowNumbers(logprobs, entropy, maximum + log_total)


def backward_in_tiles(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    known: RowNumbers,
    shape: LogitShape,
    wants: tuple[bool, bool],
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden, as it was summed, and of weight, in its dtype; those that `wants` asks for.

    With L = log p: d logp_t / d x_j = [j = t] - p_j, and d entropy / d x_j = -p_j (L_j + entropy).
    """
    logprobs, entropy, log_total = known
    wants_hidden, wants_weight = wants
    d_logprobs = torch.zeros_like(logprobs) if d_logprobs is None else d_logprobs
    at_target_grads = -d_logprobs * logprobs.expm1()
    if d_entropy is not None:
        at_target_grads -= d_entropy * logprobs.exp() * (logprobs + entropy)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=logprobs.dtype) if wants_hidden else None
    d_weight = weight.new_zeros(weight.shape) if wants_weight else None
    for cols in _column_slices(weight):
        tile_weight = _operand(weight[cols], hidden)
        d_tile_weight = tile_weight.new_zeros(tile_weight.shape, dtype=logprobs.dtype) if wants_weight else None
        for rows in _row_slices(hidden, cols):
            tile_hidden = _operand(hidden[rows], weight)
            x = shape.logits(tile_hidden, tile_weight)
            slope = shape.slope(x)
            x -= log_total[rows, None]
            grad = x.exp()
            if d_entropy is None:
                grad *= -d_logprobs[rows, None]
            else:
                x += entropy[rows, None]
                grad *= x.mul_(-d_entropy[rows, None]).sub_(d_logprobs[rows, None])
            at_target = _targets_in(target_ids[rows], cols, weight.shape[0])
            grad[at_target] = at_target_grads[rows][at_target[0]]
            if slope is not None:
                grad *= slope
            grad = grad.to(tile_weight.dtype)  # rounded like the gradient that is handed back
            if d_hidden is not None:
                d_hidden[rows] += _scaled_product(grad, tile_weight.T, shape.gain)
            if d_tile_weight is not None:
                d_tile_weight += _scaled_product(grad.T, tile_hidden.T, shape.gain)
        if d_weight is not None and d_tile_weight is not None:
            d_weight[cols] = d_tile_weight
    return d_hidden, d_weight


def _precision(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _column_slices(weight: Tensor) -> list[slice]:
    return _slices(weight.shape[0], weight.shape[0] if weight.is_cuda else TILE_COLUMNS)


def _row_slices(hidden: Tensor, cols: slice) -> list[slice]:
    """Rows of a tile: few columns take many rows, so that a small vocabulary is one tile."""
    elements = CUDA_TILE_ELEMENTS if hidden.is_cuda else TILE_ELEMENTS
    return _slices(hidden.shape[0], max(elements // (cols.stop - cols.start), 1))


def _operand(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor as a product takes it: in 16 bits where a GPU sums such in float32, else in the precision of the sum.

    Products of two 16-bit numbers are exact in float32, so both ways multiply the same numbers.
    """
    half = tensor.is_cuda and tensor.dtype == other.dtype and tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor if half else tensor.to(_precision(tensor, other))


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left [n, k] @ right [m, k].T, summed and given in float32 or better: [n, m]."""
    if left.dtype in (torch.bfloat16, torch.float16):
        found = torch.mm(left, right.T, out_dtype=torch.float32)
        return found if scale == 1 else found.mul_(scale)
    return (left if scale == 1 else left * scale) @ right.T


def _targets_in(target_ids: Tensor, cols: slice, num_columns: int) -> tuple[Tensor, Tensor]:
    """Where a tile's targets are: (rows of the tile, columns of the tile)."""
    if cols.stop - cols.start == num_columns:  # all of them; looking for them would wait for a GPU
        return torch.arange(len(target_ids), device=target_ids.device), target_ids
    rows = ((target_ids >= cols.start) & (target_ids < cols.stop)).nonzero().squeeze(1)
    return rows, target_ids[rows] - cols.start


def _check(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    temperature: float,
    soft_cap: float | None,
    logit_scale: float,
) -> None:
    """ValueError with the first thing that is wrong, of what is known without a look at the numbers."""
    inputs = {"hidden": hidden, "head_weight": head_weight, "target_ids": target_ids}
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
    if hidden.ndim != 2 or head_weight.ndim != 2 or target_ids.ndim != 1:
        raise ValueError(f"linear_logprobs expects hidden [N, D], head_weight [V, D], target_ids [N], not {shapes}")
    (num_rows, width), (vocabulary, head_width) = hidden.shape, head_weight.shape
    if num_rows != len(target_ids) or width != head_width or vocabulary == 0:
        raise ValueError(f"linear_logprobs: N and D must agree and V be at least 1, not {shapes}")
    if not (hidden.is_floating_point() and head_weight.is_floating_point() and target_ids.dtype == torch.int64):
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in inputs.items())
        raise ValueError(f"linear_logprobs expects floating hidden and head_weight and int64 target_ids, not {dtypes}")
    if len({tensor.device for tensor in inputs.values()}) > 1:
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in inputs.items())
        raise ValueError(f"linear_logprobs: the inputs lie on different devices: {devices}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"linear_logprobs: temperature={temperature} must be above 0")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"linear_logprobs: soft_cap={soft_cap} must be above 0")
    if not math.isfinite(logit_scale):
        raise ValueError(f"linear_logprobs: logit_scale={logit_scale} must be finite")


def check_targets(target_ids: Tensor, vocabulary: int) -> None:
    """ValueError if a target is no column of the logits. Waits for a card."""
    low, high = (int(bound) for bound in target_ids.aminmax()) if len(target_ids) else (0, 0)
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"linear_logprobs: target_ids must lie in 0..{vocabulary - 1}, not {low}..{high}: "
            "select the rows to train before the call"
        )
