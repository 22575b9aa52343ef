"""linear_logprobs on an NVIDIA card: the values and the gradient of any loss for two matmuls of 2NVD, no logits kept.

d logp_i / d h_i does not depend on the loss, so the forward pass makes it, while it holds the logits, and the backward
pass only scales it. Everything is said against the target: with logits x and a row's target t, the odds of a token are

    o_j = exp(x_j - x_t), o_t left out        S = sum_j o_j        M = sum_j o_j (x_j - x_t)
    logp = -log1p(S)                          entropy = log1p(S) - M / (1 + S)
    d logp / d h = S / (1 + S) * gain * (w_t - sum_j o_j w_j / S)        (the slope of a soft cap goes before each w)

so that no maximum is looked for, nothing is rescaled, and a row near p = 1 keeps the relative precision of 1 - p. One
kernel multiplies a block of R rows by a block of columns, makes the odds from the float32 sums in its epilogue, writes
them in the head's dtype and their row sums per tile; cuBLAS adds odds @ weight to [R, D] in float32; a small kernel
turns that into the factor of the row, float16 with one float32 scale. Nothing is added by atomics: the same inputs
give the same bits.

The odds carry 2^-64, so that bfloat16's exponents reach from 1 - p = 2^-62 to logp = -112. Rows beyond are found by
their sum. A kernel that is always launched, and mostly ends at once, makes their values and factors again from the
logits, so that the host need not know and a call with a gradient never waits for the card; rows that are not finite,
and targets that are no column of the logits, are not a number there. Without a factor the forward pass waits once, has
the torch implementation do such rows again, and says which targets are wrong.

Left out, and given to the torch implementation's backward pass (2 more matmuls for the odds made again, 3 with a
trained head): a gradient that arrives at entropy, a trained head, and float16, whose exponents are too short for odds.
The kernels are in odds_triton.py; tiles are data, in tiles.py.
"""

# Triton types a launch as a plain call of the kernel.
# pyright: reportCallIssue=false, reportArgumentType=false

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from reasoner.kernels import odds_triton
from reasoner.kernels import tiles as table
from reasoner.kernels.linear_logprobs import (
    LogitShape,
    Logprobs,
    RowNumbers,
    backward_in_tiles,
    check_targets,
    forward_in_tiles,
)
from reasoner.kernels.tiles import Tiles

LOG2E = math.log2(math.e)
LN2 = math.log(2)
SHIFT = 64.0  # the odds are kept as 2^-64 of themselves
# Logits of rows that are computed again in torch, at a time: four tiles of float32, as large as a block of odds.
AGAIN_ELEMENTS = table.ODDS_BYTES // 16
EXACT_ELEMENTS = 1 << 14  # of the head, at a time, that the kernel of such rows holds in registers
LIMIT = 2.0**99.5  # a larger sum of theirs may have lost terms; 2^100 x 2^18 columns x |w| is finite in float32


