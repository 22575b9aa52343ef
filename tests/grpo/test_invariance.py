"""What must not change a gradient, in float64 at 1e-10: the cut into micro-batches, the order, dead rows, masked tails.

The policy is a table of next-token logits by the token before, so a wrong neighbour, position or count would show.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reasoner.grpo.advantages import JudgedGroup, judge
from reasoner.grpo.batch import PackedBatch, TrainBatch, collate, loss_inputs, train_batch
from reasoner.grpo.kl import k2
from reasoner.grpo.losses import (
    Bnpo,
    Cispo,
    Dapo,
    DrGrpo,
    Gmpo,
    Grpo,
    Gspo,
    Loss,
    LossInputs,
    Nll,
    Sapo,
    reduce,
)
from reasoner.grpo.mismatch import Mismatch
from reasoner.kernels.linear_logprobs import Logprobs
from reasoner.types import Completion, Group, Prompt, Score
from reasoner.update import LossOutput

VOCABULARY = 11
LOSSES = [
    Grpo(),
    DrGrpo(dual_clip=1.5),
    Dapo(),
    Bnpo(clip_max=1.4),
    Gspo(0.1, 0.1),
    Gspo(0.1, 0.1, token_level=True),
    Cispo(clip_high=0.3),
    Sapo(),
    Gmpo(0.2, 0.2),
    Nll(),
]
MISMATCHES = [Mismatch("truncate", "token"), Mismatch("truncate", "sequence"), Mismatch("mask", "token", cap=1.3)]


def make_table(seed: int, scale: float) -> Tensor:
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return table + scale * noise


SAMPLING, OLD, NOW, REFERENCE = (make_table(seed, scale) for seed, scale in ((1, 0.2), (2, 0.2), (3, 0.6), (4, 0.5)))


def policy(table: Tensor, batch: PackedBatch) -> Logprobs:
    """Logprobs [N] of a table [V, V]; a sequence's first token is "predicted" from itself, and must not be trained."""
    first = batch.layout.positions == 0
    before = torch.where(first, batch.token_ids, batch.token_ids.roll(1))
    logp = table.log_softmax(1)[before]
    return Logprobs(logp.gather(1, batch.token_ids[:, None])[:, 0], -(logp.exp() * logp).sum(1))


def make_completion(prompt: Sequence[int], ids: Sequence[int], *, cut: bool = False) -> Completion:
    logp = SAMPLING.log_softmax(1)
    before = [prompt[-1], *ids[:-1]]
    logprobs = tuple(logp[b, i].item() for b, i in zip(before, ids, strict=True))
    return Completion(tuple(ids), (True,) * len(ids), logprobs, "", "length" if cut else "stop", 0, 0)


def make_groups(seed: int = 8) -> list[Group]:
    """Four prompts, 2 to 4 completions of 1 to 7 tokens: the second group is dead, the third has a failed reward."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    rewards = [[1.0, 0.0, 0.2], [1.0, 1.0], [1.0, None, 0.2, 0.0], [0.0, 3.0]]
    groups = []
    for n, of_group in enumerate(rewards):
        prompt = Prompt(str(n), "", "", {}, tuple(draw(0, VOCABULARY, 1 + n)))
        completions = [
            make_completion(prompt.token_ids, draw(0, VOCABULARY, *draw(1, 8, 1)), cut=i == 0 and n == 0)
            for i in range(len(of_group))
        ]
        scores = [Score(0.0, {}, {"x": "hung"}) if r is None else Score(r, {}) for r in of_group]
        groups.append(Group(prompt, tuple(completions), tuple(scores)))
    return groups


def make_judged(groups: Sequence[Group] | None = None) -> list[JudgedGroup]:
    return judge(make_groups() if groups is None else groups, advantage="group", scale="none")


def make_batch(judged: Sequence[JudgedGroup], *, drop_dead: bool = False, mask_cut: bool = False) -> TrainBatch:
    rollout = collate(judged, mask_cut=mask_cut, max_completion_tokens=9, drop_dead=drop_dead)
    old, reference = (policy(table, rollout).logprobs.float() for table in (OLD, REFERENCE))
    return train_batch(rollout, old_logprobs=old, ref_logprobs=reference)


def make_objective(loss: Loss, mismatch: Mismatch, *, extras: bool) -> Callable[[TrainBatch, Logprobs], LossOutput]:
    """A loss with its mismatch weights and, with `extras`, KL and entropy terms of the same reduction."""

    def objective(piece: TrainBatch, logprobs: Logprobs) -> LossOutput:
        inputs, gaps = mismatch(loss_inputs(piece, logprobs))
        output = loss(inputs)
        metrics = {**output.metrics, **gaps}
        if not extras:
            return replace(output, metrics=metrics)
        assert piece.ref_logprobs is not None
        kl = k2(inputs.logprobs, piece.trained(piece.ref_logprobs).double())
        total = output.sum + reduce(0.3 * kl - 0.1 * inputs.entropy, inputs, output.normalizer)
        return LossOutput(total, output.normalizer, metrics)

    return objective


def gradient(objective: Callable, pieces: Sequence[TrainBatch]) -> tuple[Tensor, dict[str, float]]:
    """The step's gradient in the table, and its metrics: what the update loop does, without it."""
    table = NOW.clone().requires_grad_()
    metrics: dict[str, float] = {}
    for piece in pieces:
        output = objective(piece, policy(table, piece))
        (output.sum / piece.counts.of(output.normalizer)).backward()
        for name, value in output.metrics.items():
            old = metrics.get(name, 0.0)
            metrics[name] = max(old, value.item()) if name.endswith("_max") else old + value.item()
    assert table.grad is not None
    return table.grad, metrics


