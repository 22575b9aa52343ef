"""What an adapter adds to a layer's product, of all its parts in one launch: out = base + bias + scaling * low B^T.

Few rows and hundreds of layers a token: it is the number of launches that costs, not what they compute. Left out: low
itself, x A^T, which is a matmul, or rows of the base's own.
"""

# Kernels are Python to a type checker, whose loops and constants are none; a launch is a call to it.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 64
ROWS = (16, 32, 64)  # of a tile; the smallest that takes all, else the largest
RANKS = 16, 256  # of a tile, at least and at most: tensor cores take no less, and home cards' shared memory no more


def join(
    out: Tensor, base: Tensor, low: Tensor, b: Tensor, bounds: Tensor, bias: Tensor | None, scaling: float
) -> None:
    """Write `out` [N, O], which may be `base` [N, O] itself; `low` [N, S r], `b` [O, r], `bias` [O].

    `bounds` int32 [S, 2] says which columns of `out` each part begins and ends with; part s has columns s r to
    (s + 1) r of `low`. Sums are float32. Rows may lie apart, numbers of a row may not.
    """
    num_rows, num_columns = out.shape
    num_parts, rank = len(bounds), b.shape[1]
    assert low.shape[1] >= num_parts * rank and out.stride(1) == base.stride(1) == low.stride(1) == b.stride(1) == 1
    rows = next((size for size in ROWS if size >= num_rows), ROWS[-1])
    ranks = min(max(RANKS[0], triton.next_power_of_2(rank)), RANKS[1])
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(num_columns, COLUMNS))
    kernel: Any = join_kernel
    kernel[grid](
        out, base, low, b, bounds, bias, scaling, num_rows, num_columns, out.stride(0), base.stride(0), low.stride(0),
        rank, PARTS=num_parts, RANKS=ranks, TILES=triton.cdiv(rank, ranks), ROWS=rows, COLUMNS=COLUMNS,
    )  # fmt: skip


@triton.jit
def join_kernel(
    out_ptr, base_ptr, low_ptr, b_ptr, bounds_ptr, bias_ptr, scaling, num_rows, num_columns, out_stride, base_stride,
    low_stride, rank, PARTS: tl.constexpr, RANKS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * COLUMNS
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = first + tl.arange(0, COLUMNS)
    there = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    total = tl.load(base_ptr + rows[:, None] * base_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    for part in tl.static_range(PARTS):
        begin = tl.load(bounds_ptr + 2 * part)
        end = tl.load(bounds_ptr + 2 * part + 1)
        if (begin < first + COLUMNS) & (end > first):
            own = (columns >= begin) & (columns < end)
            for tile in tl.static_range(TILES):
                ranks = tile * RANKS + tl.arange(0, RANKS)
                low = tl.load(
                    low_ptr + rows[:, None] * low_stride + part * rank + ranks[None, :],
                    mask=(rows < num_rows)[:, None] & (ranks < rank)[None, :],
                    other=0.0,
                )
                b = tl.load(
                    b_ptr + columns[None, :].to(tl.int64) * rank + ranks[:, None],
                    mask=own[None, :] & (ranks < rank)[:, None],
                    other=0.0,
                )
                total += scaling * tl.dot(low, b, input_precision="ieee")
    tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=there)