def linear_logprobs_triton(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    temperature: float,
    soft_cap: float | None,
    logit_scale: float,
) -> Logprobs:
    """`linear_logprobs` for inputs that `triton_supported` takes and that are checked but for the targets' range.

    A target outside [0, V) raises ValueError, but where the factor is made: hidden needs a gradient, the head none, and
    they are not float16. There its row is not a number, in values and gradient, as saying more would wait for the card.
    """
    shape = LogitShape(temperature, soft_cap, logit_scale)
    frozen_head = not head_weight.requires_grad and head_weight.dtype != torch.float16
    with_factor = torch.is_grad_enabled() and hidden.requires_grad and frozen_head
    with torch.cuda.device_of(hidden):  # Triton launches on the current card; autograd sets it for the backward pass
        logprobs, entropy = _LinearLogprobs.apply(hidden, head_weight, target_ids, shape, with_factor)
    return Logprobs(logprobs, entropy)


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """d logp / d hidden of each row: factor [N, D], at most 1 and float16 (float32 from float32), times scale [N]."""

    factor: Tensor
    scale: Tensor


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target_ids: Tensor, shape: LogitShape, with_factor: bool
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            known, factor = forward(hidden, weight, target_ids, shape, with_factor)
        kept = () if factor is None else (factor.factor, factor.scale)
        ctx.save_for_backward(hidden, weight, target_ids, *known, *kept)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return known.logprobs, known.entropy

    @staticmethod
    @once_differentiable  # whose type hides the name of ctx
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, target_ids, logprobs, entropy, log_total, *kept = ctx.saved_tensors
        d_logprobs, d_entropy = grads
        if kept and d_logprobs is not None and d_entropy is None:
            return scaled_rows(Factor(*kept), d_logprobs, hidden.dtype), None, None, None, None
        known, wants = RowNumbers(logprobs, entropy, log_total), ctx.needs_input_grad[:2]
        target_ids = target_ids.clamp(0, weight.shape[0] - 1)  # nobody asked; the numbers of a wrong one's row are NaN
        with torch.autocast(hidden.device.type, enabled=False):
            d_hidden, d_weight = backward_in_tiles(hidden, weight, target_ids, known, ctx.shape, wants, *grads)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None, None


