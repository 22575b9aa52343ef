"""Judged groups as packed tensors, cut into micro-batches, seen by a loss. B sequences, N tokens, M of them trained.

Four records, each made once from the one before:

    PackedBatch    what any logprob pass needs (SFT's batch is one too)
    RolloutBatch   + sampling logprobs, advantages and the counts of the whole step: what the engine and rewards gave
    TrainBatch     + what forward passes before the first update gave, where the step has such: what a loss is made on
    LossInputs     the trained tokens of a micro-batch (losses.py)

Completions of one prompt each have its tokens before them: index t speaks of token t, in every vector. That a pass
computes them once is the layout's matter (`Layout.shared`), and shows here in what a piece of a batch costs alone.
Left out: padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, groupby
from typing import Any, Self

import torch
from torch import Tensor

from reasoner import world
from reasoner.grpo.advantages import JudgedGroup
from reasoner.grpo.losses import LossInputs
from reasoner.kernels.linear_logprobs import Logprobs
from reasoner.models.attention import Layout
from reasoner.types import Completion, Group, Prompt
from reasoner.update import StepCounts

PER_SEQUENCE = {"per": "sequence"}
# A copy of a prompt's token has its keys and values moved through memory in each layer, there and back. By arithmetic
# that takes less than 3% of the time of the matmuls it saves, also in small models, where keys are a larger part. So a
# prompt is shared if that saves at least one token in 32.
SHARED_FROM = 32
# Tokens that a piece may hold with the copies, by the tokens that it computes: bounds the memory of keys and values.
WITH_COPIES = 2
Row = tuple[Prompt, Completion, tuple[bool, ...]]  # the last: which completion tokens are trained


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Prompts with their completions, side by side.

    >>> PackedBatch(token_ids=tensor([5, 3, 6, 1, 5, 9, 7]), layout=Layout.of([4, 3]),
    ...             completion_mask=tensor([False, False, True, True, False, False, True]))
    """

    token_ids: Tensor  # int64 [N]
    layout: Layout
    completion_mask: Tensor  # bool [N], True = trained
    # What was asked of the mask once: its answer waits for the device, and pieces are told by whom they are cut from.
    _found: dict[str, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        shape = (sum(self.layout.lengths),)
        assert self.token_ids.shape == shape and self.token_ids.dtype == torch.int64
        assert self.completion_mask.shape == shape and self.completion_mask.dtype == torch.bool

    @property
    def targets(self) -> Tensor:
        """The trained tokens: int64 [M]. None of them is a sequence's first, which nothing predicts."""
        self._look()
        return self._found["targets"]

    def trained(self, values: Tensor) -> Tensor:
        """The values of the trained tokens: [N] -> [M]."""
        return values.index_select(0, self.targets)

    def _look(self) -> None:
        """Find the trained tokens, and on the host where each sequence's begin among them; once."""
        if self._found:
            return
        targets = self.completion_mask.nonzero()[:, 0]
        ends = torch.searchsorted(targets, self.layout.cu_seqlens.long())
        firsts = (self.layout.positions[targets] == 0).sum()
        *begins, num_firsts = torch.cat([ends, firsts[None]]).tolist()
        assert not num_firsts, "a sequence's first token can't be predicted: nothing is before it"
        self._found.update(targets=targets, begins=begins)

    def split(self, max_tokens: int) -> list[Self]:
        """Whole sequences, in order, in pieces of at most max_tokens; a longer sequence is a piece of its own.

        A prompt that a piece's sequences share counts once, and its copies up to as much again. A cut between them
        leaves each side a prompt of its own. Without sequences there are no pieces. Tensors are views; what speaks of
        the whole step stays.
        """
        self._look()
        return [self._piece(first, last) for first, last in _cuts(self.layout, max_tokens)]

    def _piece(self, first: int, last: int) -> Self:
        begins = [0, *accumulate(self.layout.lengths)]
        tokens, sequences = slice(begins[first], begins[last]), slice(first, last)
        tensors = {
            f.name: value[sequences if f.metadata == PER_SEQUENCE else tokens]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        piece = replace(self, layout=self.layout.part(first, last), **tensors)
        among = self._found["begins"][first : last + 1]
        targets = self._found["targets"][among[0] : among[-1]] - begins[first]
        piece._found.update(targets=targets, begins=[place - among[0] for place in among])
        return piece


@dataclass(frozen=True, slots=True, eq=False)
class RolloutBatch(PackedBatch):
    """What the step sampled and judged. `counts` speak of the whole step, over all ranks, whatever rows left.

    >>> counts = StepCounts(tokens=3, sequences=2, groups=1, constant=2 * 8)
    >>> RolloutBatch(**packed, sampling_logprobs=tensor([0.0, 0.0, -0.2, -0.01, 0.0, 0.0, -1.3]),
    ...              advantages=tensor([1.5, -0.5]), counts=counts)
    """

    sampling_logprobs: Tensor  # float32 [N], 0.0 where not sampled
    advantages: Tensor = field(metadata=PER_SEQUENCE)  # float32 [B]
    counts: StepCounts

    def __post_init__(self) -> None:
        PackedBatch.__post_init__(self)
        assert self.sampling_logprobs.shape == self.token_ids.shape and self.sampling_logprobs.dtype == torch.float32
        assert self.advantages.shape == (self.layout.num_sequences,) and self.advantages.dtype == torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatch(RolloutBatch):
    """What a loss is made on. Whether it has old and reference logprobs is settled when it is made: a None stays None.

    >>> TrainBatch(**rollout, old_logprobs=None, ref_logprobs=None)  # one inner step, no KL in the loss
    """

    # float32 [N], from before the first of several updates; None: there is one update, and old is the current, detached
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None  # float32 [N]; None: no KL in the loss

    def __post_init__(self) -> None:
        RolloutBatch.__post_init__(self)
        for tensor in (self.old_logprobs, self.ref_logprobs):
            if tensor is not None:
                assert (
                    tensor.shape == self.token_ids.shape and tensor.dtype == torch.float32 and not tensor.requires_grad
                )


def train_batch(batch: RolloutBatch, *, old_logprobs: Tensor | None, ref_logprobs: Tensor | None) -> TrainBatch:
    """The rollout with what was computed before the update, each [N] or None as TrainBatch says."""
    rollout = {f.name: getattr(batch, f.name) for f in fields(RolloutBatch) if f.init}
    return TrainBatch(**rollout, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)


def pack(
    groups: Sequence[Group], device: torch.device | str | None = None, *, share_prompts: bool = False
) -> PackedBatch:
    """Every completion of every group, in order, all its sampled tokens trained: what `kl.sequence_kl` goes through."""
    rows = [(group.prompt, c, c.sampled) for group in groups for c in group.completions]
    return PackedBatch(**_packed(rows, device, share_prompts))


def collate(
    judged: Sequence[JudgedGroup],
    *,
    mask_cut: bool,
    max_completion_tokens: int,
    drop_dead: bool,
    device: torch.device | str | None = None,
    share_prompts: bool = False,
) -> RolloutBatch:
    """The step's completions as one packed batch, and the counts that its loss is divided by. Every rank has to call.

    The sampled tokens of a completion are trained. With `mask_cut` those of a completion that hit the limit are not,
    and it counts for nothing. The counts are taken from all completions, failed and dead ones too, and only then rows
    leave: those without a trained token, and with `drop_dead` those whose advantage is exactly 0 (their loss is 0; keep
    them where KL or entropy is in the loss). So a batch may have no sequences at all. With `share_prompts` the layout
    says which of those that are left begin with the same prompt, where computing it once pays.
    """
    rows: list[tuple[Row, float]] = []
    for group in judged:
        for completion, advantage in zip(group.group.completions, group.advantages, strict=True):
            masked = mask_cut and completion.finish_reason == "length"
            trained = (False,) * len(completion.sampled) if masked else completion.sampled
            rows.append(((group.group.prompt, completion, trained), advantage))
    live = [(row, advantage) for row, advantage in rows if any(row[2])]
    counts = _step_counts([row for row, _ in live], len(judged), max_completion_tokens)
    kept = [(row, advantage) for row, advantage in live if not (drop_dead and advantage == 0)]
    sampling = [
        value
        for (prompt, completion, _), _ in kept
        for value in (0.0,) * len(prompt.token_ids) + completion.sampling_logprobs
    ]
    return RolloutBatch(
        **_packed([row for row, _ in kept], device, share_prompts),
        sampling_logprobs=torch.tensor(sampling, dtype=torch.float32).to(device),
        advantages=torch.tensor([advantage for _, advantage in kept], dtype=torch.float32).to(device),
        counts=counts,
    )


def loss_inputs(batch: TrainBatch, logprobs: Logprobs) -> LossInputs:
    """The trained tokens of a micro-batch, from the current policy's [N]; weights are 1 until `Mismatch` sets them."""
    current = batch.trained(logprobs.logprobs)
    old = current.detach() if batch.old_logprobs is None else batch.trained(batch.old_logprobs).to(current.dtype)
    sequence = trained_sequences(batch)
    return LossInputs(
        logprobs=current,
        old_logprobs=old,
        sampling_logprobs=batch.trained(batch.sampling_logprobs).to(current.dtype),
        advantages=batch.advantages[sequence].to(current.dtype),
        weights=torch.ones_like(current),
        entropy=batch.trained(logprobs.entropy),
        sequence=sequence,
        num_sequences=batch.layout.num_sequences,
    )


def trained_sequences(batch: PackedBatch) -> Tensor:
    """Which sequence each trained token belongs to: int64 [M]."""
    return batch.trained(batch.layout.sequence_ids)


def _cuts(layout: Layout, max_tokens: int) -> Iterator[tuple[int, int]]:
    """Greedy runs first..last-1 of sequences with at most max_tokens of their own together, and WITH_COPIES as many
    with copies, or one that is longer."""
    first, own, whole = 0, 0, 0
    for i, (length, shared) in enumerate(zip(layout.lengths, layout.shared, strict=True)):
        if i > first and (own + length - shared > max_tokens or whole + length > WITH_COPIES * max_tokens):
            yield first, i
            first, own, whole = i, 0, 0
        own += length - (shared if i > first else 0)
        whole += length
    if first < layout.num_sequences:
        yield first, layout.num_sequences


def _step_counts(rows: Sequence[Row], num_groups: int, max_completion_tokens: int) -> StepCounts:
    own = (sum(sum(trained) for _, _, trained in rows), len(rows), num_groups)
    tokens, sequences, groups = (sum(of_ranks) for of_ranks in zip(*world.gather_over_ranks(own), strict=True))
    return StepCounts(
        tokens=tokens, sequences=sequences, groups=groups, constant=float(sequences * max_completion_tokens)
    )


def _packed(rows: Sequence[Row], device: torch.device | str | None, share_prompts: bool) -> dict[str, Any]:
    ids: list[int] = []
    mask: list[bool] = []
    for prompt, completion, trained in rows:
        assert prompt.token_ids, f"prompt {prompt.id} has no tokens to predict its completion's first token from"
        ids += prompt.token_ids + completion.token_ids
        mask += (False,) * len(prompt.token_ids) + trained
    lengths = [len(prompt.token_ids) + len(completion.token_ids) for prompt, completion, _ in rows]
    return {
        "token_ids": torch.tensor(ids, dtype=torch.int64).to(device),
        "layout": Layout.of(lengths, device, shared=_shared(rows) if share_prompts else None),
        "completion_mask": torch.tensor(mask, dtype=torch.bool).to(device),
    }


def _shared(rows: Sequence[Row]) -> list[int]:
    """`Layout.shared` of the rows: neighbours whose prompts have the same ids share them, where that pays."""
    found: list[int] = []
    for ids, run in groupby(rows, key=lambda row: row[0].token_ids):
        lengths = [len(ids) + len(completion.token_ids) for _, completion, _ in run]
        pays = SHARED_FROM * len(ids) * (len(lengths) - 1) >= sum(lengths)
        # A sequence computes at least one token, also where nothing was sampled.
        found += [0, *(min(len(ids), length - 1) for length in lengths[1:])] if pays else [0] * len(lengths)
    return found
