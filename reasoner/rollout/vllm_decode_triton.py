"""The end of a token's step and the beginning of the next one, on the card: draw, keep what was drawn, move on.

`pick` looks at each tile of the scores once: the best of scores and noise, and what the softmax needs. `take` joins the
tiles, writes down token and logprob, and makes the token the next step's input; `place` says where in the cache the
next step's keys and values go. Rows without a sequence (slot -1) are left alone.

The noise is vLLM's, number for number (Gumbel's, from tl.rand with a seed made of the request's and of the position),
so that a token does not depend on which of the two draws it. Left out: top-k, top-p, penalties.
"""

# Kernels are Python to a type checker, whose loops and constants are none; a launch is a call to it.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

COLUMNS = 4096  # scores a program
PLACES = 128  # rows a program


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What a row of a batch is about; `R` rows at most, of a burst of `T` tokens at most."""

    slots: Tensor  # int32 [R]: the place of its sequence in the runner's tables; -1 for none
    temperatures: Tensor  # float32 [R]; 0 takes the likeliest
    seeds: Tensor  # int64 [R]
    steps: Tensor  # int32 [R]: tokens drawn in this burst
    drawn: Tensor  # int32 [T, 2, R]: tokens, and the bits of their float32 logprobs

    @classmethod
    def empty(cls, num_rows: int, num_tokens: int, device: torch.device) -> "Rows":
        """Without a sequence."""
        int32: Any = {"dtype": torch.int32, "device": device}
        return cls(
            torch.full((num_rows,), -1, **int32),
            torch.zeros(num_rows, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
            torch.zeros(num_rows, **int32),
            torch.zeros(num_tokens, 2, num_rows, **int32),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Of each tile of a row's scores: the best noisy score, its token and plain score; the largest, sum of odds."""

    values: Tensor  # float32 [R, tiles], and so on
    tokens: Tensor  # int32
    scores: Tensor
    largest: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, num_rows: int, num_columns: int, device: torch.device) -> "Tiles":
        """For scores [num_rows, num_columns]."""
        size = num_rows, triton.cdiv(num_columns, COLUMNS)
        floats = [torch.zeros(size, device=device) for _ in range(4)]
        return cls(floats[0], torch.zeros(size, dtype=torch.int32, device=device), *floats[1:])