def forward(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, shape: LogitShape, with_factor: bool
) -> tuple[RowNumbers, Factor | None]:
    """What is known of each row, and if asked for its factor."""
    hidden, target_ids, (num_rows, width) = hidden.contiguous(), target_ids.contiguous(), hidden.shape
    sums = torch.empty(2, num_rows, dtype=torch.float32, device=hidden.device)
    factor = None
    if with_factor:
        kept = hidden.dtype if hidden.dtype == torch.float32 else torch.float16
        factor = Factor(hidden.new_empty(num_rows, width, dtype=kept), sums.new_empty(num_rows))
    if num_rows == 0:
        return RowNumbers(*sums.new_empty(3, 0)), factor
    work = _Work(hidden, weight, target_ids, shape, sums, factor)
    work.run()
    if factor is not None:
        known = row_numbers(sums, work.target_bits)
        work.exact(known)
        return known, factor
    some_exceed = _on_its_way(exceeding(sums).any())
    known = row_numbers(sums, work.target_bits)
    del work  # whose memory the rows below take
    if some_exceed():
        check_targets(target_ids, weight.shape[0])
        for rows in exceeding(sums).nonzero()[:, 0].split(max(AGAIN_ELEMENTS // weight.shape[0], 1)):
            exact = forward_in_tiles(hidden[rows], weight, target_ids[rows], shape)
            for mine, found in zip(known, exact, strict=True):
                mine[rows] = found
    return known, None


def exceeding(sums: Tensor) -> Tensor:
    """Which rows have odds out of reach, or are not finite: [N] bool."""
    return ~(sums[0] < LIMIT)


def row_numbers(sums: Tensor, target_bits: Tensor) -> RowNumbers:
    """From S 2^-64 and sum_j o_j 2^-64 (log2 o_j - 64), and the target's logit in bits."""
    own = 2.0**-SHIFT
    total = sums[0] + own
    confident = torch.log1p((sums[0] / own).clamp(max=1))
    surprise = torch.where(sums[0] < own, confident, total.log() + SHIFT * LN2)
    entropy = surprise - LN2 * (sums[1] + SHIFT * sums[0]) / total
    return RowNumbers(-surprise, entropy, target_bits * LN2 + surprise)


def scaled_rows(factor: Factor, d_logprobs: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of hidden: each row of the factor times its number."""
    num_rows, width = factor.factor.shape
    d_hidden = factor.factor.new_empty(num_rows, width, dtype=dtype)
    if num_rows:
        numbers = factor.scale * d_logprobs
        odds_triton.scaled_rows_kernel[(num_rows,)](
            factor.factor, numbers, d_hidden, width, BLOCK=triton.next_power_of_2(width)
        )
    return d_hidden


def tiles_for(hidden: Tensor, weight: Tensor) -> Tiles:
    """The row of the table for the card and these inputs."""
    # The accelerator asks for addresses and rows of multiples of 16 bytes.
    aligned = not any(x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16 for x in (hidden, weight))
    if not hidden.is_cuda:  # under Triton's interpreter
        return table.tiles_for((9, 0), 227 << 10, aligned)
    card = torch.cuda.get_device_properties(hidden.device)
    return table.tiles_for((card.major, card.minor), card.shared_memory_per_block_optin, aligned)


class _Work:
    """One forward pass: its buffers, and the launches that fill sums and factor."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, target_ids: Tensor, shape: LogitShape, sums: Tensor, factor: Factor | None
    ) -> None:
        self.hidden, self.weight, self.target_ids = hidden, weight, target_ids
        self.sums, self.factor, self.shape = sums, factor, shape
        self.tiles = tiles = tiles_for(hidden, weight)
        self.processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 4
        (num_rows, width), vocabulary = hidden.shape, weight.shape[0]
        across = table.ceil_div(vocabulary, tiles.columns)
        if factor is None:  # nothing is kept but sums, so a block is wide and takes what the partial sums allow
            self.rows = table.sum_rows(num_rows, vocabulary, tiles)
            self.columns = across * tiles.columns
            self.odds = self.products = sums
        else:
            self.rows = table.block_rows(num_rows, width, tiles, self.processors)
            self.columns = table.block_columns(self.rows, vocabulary, tiles, self.processors)
            self.odds = hidden.new_empty(self.rows, self.columns)
            self.products = sums.new_empty(self.rows, width)
        self.partials = sums.new_empty(2, across, self.rows)
        self.loads: list[Any] = [hidden, weight, self.odds]
        if tiles.descriptors:
            self.loads = [
                TensorDescriptor.from_tensor(hidden, [tiles.rows, tiles.depth]),
                TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.depth]),
            ]
            if factor is None:
                self.loads.append(self.loads[0])  # nothing is stored
            else:
                self.loads.append(TensorDescriptor.from_tensor(self.odds, [tiles.rows, tiles.columns // tiles.halves]))
        cap = shape.soft_cap
        # With a cap the kernels make tanh(a) from 2^(-2 |a| log2 e).
        self.dot_scale = shape.gain * LOG2E if cap is None else 2 * LOG2E * shape.logit_scale / cap
        self.cap_bits = 0.0 if cap is None else cap / shape.temperature * LOG2E
        self.target_bits, self.target_slopes = self._targets()

    def run(self) -> None:
        """Launch all blocks: odds and their sums, products with the head, factors."""
        num_rows, vocabulary = self.hidden.shape[0], self.weight.shape[0]
        for first_row in range(0, num_rows, self.rows):
            rows = min(self.rows, num_rows - first_row)
            for first_column in range(0, vocabulary, self.columns):
                columns = min(self.columns, vocabulary - first_column)
                self._odds(first_row, rows, first_column, columns)
                if first_column + columns == vocabulary:
                    self._sums(first_row, rows)
                if self.factor is not None:
                    block = self.weight[first_column : first_column + columns]
                    _multiply(self.products[:rows], self.odds[:rows, :columns], block, add=first_column > 0)
            if self.factor is not None:
                self._factors(first_row, rows)

    def exact(self, known: RowNumbers) -> None:
        """Launch what makes values and factors anew of rows that the odds don't reach."""
        assert self.factor is not None
        num_rows, width = self.hidden.shape
        block, rows = triton.next_power_of_2(width), 32
        odds_triton.exact_kernel[(table.ceil_div(num_rows, rows),)](
            self.hidden, self.weight, self.target_ids, self.sums, self.target_bits, self.target_slopes, *known,
            self.factor.factor, self.factor.scale, num_rows, self.hidden.stride(0), self.weight.stride(0), width,
            self.weight.shape[0], self.shape.gain, self.dot_scale, self.cap_bits, LIMIT,
            ROWS=rows, COLUMNS=min(max(EXACT_ELEMENTS // block, 1), 256), CAPPED=self.shape.soft_cap is not None,
            BLOCK=block, num_warps=8,
        )  # fmt: skip

    def _targets(self) -> tuple[Tensor, Tensor]:
        """The target's logit in bits, and the slope of the soft cap there: [N]."""
        num_rows, width = self.hidden.shape
        dots = self.sums.new_empty(num_rows)
        odds_triton.target_dots_kernel[(num_rows,)](
            self.hidden, self.weight, self.target_ids, dots, self.hidden.stride(0), self.weight.stride(0), width,
            self.weight.shape[0], BLOCK=min(1024, triton.next_power_of_2(width)),
        )  # fmt: skip
        if self.shape.soft_cap is None:
            return dots * (self.shape.gain * LOG2E), dots
        inner = dots * (self.shape.logit_scale / self.shape.soft_cap)
        slopes = inner.cosh().square().reciprocal()  # 1 - tanh^2, without its cancellation
        return inner.tanh() * (self.shape.soft_cap / self.shape.temperature * LOG2E), slopes

    def _odds(self, first_row: int, rows: int, first_column: int, columns: int) -> None:
        tiles = self.tiles
        down, across = table.ceil_div(rows, tiles.rows), table.ceil_div(columns, tiles.columns)
        programs = self.processors if tiles.persistent else 1 << 30  # of which each takes one tile
        odds_triton.odds_kernel[(min(programs, down * across),)](
            *self.loads, self.target_bits, self.target_ids, self.partials,
            first_row, rows, self.weight.shape[0], down, across, first_column // tiles.columns,
            self.hidden.stride(0), self.weight.stride(0), self.columns,
            self.partials.stride(0), self.partials.stride(1), self.dot_scale, self.cap_bits, SHIFT,
            D=self.hidden.shape[1], ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, GROUP=tiles.group,
            DESCRIPTORS=tiles.descriptors, HALVES=tiles.halves, FLATTEN=tiles.persistent, PROGRAMS=programs,
            STORE=self.factor is not None, CAPPED=self.shape.soft_cap is not None, RAGGED=columns % tiles.columns > 0,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def _sums(self, first_row: int, rows: int) -> None:
        # torch.sum takes a second buffer of the partial sums' size for 1,024 tiles.
        tall, wide = 128, 16
        odds_triton.sums_kernel[(table.ceil_div(rows, wide), 2)](
            self.partials, self.sums, first_row, rows, self.partials.shape[1],
            self.partials.stride(0), self.partials.stride(1), self.sums.stride(0), TILES=tall, ROWS=wide,
        )  # fmt: skip

    def _factors(self, first_row: int, rows: int) -> None:
        assert self.factor is not None
        width = self.hidden.shape[1]
        odds_triton.factor_kernel[(rows,)](
            self.products, self.weight, self.target_ids, self.sums, self.target_slopes, self.factor.factor,
            self.factor.scale, first_row, self.weight.stride(0), width, self.weight.shape[0], self.shape.gain,
            2.0**-SHIFT, CAPPED=self.shape.soft_cap is not None, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip


def _on_its_way(flag: Tensor) -> Callable[[], bool]:
    """The flag, copied to the host as soon as the card has it."""
    if not flag.is_cuda:
        return lambda: bool(flag)
    copy, there = flag.to("cpu", non_blocking=True), torch.cuda.Event()
    there.record()

    def wait() -> bool:
        there.synchronize()
        return bool(copy)

    return wait


def _multiply(out: Tensor, odds: Tensor, weight: Tensor, add: bool) -> None:
    """out [R, D] float32 = (out if add) + odds @ weight, summed in float32 whatever their dtype."""
    if not out.is_cuda:  # under Triton's interpreter
        product = odds.float() @ weight.float()
        out.copy_(out + product if add else product)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, odds, weight, torch.float32, out=out)
    else:
        torch.ops.aten.mm.dtype_out(odds, weight, torch.float32, out=out)