def same(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() <= 1e-10


every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)
every_policy_loss = pytest.mark.parametrize("loss", LOSSES[:-1], ids=repr)  # Nll knows no dead row
every_mismatch = pytest.mark.parametrize("mismatch", MISMATCHES, ids=lambda m: f"{m.mode}-{m.level}")


@every_loss
@every_mismatch
def test_c13_c21_splitting_changes_nothing(loss, mismatch):
    """1, 2, 4 and 11 micro-batches: the same gradient and the same metrics."""
    batch = make_batch(make_judged())
    objective = make_objective(loss, mismatch, extras=True)
    whole, metrics = gradient(objective, batch.split(10_000))
    assert whole.abs().max() > 1e-3
    sizes = [len(batch.split(tokens)) for tokens in (45, 23, 1)]
    assert sizes == [2, 4, 11]
    for tokens in (45, 23, 1):
        parts, split_metrics = gradient(objective, batch.split(tokens))
        assert same(parts, whole)
        assert split_metrics == pytest.approx(metrics, abs=1e-10)


@every_loss
def test_c13_counts_of_a_micro_batch_would_change_the_gradient(loss):
    """The mutant: each piece divided by what it holds itself, as a mean of means."""
    batch = make_batch(make_judged())
    objective = make_objective(loss, MISMATCHES[0], extras=False)
    own_counts = []
    for piece in batch.split(23):
        tokens, sequences = int(piece.completion_mask.sum()), piece.layout.num_sequences
        own = replace(batch.counts, tokens=tokens, sequences=sequences, constant=9.0 * sequences)
        own_counts.append(replace(piece, counts=own))
    assert not same(gradient(objective, own_counts)[0], gradient(objective, [batch])[0])


@every_loss
@every_mismatch
def test_c14_permuting_completions_changes_nothing(loss, mismatch):
    objective = make_objective(loss, mismatch, extras=True)
    permuted = [Group(g.prompt, g.completions[::-1], g.scores[::-1]) for g in reversed(make_groups())]
    straight, _ = gradient(objective, make_batch(make_judged()).split(23))
    assert same(gradient(objective, make_batch(make_judged(permuted)).split(23))[0], straight)
    # the mutant: completions reordered, scores left where they were
    torn = [Group(g.prompt, g.completions[::-1], g.scores) for g in make_groups()]
    if not isinstance(loss, Nll):
        assert not same(gradient(objective, make_batch(make_judged(torn)).split(23))[0], straight)


@every_policy_loss
def test_c13_dropping_dead_rows_changes_nothing(loss):
    """Without KL and entropy, rows with A = 0 leave forward and backward; the normalizer stays."""
    objective = make_objective(loss, MISMATCHES[0], extras=False)
    batch, dropped = (make_batch(make_judged(), drop_dead=drop) for drop in (False, True))
    assert (batch.layout.num_sequences, dropped.layout.num_sequences) == (11, 8)
    whole, _ = gradient(objective, [batch])
    assert same(gradient(objective, dropped.split(23))[0], whole)
    # the mutant: counted after the rows have left
    left = replace(batch.counts, tokens=int(dropped.completion_mask.sum()), sequences=8, constant=8 * 9.0)
    assert not same(gradient(objective, [replace(dropped, counts=left)])[0], whole)


