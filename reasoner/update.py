"""The update loop (contract first; the loop follows)."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

from torch import Tensor

Normalizer = Literal["tokens", "sequences", "constant"]


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What a whole step trains, over all ranks, counted from whole sequences at collate and never from a micro-batch."""

    tokens: int  # trained tokens
    sequences: int  # completions with at least one trained token
    groups: int
    constant: float  # sequences x the longest completion allowed, in tokens

    def of(self, normalizer: Normalizer) -> float:
        """The number that a sum with this normalizer is divided by; at least 1, so that an empty step divides nothing by zero."""
        return max(float(getattr(self, normalizer)), 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """A loss over some sequences: a differentiable scalar sum, what the step divides it by, and metrics.

    `metrics` hold detached scalars: a name ending in `_max` is combined by max, every other is a sum over trained tokens.
    """

    sum: Tensor
    normalizer: Normalizer
    metrics: dict[str, Tensor]


class Batch(Protocol):
    """What the updater can cut: packed sequences with the counts of the whole step."""

    token_ids: Tensor
    completion_mask: Tensor
    layout: Any

    @property
    def counts(self) -> StepCounts: ...

    def split(self, max_tokens: int) -> list[Self]:
        """Whole sequences in pieces of at most max_tokens (a longer sequence is a piece of its own)."""
        ...
