"""Norms, rotary positions and gated activations as Triton kernels, one launch forward and one backward.

Each reads its inputs once, computes in float32 and rounds once; elementwise.py has the formulas. A norm may add a
residual first and hands back the sum too, so that its backward pass takes both gradients and gives their one sum. What
is kept for a backward pass: a norm's input and one number a row; nothing of a rotation but its angles; gate and up,
over which their gradients are written where the caller says that nobody else reads them. No atomics and no search for
tiles: the same inputs give the same bits.

Left out: rotating in place. Attention keeps what was rotated and nobody what it was made of, so it would save no
memory, while the gradient that arrives may be someone else's.
"""

# Kernels are Python to a type checker, whose loops and constants are none; a launch is a call to it.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from reasoner.kernels.tiles import ceil_div

NORM_TILE = 4096  # numbers a program, or one row
ROTARY_TILE = 2048  # of each half
GATED_TILE = 1024  # 16 bytes a thread and input at 16 bits
WARPS = 4


def norm(x: Tensor, weight: Tensor, eps: float, *, one_plus: bool = False) -> Tensor:
    """`norm_torch`, of a frozen weight: [.., D] in rows of any order, [D] -> [.., D]."""
    if not x.is_contiguous() and x.ndim == 4:  # heads before tokens: the rows are whole, so go by memory
        return norm(x.transpose(1, 2).contiguous(), weight, eps, one_plus=one_plus).transpose(1, 2)
    return _Norm.apply(x, None, weight, eps, one_plus)[1]


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, one_plus: bool = False
) -> tuple[Tensor, Tensor]:
    """s = x + residual (x where there is none), and `norm_torch` of s as it was rounded: two of [.., D]."""
    return _Norm.apply(x, residual, weight, eps, one_plus)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate_torch` of both: [1, heads, N, d] and [1, kv_heads, N, d], in memory [N, heads, d] when they come back."""
    return _Rotate.apply(query, key, cos, sin)


def gated(gate: Tensor, up: Tensor | None = None, *, tanh: bool, overwrite: bool = False) -> Tensor:
    """`gated_torch`: [.., I] twice, or without up [.., 2 I] of which they are halves, -> [.., I]. `overwrite`: the
    backward pass, of which there is then one, writes the gradients over both, which nobody else may read after it."""
    return _Gated.apply(gate, up, tanh, overwrite)


def gated_product(gate: Tensor, up: Tensor | None, *, tanh: bool) -> Tensor:
    """`gated` of contiguous tensors and without a graph."""
    whole, other, width, stride = _halves(gate, up)
    out = gate.new_empty(*gate.shape[:-1], width)
    grid, cut = _gated_tiles(out, width, stride)
    gated_kernel[grid](whole, other, out, *cut, TANH=tanh, BLOCK=GATED_TILE, num_warps=WARPS)
    return out


def gated_backward(gate: Tensor, up: Tensor | None, d_product: Tensor, *, tanh: bool) -> None:
    """The way back of `gated_product`: writes the gradients over gate and up, and over that of the product, which is
    contiguous, the product itself, to the bit. What autograd saved of gate and up is void from then on."""
    over = [gate] if up is None else [gate, up]
    _gated_back(d_product, over, over, tanh=tanh, again=True)
    torch.autograd.graph.increment_version(over)


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x, residual, weight, total, out, inverse, rows, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr, ONE_PLUS: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program: their sum where there is one, its norm, and 1 / sqrt(mean of squares + eps) of each."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(value * value, 1) / WIDTH + eps)
    tl.store(inverse + row, scale, mask=row < rows)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if ONE_PLUS:
        factor += 1
    result = value * scale[:, None] * factor[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    d_out, d_total, total, weight, inverse, d_x, rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr, ONE_PLUS: tl.constexpr,
):  # fmt: skip
    """With n = s / sqrt(mean s^2 + eps) and g = d_out * weight: (g - n mean(g n)) / sqrt(..), + d_total if ADDED."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    scale = tl.load(inverse + row, mask=row < rows, other=0.0)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if ONE_PLUS:
        factor += 1
    normed = tl.load(total + at, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
    gradient = tl.load(d_out + at, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
    along = tl.sum(gradient * normed, 1) / WIDTH
    result = (gradient - normed * along[:, None]) * scale[:, None]
    if ADDED:
        result += tl.load(d_total + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_x + at, result.to(d_x.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_rows(
    source, target, cos, sin, block, tokens, token_stride, head_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    REST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One block of rows, each a head of a token."""
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // HEADS
    source_row = (source + token * token_stride + row % HEADS * head_stride)[:, None]
    target_row = (target + row * WIDTH)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    real = (token < tokens)[:, None]
    inside = real & (column < HALF)
    angle = token[:, None] * (2 * HALF) + column
    cosine = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        sine = -sine
    first = tl.load(source_row + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source_row + HALF + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(target_row + column, (first * cosine - second * sine).to(target.dtype.element_ty), mask=inside)
    tl.store(target_row + HALF + column, (second * cosine + first * sine).to(target.dtype.element_ty), mask=inside)
    if WIDTH > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, REST)[None, :]
        there = real & (rest < WIDTH)
        tl.store(target_row + rest, tl.load(source_row + rest, mask=there), mask=there)


@triton.jit(do_not_specialize=["tokens", "query_blocks"])
def rotate_kernel(
    query, key, query_out, key_out, cos, sin, tokens, query_blocks,
    query_token_stride, query_head_stride, key_token_stride, key_head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, REST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Blocks of the query's rows first, then of the key's. BACK: by the negative angles."""
    block = tl.program_id(0)
    if block < query_blocks:
        _rotate_rows(
            query, query_out, cos, sin, block, tokens, query_token_stride, query_head_stride,
            HEADS, WIDTH, HALF, ROWS, COLUMNS, REST, BACK,
        )  # fmt: skip
    else:
        _rotate_rows(
            key, key_out, cos, sin, block - query_blocks, tokens, key_token_stride, key_head_stride,
            KV_HEADS, WIDTH, HALF, ROWS, COLUMNS, REST, BACK,
        )  # fmt: skip


@triton.jit
def _sigmoid_and_slope(gate, TANH: tl.constexpr):
    """Both activations are gate * sigmoid(z): z = gate, or 2 sqrt(2 / pi) (gate + 0.044715 gate^3). And dz / dgate."""
    if TANH:
        square = gate * gate
        z = 1.5957691216057308 * gate * (1 + 0.044715 * square)
        slope = 1.5957691216057308 * (1 + 0.134145 * square)
    else:
        z = gate
        slope = 1.0
    return 1 / (1 + tl.exp(-z)), slope


@triton.jit(do_not_specialize=["blocks"])
def gated_kernel(gate, up, out, width, blocks, stride, out_stride, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers of one row a program."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(gate + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid, _ = _sigmoid_and_slope(value, TANH)
    result = value * sigmoid * factor
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def gated_backward_kernel(
    d_out, gate, up, d_gate, d_up, width, blocks, stride, out_stride,
    TANH: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of gate and up, which may lie where gate and up do; AGAIN: the product over d_out."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gradient = tl.load(d_out + row * out_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(gate + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid, slope = _sigmoid_and_slope(value, TANH)
    active = value * sigmoid
    derivative = sigmoid + active * (1 - sigmoid) * slope
    tl.store(d_gate + row * stride + column, (gradient * factor * derivative).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + row * stride + column, (gradient * active).to(d_up.dtype.element_ty), mask=inside)
    if AGAIN:  # in the order of gated_kernel, so that its bits are the same
        tl.store(d_out + row * out_stride + column, (active * factor).to(d_out.dtype.element_ty), mask=inside)


def _power_of_2(size: int) -> int:
    """The least that is not below size."""
    return 1 << (size - 1).bit_length()


def _norm_tiles(x: Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """Grid, number of rows, and how a program's work is cut."""
    width = x.shape[-1]
    block = _power_of_2(width)
    tile = max(NORM_TILE // block, 1)
    rows = x.numel() // width
    warps = min(max(block // 1024, WARPS), 16)
    return (ceil_div(rows, tile),), rows, {"WIDTH": width, "ROWS": tile, "BLOCK": block, "num_warps": warps}


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, one_plus: bool
    ) -> tuple[Tensor, Tensor]:
        given, x = x, x.contiguous()
        added = residual is not None
        total = torch.empty_like(x) if added else x
        out = torch.empty_like(x)
        grid, rows, cut = _norm_tiles(x)
        inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
        other = residual.contiguous() if residual is not None else x
        norm_kernel[grid](x, other, weight, total, out, inverse, rows, eps, ADDED=added, ONE_PLUS=one_plus, **cut)
        ctx.save_for_backward(total, inverse)
        # Frozen; saved like the others, it would pass a recomputing layer's hooks in Python.
        ctx.weight, ctx.added, ctx.one_plus = weight, added, one_plus
        ctx.set_materialize_grads(False)
        return (total if added else given), out

    @staticmethod
    @once_differentiable  # whose type hides the name of ctx
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_total, d_out = grads
        if d_out is None:
            return d_total, (d_total if ctx.added else None), None, None, None
        total, inverse = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_x = torch.empty_like(total)
        passed = d_out if d_total is None else d_total.contiguous()
        grid, rows, cut = _norm_tiles(total)
        norm_backward_kernel[grid](
            d_out, passed, total, ctx.weight, inverse, d_x, rows,
            ADDED=d_total is not None, ONE_PLUS=ctx.one_plus, **cut,
        )  # fmt: skip
        return d_x, (d_x if ctx.added else None), None, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.angles = cos, sin  # every layer's, without a gradient
        return _rotated(query, key, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_rotated(*grads, *ctx.angles, back=True), None, None


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    _, heads, tokens, width = query.shape
    kv_heads, half = key.shape[1], cos.shape[-1] // 2
    query_out, key_out = query.new_empty(1, tokens, heads, width), key.new_empty(1, tokens, kv_heads, width)
    columns = _power_of_2(half)
    rows = max(ROTARY_TILE // columns, 1)
    query_blocks = ceil_div(tokens * heads, rows)
    rotate_kernel[(query_blocks + ceil_div(tokens * kv_heads, rows),)](
        query, key, query_out, key_out, cos, sin, tokens, query_blocks,
        query.stride(2), query.stride(1), key.stride(2), key.stride(1),
        HEADS=heads, KV_HEADS=kv_heads, WIDTH=width, HALF=half, ROWS=rows, COLUMNS=columns,
        REST=_power_of_2(max(width - 2 * half, 1)), BACK=back, num_warps=WARPS,
    )  # fmt: skip
    return query_out.transpose(1, 2), key_out.transpose(1, 2)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, tanh: bool, overwrite: bool) -> Tensor:
        gate, up = gate.contiguous(), None if up is None else up.contiguous()
        ctx.save_for_backward(*(gate,) if up is None else (gate, up))
        ctx.tanh, ctx.overwrite = tanh, overwrite
        return gated_product(gate, up, tanh=tanh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        gradients = saved if ctx.overwrite else [torch.empty_like(one) for one in saved]
        _gated_back(grads[0].contiguous(), saved, gradients, tanh=ctx.tanh, again=False)
        if ctx.overwrite:
            torch.autograd.graph.increment_version(saved)  # a second backward pass raises
            gradients = [one.detach() for one in saved]
        return gradients[0], (gradients[1] if len(saved) == 2 else None), None, None


def _gated_back(
    d_out: Tensor, given: Sequence[Tensor], gradients: Sequence[Tensor], *, tanh: bool, again: bool
) -> None:
    """`given` and `gradients`: gate and up, or one tensor of which they are halves. `again`: the product over d_out."""
    gate, up, width, stride = _halves(*given)
    d_gate, d_up, _, _ = _halves(*gradients)
    grid, cut = _gated_tiles(d_out, width, stride)
    gated_backward_kernel[grid](
        d_out, gate, up, d_gate, d_up, *cut, TANH=tanh, AGAIN=again, BLOCK=GATED_TILE, num_warps=WARPS
    )


def _halves(gate: Tensor, up: Tensor | None = None) -> tuple[Tensor, Tensor, int, int]:
    """Where gate and up begin, how wide they are, and how far apart rows are."""
    if up is not None:
        return gate, up, gate.shape[-1], gate.shape[-1]
    width = gate.shape[-1] // 2
    return gate, gate.view(-1, 2 * width)[:, width:], width, 2 * width


def _gated_tiles(out: Tensor, width: int, stride: int) -> tuple[tuple[int], tuple[int, int, int, int]]:
    """Grid; width, blocks a row, stride and the output's. Rows without a gap are one."""
    if width == stride:
        width = stride = out.numel()
    blocks = ceil_div(width, GATED_TILE)
    return (out.numel() // width * blocks,), (width, blocks, stride, width)