@every_loss
def test_c4_a_masked_tail_changes_nothing(loss):
    """Tokens after the end that nobody sampled: not trained, not counted."""
    objective = make_objective(loss, MISMATCHES[0], extras=True)

    def with_tail(completion: Completion) -> Completion:
        tail = (3, 1, 4)
        return replace(
            completion,
            token_ids=completion.token_ids + tail,
            sampled=completion.sampled + (False,) * 3,
            sampling_logprobs=completion.sampling_logprobs + (0.0,) * 3,
        )

    tailed = [replace(g, completions=tuple(with_tail(c) for c in g.completions)) for g in make_groups()]
    plain, longer = make_batch(make_judged()), make_batch(make_judged(tailed))
    assert longer.token_ids.numel() == plain.token_ids.numel() + 3 * 11 and longer.counts == plain.counts
    straight, _ = gradient(objective, [plain])
    assert same(gradient(objective, longer.split(30))[0], straight)
    # the mutant: the tail is trained
    everything = replace(longer, completion_mask=longer.completion_mask | (longer.layout.positions >= 6))
    assert not same(gradient(objective, [everything])[0], straight)


@every_loss
def test_c5_masked_cut_completions_leave_the_gradient_of_the_others(loss):
    """The cut one masked: the gradient of the same step without it, advantages kept."""
    objective = make_objective(loss, MISMATCHES[0], extras=True)
    first, *others = make_judged()
    without = JudgedGroup(
        Group(first.group.prompt, first.group.completions[1:], first.group.scores[1:]), first.advantages[1:], dead=False
    )
    masked = make_batch(make_judged(), mask_cut=True)
    alone = make_batch([without, *others])
    assert masked.counts == alone.counts and masked.counts.sequences == 10
    assert same(gradient(objective, [masked])[0], gradient(objective, [alone])[0])
    assert not same(gradient(objective, [make_batch(make_judged())])[0], gradient(objective, [alone])[0])


@every_loss
def test_b6_a_neighbour_changes_nothing(loss):
    """A group's part of the sum is the same alone and behind either of two others."""
    first, _, own, last = make_judged()

    def total(judged: Sequence[JudgedGroup]) -> float:
        batch = make_batch(judged)
        return loss(loss_inputs(batch, policy(NOW, batch))).sum.item()

    assert total([first, own]) - total([first]) == pytest.approx(total([own]), abs=1e-10)
    assert total([last, own]) - total([last]) == pytest.approx(total([own]), abs=1e-10)


@every_loss
def test_the_first_of_several_updates_is_the_only_one(loss):
    """Old logprobs made by the policy itself (float32 as stored) give the gradient of having none."""
    objective = make_objective(loss, MISMATCHES[0], extras=False)
    rollout = collate(make_judged(), mask_cut=False, max_completion_tokens=9, drop_dead=False)
    made = policy(NOW, rollout).logprobs.float()
    several = gradient(objective, [train_batch(rollout, old_logprobs=made, ref_logprobs=None)])[0]
    one = gradient(objective, [train_batch(rollout, old_logprobs=None, ref_logprobs=None)])[0]
    assert (several - one).abs().max() < 1e-6


def test_the_batch_is_hard_enough():
    """Old, current and sampling logprobs differ so much that every clip and cap of this file is at work."""
    batch = make_batch(make_judged())
    inputs = loss_inputs(batch, policy(NOW, batch))
    for loss in LOSSES:
        metrics = loss(inputs).metrics
        assert all(metrics[key] > 0 for key in metrics if key.startswith("clipped") and not isinstance(loss, Cispo))
    assert Cispo(clip_high=0.3)(inputs).metrics["clipped_high_share"] > 0
    for mismatch in MISMATCHES[1:]:
        assert mismatch(inputs)[1]["mismatch_capped_share"] > 0


def test_inputs_of_a_piece_are_those_of_the_whole():
    """The vectors of the pieces in a row are the vectors of the batch."""
    batch = make_batch(make_judged())
    whole = loss_inputs(batch, policy(NOW, batch))
    parts: list[LossInputs] = [loss_inputs(piece, policy(NOW, piece)) for piece in batch.split(23)]
    for name in ("logprobs", "old_logprobs", "sampling_logprobs", "advantages", "entropy"):
        assert torch.cat([getattr(part, name) for part in parts]).equal(getattr(whole, name))