def pick(scores: Tensor, positions: Tensor, rows: Rows, tiles: Tiles) -> None:
    """Fill `tiles` from `scores` [R, V] of any float dtype, for tokens that come after `positions` [R]."""
    num_rows, num_columns = scores.shape
    kernel: Any = pick_kernel
    kernel[(num_rows, tiles.values.shape[1])](
        scores, scores.stride(0), positions, rows.slots, rows.temperatures, rows.seeds, tiles.values, tiles.tokens,
        tiles.scores, tiles.largest, tiles.sums, num_columns, tiles.values.shape[1], COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip


def take(
    tiles: Tiles, rows: Rows, num_rows: int, vocabulary: int, last: Tensor, computed: Tensor, token_ids: Tensor,
    positions: Tensor, lengths: Tensor,
) -> None:  # fmt: skip
    """Draw the first `num_rows` rows' tokens into `rows.drawn`, and go on: each becomes `last` of its slot and its
    row's input of the next step, one position further: `computed` [slots], `token_ids`, `positions`, `lengths` [R]."""
    kernel: Any = take_kernel
    kernel[(num_rows,)](
        tiles.values, tiles.tokens, tiles.scores, tiles.largest, tiles.sums, tiles.values.shape[1], rows.slots,
        rows.steps, rows.drawn, rows.drawn.stride(0), rows.drawn.stride(1), vocabulary, last, computed, token_ids,
        positions, lengths, TILES=triton.next_power_of_2(tiles.values.shape[1]), num_warps=1,
    )  # fmt: skip


def place(slots: Tensor, positions: Tensor, table: Tensor, block_size: int, out: Tensor) -> None:
    """The place in the cache of each row's position: out int64 [R], -1 for rows without a sequence and behind the end
    of their row in `table` int32 [R, blocks]."""
    num_rows = len(out)
    kernel: Any = place_kernel
    kernel[(triton.cdiv(num_rows, PLACES),)](
        slots, positions, table, table.stride(0), table.shape[1], block_size, out, num_rows, PLACES=PLACES
    )


@triton.jit
def pick_kernel(
    scores_ptr, stride, positions_ptr, slots_ptr, temperatures_ptr, seeds_ptr, values_ptr, tokens_ptr, best_ptr,
    largest_ptr, sums_ptr, num_columns, num_tiles, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0), tl.program_id(1)
    if tl.load(slots_ptr + row) < 0:
        return
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < num_columns
    scores = tl.load(scores_ptr + row.to(tl.int64) * stride + columns, mask=there, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures_ptr + row)
    if temperature != 0.0:
        scores = scores / temperature
    noisy = scores
    if temperature != 0.0:
        seed = tl.randint(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        # The smallest that tl.rand gives but 0, so that the logarithm is finite. Small numbers make the large noise.
        uniform = tl.maximum(tl.rand(seed, columns), 4.6566127342e-10)
        noisy = scores - tl.log(-libdevice.log1p(-uniform))
    value, index = tl.max(tl.where(there, noisy, float("-inf")), axis=0, return_indices=True)
    largest = tl.max(scores, axis=0)
    here = row * num_tiles + tile
    tl.store(values_ptr + here, value)
    tl.store(tokens_ptr + here, tile * COLUMNS + index)
    tl.store(best_ptr + here, tl.sum(tl.where(tl.arange(0, COLUMNS) == index, scores, 0.0), axis=0))
    tl.store(largest_ptr + here, largest)
    tl.store(sums_ptr + here, tl.sum(tl.where(there, tl.exp(scores - largest), 0.0), axis=0))


@triton.jit
def take_kernel(
    values_ptr, tokens_ptr, best_ptr, largest_ptr, sums_ptr, num_tiles, slots_ptr, steps_ptr, drawn_ptr, step_stride,
    kind_stride, vocabulary, last_ptr, computed_ptr, token_ids_ptr, positions_ptr, lengths_ptr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    tiles = tl.arange(0, TILES)
    there = tiles < num_tiles
    here = row * num_tiles + tiles
    _, chosen = tl.max(tl.load(values_ptr + here, mask=there, other=float("-inf")), axis=0, return_indices=True)
    largest = tl.load(largest_ptr + here, mask=there, other=float("-inf"))
    most = tl.max(largest, axis=0)
    odds = tl.sum(tl.load(sums_ptr + here, mask=there, other=0.0) * tl.exp(largest - most), axis=0)
    logprob = tl.load(best_ptr + row * num_tiles + chosen) - most - tl.log(odds)
    # Scores that are not numbers have no best; the token has to be one all the same, for the next step reads its row.
    token = tl.minimum(tl.load(tokens_ptr + row * num_tiles + chosen), vocabulary - 1)
    step = tl.load(steps_ptr + row)
    tl.store(steps_ptr + row, step + 1)
    tl.store(drawn_ptr + step * step_stride + row, token)
    tl.store(drawn_ptr + step * step_stride + kind_stride + row, logprob.to(tl.int32, bitcast=True))
    tl.store(last_ptr + slot, token.to(tl.int64))
    position = tl.load(computed_ptr + slot) + 1
    tl.store(computed_ptr + slot, position)
    tl.store(token_ids_ptr + row, token)
    tl.store(positions_ptr + row, position.to(tl.int64))
    tl.store(lengths_ptr + row, position + 1)


@triton.jit
def place_kernel(
    slots_ptr, positions_ptr, table_ptr, stride, num_blocks, block_size, out_ptr, num_rows, PLACES: tl.constexpr
):
    rows = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    there = rows < num_rows
    position = tl.load(positions_ptr + rows, mask=there, other=0)
    block = position // block_size
    valid = there & (tl.load(slots_ptr + rows, mask=there, other=-1) >= 0) & (block < num_blocks)
    number = tl.load(table_ptr + rows.to(tl.int64) * stride + block, mask=valid, other=0).to(tl.int64)
    tl.store(out_ptr + rows, tl.where(valid, number * block_size + position % block_size, -1), mask=there)
