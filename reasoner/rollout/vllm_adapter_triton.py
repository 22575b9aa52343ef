"""What an adapter adds to a layer's product, of all its parts in one launch: base + bias + scaling * low B^T; and what
an MLP makes of its gate and up projections, in the same launch.

Few rows and hundreds of layers a token: it is the number of launches that costs, and how often each waits for memory,
not what they compute. So a tile knows its part by its number and constants alone, and asks for all that it reads before
it computes. Left out: low itself, x A^T, which is a matmul, or rows of the base's own.
"""

# Kernels are Python to a type checker, whose loops and constants are none; a launch is a call to it.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

Bounds = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows x columns that a program writes in calls of at most so many rows. Each is compiled once a kind of layer."""

    most: float
    rows: int
    columns: int
    warps: int = 4


# Few rows: tiles of which a thread reads each operand (at rank 32) in one load of 16 bytes, and many of them: 64 rows
# of 1,536 columns, the fewest at 1.5B, are 96, where an H100 has 132 multiprocessors. Many rows: larger tiles read low
# and B less often. At 256 rows gate and up of 1.5B move 14 MB, and these 18 more in tiles of 32 x 32, 9 in 64 x 64.
JOIN_TILES = Tile(16, 16, 32), Tile(256, 32, 32), Tile(float("inf"), 64, 64)
GATED_TILES = Tile(16, 16, 32), Tile(64, 32, 32), Tile(float("inf"), 64, 64, warps=8)
RANKS = 16, 128  # of a tile, at least and at most: tensor cores take no less, and home cards' shared memory no more


def join(
    out: Tensor, base: Tensor, low: Tensor, b: Tensor, bounds: Bounds, bias: Tensor | None, scaling: float
) -> None:
    """Write `out` [N, O], which may be `base` [N, O] itself; `low` [N, S r], `b` [O, r], `bias` [O].

    `bounds` says which columns of `out` each of the S parts begins and ends with; part s has columns s r to (s + 1) r
    of `low`. Sums are float32. Rows may lie apart, numbers of a row may not.
    """
    assert low.shape[1] >= len(bounds) * b.shape[1] and b.shape[0] == base.shape[1], (low.shape, b.shape, base.shape)
    tile = next(tile for tile in JOIN_TILES if len(out) <= tile.most)
    segments, tiles = _segments(bounds, out.shape[1], tile.columns)
    _launch(join_kernel, tile, tiles, out, base, low, b, bias, scaling, SEGMENTS=segments)


def join_gated(
    out: Tensor,
    base: Tensor,
    low: Tensor,
    b: Tensor,
    bounds: Bounds,
    bias: Tensor | None,
    scaling: float,
    *,
    tanh: bool,
) -> None:
    """Write `out` [N, I] = silu(gate) * up, or by gelu's tanh form, where gate and up are the halves of what `join`
    would write for O = 2 I, rounded as there. A part is of one half, or of both."""
    width = out.shape[1]
    assert low.shape[1] >= len(bounds) * b.shape[1] and b.shape[0] == base.shape[1], (low.shape, b.shape, base.shape)
    tile = next(tile for tile in GATED_TILES if len(out) <= tile.most)
    parts = _part(bounds, 0, width), _part(bounds, width, 2 * width)
    assert base.shape[1] == 2 * width and set(parts) >= set(range(len(bounds))), (bounds, base.shape)
    tiles = triton.cdiv(width, tile.columns)
    _launch(join_gated_kernel, tile, tiles, out, base, low, b, bias, scaling, WIDTH=width, PARTS=parts, TANH=tanh)


def _segments(bounds: Bounds, outputs: int, columns: int) -> tuple[tuple[tuple[int, int, int, int], ...], int]:
    """What each part's columns, and those between, are to the kernel, and how many tiles they have: the first tile, by
    how many columns the tiles up to there are more than the columns, where they end, and the part."""
    found, first = [], 0
    for begin, end in pairwise(sorted({0, outputs, *chain(*bounds)})):
        found.append((first, first * columns - begin, end, _part(bounds, begin, end)))
        first += -(-(end - begin) // columns)
    return tuple(found), first


def _part(bounds: Bounds, begin: int, end: int) -> int:
    """The part that these columns are of; -1: none."""
    return next((i for i, (first, last) in enumerate(bounds) if first <= begin and end <= last), -1)


def _launch(
    kernel: Any, tile: Tile, tiles: int, out: Tensor, base: Tensor, low: Tensor, b: Tensor, bias: Tensor | None,
    scaling: float, **constants: Any,
) -> None:  # fmt: skip
    rank = b.shape[1]
    assert out.stride(1) == base.stride(1) == low.stride(1) == b.stride(1) == 1 and b.is_contiguous()
    ranks = min(max(RANKS[0], triton.next_power_of_2(rank)), RANKS[1])
    kernel[triton.cdiv(len(out), tile.rows), tiles](
        out, base, low, b, bias, scaling, len(out), out.stride(0), base.stride(0), low.stride(0),
        **constants, RANK=rank, RANKS=ranks, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip


@triton.jit
def _base(base_ptr, bias_ptr, rows, real, columns, inside, base_stride):
    """[ROWS, COLUMNS] of the base, as it is, so that nothing waits for it yet; [1, COLUMNS] of the bias, or 0."""
    there = real[:, None] & inside[None, :]
    base = tl.load(base_ptr + rows[:, None] * base_stride + columns[None, :], mask=there, other=0.0)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return base, bias


@triton.jit
def _factors(
    low_ptr, b_ptr, rows, real, columns, inside, part, first, low_stride, RANK: tl.constexpr, RANKS: tl.constexpr
):
    """A tile of ranks of low [ROWS, RANKS] and of B^T [RANKS, COLUMNS]; zeros where there is no part."""
    ranks = first + tl.arange(0, RANKS)
    there = (ranks < RANK) & (part >= 0)
    low = tl.load(
        low_ptr + rows[:, None] * low_stride + (part * RANK + ranks)[None, :],
        mask=real[:, None] & there[None, :],
        other=0.0,
    )
    b = tl.load(
        b_ptr + columns[None, :].to(tl.int64) * RANK + ranks[:, None], mask=inside[None, :] & there[:, None], other=0.0
    )
    return low, b


@triton.jit(do_not_specialize=["num_rows"])
def join_kernel(
    out_ptr, base_ptr, low_ptr, b_ptr, bias_ptr, scaling, num_rows, out_stride, base_stride, low_stride,
    SEGMENTS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    shift = SEGMENTS[0][1]
    end = SEGMENTS[0][2]
    part = SEGMENTS[0][3]
    for i in tl.static_range(1, len(SEGMENTS)):
        here = tile >= SEGMENTS[i][0]
        shift = tl.where(here, SEGMENTS[i][1], shift)
        end = tl.where(here, SEGMENTS[i][2], end)
        part = tl.where(here, SEGMENTS[i][3], part)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tile * COLUMNS - shift + tl.arange(0, COLUMNS)
    real = rows < num_rows
    inside = columns < end
    base, bias = _base(base_ptr, bias_ptr, rows, real, columns, inside, base_stride)
    added = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.static_range(0, RANK, RANKS):
        low, b = _factors(low_ptr, b_ptr, rows, real, columns, inside, part, first, low_stride, RANK, RANKS)
        added = tl.dot(low, b, added, input_precision="ieee")
    total = base.to(tl.float32) + bias + scaling * added
    there = real[:, None] & inside[None, :]
    tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_rows"])
def join_gated_kernel(
    out_ptr, base_ptr, low_ptr, b_ptr, bias_ptr, scaling, num_rows, out_stride, base_stride, low_stride,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, TANH: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    others = WIDTH + columns
    real = rows < num_rows
    inside = columns < WIDTH
    gate, gate_bias = _base(base_ptr, bias_ptr, rows, real, columns, inside, base_stride)
    up, up_bias = _base(base_ptr, bias_ptr, rows, real, others, inside, base_stride)
    to_gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    to_up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.static_range(0, RANK, RANKS):
        low, b = _factors(low_ptr, b_ptr, rows, real, columns, inside, PARTS[0], first, low_stride, RANK, RANKS)
        low_2, b_2 = _factors(low_ptr, b_ptr, rows, real, others, inside, PARTS[1], first, low_stride, RANK, RANKS)
        to_gate = tl.dot(low, b, to_gate, input_precision="ieee")
        to_up = tl.dot(low_2, b_2, to_up, input_precision="ieee")
    # Rounded, as the trainer's activation reads them (kernels/elementwise_triton.py, whose formula and order follow).
    gate = (gate.to(tl.float32) + gate_bias + scaling * to_gate).to(out_ptr.dtype.element_ty).to(tl.float32)
    up = (up.to(tl.float32) + up_bias + scaling * to_up).to(out_ptr.dtype.element_ty).to(tl.float32)
    z = gate
    if TANH:
        z = 1.5957691216057308 * gate * (1 + 0.044715 * (gate * gate))
    result = gate * (1 / (1 + tl.exp(-z))) * up
    there = real[:, None] & inside[None, :]
    tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], result.to(out_ptr.dtype.element_ty), mask=there)
