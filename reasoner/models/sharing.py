"""Prefixes that stand once in a packed row, however many sequences begin with them.

Eight completions of a prompt repeat its tokens eight times, and every copy has the same hidden states: causal, none of
them sees a completion. So those of the first sequence are computed, and whoever needs a copy takes them: attention as
keys and values, the loss head as what predicts a completion's first token. The gradient of a row that is taken several
times is the sum over its copies, in float32 and in one order, so that the same batch gives the same bits. Left out:
prefixes of prefixes (a tree), and keys that a kernel would read in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Which row of a tensor [R, ..] each of M takes, several the same one. Made with `Places.of`.

    >>> places = Places.of(torch.tensor([0, 1, 2, 1]), 3)
    >>> places.copies, places.begins  # row 1 is taken by 1 and 3
    (tensor([0, 1, 3, 2]), tensor([0, 1, 3]))
    """

    rows: Tensor  # int64 [M]
    copies: Tensor  # int64 [M], the takers by the row they take
    begins: Tensor  # int64 [R], where each row's takers begin in `copies`

    @classmethod
    def of(cls, rows: Tensor, num_rows: int) -> Self:
        """Places of these rows among `num_rows`."""
        ordered, copies = rows.sort(stable=True)
        return cls(rows, copies, torch.searchsorted(ordered, torch.arange(num_rows, device=rows.device)))

    def take(self, x: Tensor) -> Tensor:
        """[R, ..] -> [M, ..]; a row's gradient is the sum of its takers', rounded once."""
        taken = _Take.apply(x, self)
        assert isinstance(taken, Tensor)
        return taken


class _Take(torch.autograd.Function):
    """x.index_select(0, rows), whose own backward adds in whatever order the card's threads come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return x.index_select(0, places.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        places = ctx.places
        flat = gradient.flatten(1)
        # A bag's sum: one thread adds a bag's rows one after the other, 16-bit ones in float32.
        summed = embedding_bag(places.copies, flat, places.begins, mode="sum")
        return summed.view(-1, *gradient.shape[1:]), None


@dataclass(frozen=True, slots=True, eq=False)
class Sharing:
    """Of N packed tokens in B sequences the R that are computed, and where all N find themselves among these.

    >>> sharing = Layout.of([4, 3], shared=[0, 2]).sharing()  # a prompt of two tokens and its two completions
    >>> sharing.own, sharing.places.rows, sharing.cu_seqlens
    (tensor([0, 1, 2, 3, 6]), tensor([0, 1, 2, 3, 0, 1, 4]), tensor([0, 4, 5], dtype=torch.int32))
    """

    own: Tensor  # int64 [R], the tokens that are computed
    places: Places  # N places in R rows
    cu_seqlens: Tensor  # int32 [B + 1], where each sequence's own tokens begin among the R
    max_seqlen: int  # the most own tokens of a sequence

    @classmethod
    def of(cls, lengths: Sequence[int], shared: Sequence[int], positions: Tensor, sequence_ids: Tensor) -> Self:
        """Of a layout's numbers: see `Layout.shared`."""
        own_lengths = [length - taken for length, taken in zip(lengths, shared, strict=True)]
        begins, tokens = [0, *accumulate(own_lengths)], [0, *accumulate(lengths)]
        # Of each sequence: how many tokens it shares, what their rows and its own are beyond their positions, how far
        # its own tokens are beyond their rows, and where they begin, which is the last row's only number.
        table: list[tuple[int, int, int, int, int]] = []
        owner = 0
        for token, begin, taken in zip(tokens[:-1], begins[:-1], shared, strict=True):
            owner = owner if taken else begin
            table.append((taken, owner, begin - taken, token + taken - begin, begin))
        table.append((0, 0, 0, 0, begins[-1]))
        there = _sent(table, positions.device)
        taken, of_shared, of_own = there[sequence_ids, :3].unbind(1)
        rows = positions + torch.where(positions >= taken, of_own, of_shared)
        shifts = there[:-1, 3].repeat_interleave(there[:, 4].diff(), output_size=begins[-1])
        return cls(
            own=torch.arange(begins[-1], device=positions.device) + shifts,
            places=Places.of(rows, begins[-1]),
            cu_seqlens=there[:, 4].to(torch.int32),
            max_seqlen=max(own_lengths),
        )

    def take(self, x: Tensor, tokens: Tensor) -> Tensor:
        """What was computed for these of the N tokens: [R, ..], [M] -> [M, ..]."""
        return Places.of(self.places.rows[tokens], len(x)).take(x)


def _sent(table: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64, like the table. From page-locked memory, so that neither waits for the other."""
    numbers = torch.tensor(table)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)
