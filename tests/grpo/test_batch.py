"""Batches written by hand and compared exactly: what is packed, counted, left out, cut and handed to a loss."""

from dataclasses import replace

import pytest
import torch

from reasoner.grpo.advantages import JudgedGroup
from reasoner.grpo.batch import PackedBatch, RolloutBatch, TrainBatch, collate, loss_inputs, pack, train_batch
from reasoner.grpo.losses import Grpo
from reasoner.kernels.linear_logprobs import Logprobs
from reasoner.models.attention import Layout
from reasoner.types import Completion, Group, Prompt, Score
from reasoner.update import StepCounts

SCORE = Score(1.0, {"accuracy": 1.0})


def make_completion(*ids: int, sampled: tuple[bool, ...] | None = None, cut: bool = False) -> Completion:
    """Sampling logprobs are -id / 10, so that every token's is its own; 0 where not sampled."""
    sampled = sampled or (True,) * len(ids)
    logprobs = tuple(-i / 10 if s else 0.0 for i, s in zip(ids, sampled, strict=True))
    return Completion(ids, sampled, logprobs, "", "length" if cut else "stop", 0, 0)


def make_judged() -> list[JudgedGroup]:
    """A live group of three (one cut), a dead one of two, one with a token that a tool wrote and a failed reward."""
    failed = Score(0.0, {}, {"accuracy": "hung"})
    groups = [
        ((1, 2), (make_completion(3, 4), make_completion(5, 6, 7, cut=True), make_completion(8)), (SCORE,) * 3),
        ((9,), (make_completion(10, 11), make_completion(12)), (SCORE,) * 2),
        ((13,), (make_completion(14, 15, 16, sampled=(True, False, True)), make_completion(17)), (SCORE, failed)),
    ]
    advantages = [(1.5, -0.5, -1.0), (0.0, 0.0), (2.0, 0.0)]
    return [
        JudgedGroup(Group(Prompt(str(n), "", "", {}, ids), completions, scores), a, dead=not any(a))
        for n, ((ids, completions, scores), a) in enumerate(zip(groups, advantages, strict=True))
    ]


def make_batch(*, mask_cut: bool = False, drop_dead: bool = False) -> RolloutBatch:
    return collate(make_judged(), mask_cut=mask_cut, max_completion_tokens=8, drop_dead=drop_dead)


def trained_ids(batch: PackedBatch) -> list[int]:
    return batch.trained(batch.token_ids).tolist()


def test_b3_collate_by_hand():
    """Prompt ids, then completion ids; sampled completion tokens trained; index t speaks of token t."""
    batch = make_batch()
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 1, 2, 5, 6, 7, 1, 2, 8, 9, 10, 11, 9, 12, 13, 14, 15, 16, 13, 17]
    assert batch.layout.lengths == (4, 5, 3, 3, 2, 4, 2)
    assert trained_ids(batch) == [3, 4, 5, 6, 7, 8, 10, 11, 12, 14, 16, 17]
    assert batch.advantages.tolist() == [1.5, -0.5, -1.0, 0.0, 0.0, 2.0, 0.0]
    expected = [0.0 if i in (1, 2, 9, 13, 15) else -i / 10 for i in batch.token_ids.tolist()]
    assert batch.sampling_logprobs.tolist() == pytest.approx(expected)
    assert batch.counts == StepCounts(tokens=12, sequences=7, groups=3, constant=7 * 8)


def test_a7_ids_reach_the_batch_unchanged():
    """[256, 258] is not how gpt2 would split this text: the engine's ids are packed as they are."""
    prompt = Prompt("p", "text that re-encodes to other ids", "", {}, (1,))
    group = Group(prompt, (make_completion(256, 258),), (SCORE,))
    assert pack([group]).token_ids.tolist() == [1, 256, 258]


def test_c20_dtypes():
    batch = train_batch(make_batch(), old_logprobs=None, ref_logprobs=None)
    assert (batch.token_ids.dtype, batch.completion_mask.dtype) == (torch.int64, torch.bool)
    assert (batch.sampling_logprobs.dtype, batch.advantages.dtype) == (torch.float32, torch.float32)
    with pytest.raises(AssertionError):
        replace(batch, sampling_logprobs=batch.sampling_logprobs.bfloat16())
    with pytest.raises(AssertionError):
        replace(batch, old_logprobs=batch.sampling_logprobs.bfloat16())


def test_c13_counts_are_taken_before_dead_rows_leave():
    """Rows with A = 0 leave the tensors, dead groups' and the failed completion's; the counts stay."""
    batch = make_batch(drop_dead=True)
    assert batch.counts == make_batch().counts
    assert trained_ids(batch) == [3, 4, 5, 6, 7, 8, 14, 16]
    assert batch.advantages.tolist() == [1.5, -0.5, -1.0, 2.0]


def test_c5_cut_completions_count_for_nothing_where_masked():
    """The cut completion of 3 tokens is neither there nor counted: 9 tokens, 6 sequences, and the constant follows."""
    batch = make_batch(mask_cut=True)
    assert trained_ids(batch) == [3, 4, 8, 10, 11, 12, 14, 16, 17]
    assert batch.counts == StepCounts(tokens=9, sequences=6, groups=3, constant=6 * 8)
    assert make_batch().counts.sequences == 7


def test_c5_all_masked_is_an_empty_batch():
    prompt = Prompt("p", "", "", {}, (1,))
    cut = make_completion(2, 3, cut=True)
    judged = [JudgedGroup(Group(prompt, (cut, cut), (SCORE, SCORE)), (1.0, -1.0), dead=False)]
    batch = collate(judged, mask_cut=True, max_completion_tokens=2, drop_dead=False)
    assert batch.token_ids.shape == (0,) and batch.layout.num_sequences == 0
    assert batch.counts == StepCounts(tokens=0, sequences=0, groups=1, constant=0)
    assert batch.split(10) == []
    assert train_batch(batch, old_logprobs=None, ref_logprobs=None).split(10) == []
    assert collate([], mask_cut=False, max_completion_tokens=2, drop_dead=False).split(10) == []


def test_a_completion_without_sampled_tokens_is_left_out():
    prompt = Prompt("p", "", "", {}, (1,))
    by_tool = make_completion(2, 3, sampled=(False, False))
    judged = [JudgedGroup(Group(prompt, (by_tool, make_completion(4)), (SCORE, SCORE)), (1.0, -1.0), dead=False)]
    batch = collate(judged, mask_cut=False, max_completion_tokens=2, drop_dead=False)
    assert batch.token_ids.tolist() == [1, 4] and batch.counts.sequences == 1
    assert pack([judged[0].group]).token_ids.tolist() == [1, 2, 3, 1, 4]


@pytest.mark.parametrize(
    ("max_tokens", "lengths"),
    [
        (100, [(4, 5, 3, 3, 2, 4, 2)]),
        (9, [(4, 5), (3, 3, 2), (4, 2)]),
        (8, [(4,), (5, 3), (3, 2), (4, 2)]),
        (1, [(4,), (5,), (3,), (3,), (2,), (4,), (2,)]),
    ],
)
def test_split_keeps_whole_sequences(max_tokens, lengths):
    """In order, each once, at most max_tokens unless one alone is longer; every vector cut alike, counts kept."""
    rollout = make_batch()
    numbers = torch.arange(rollout.token_ids.numel(), dtype=torch.float32)
    batch = train_batch(rollout, old_logprobs=numbers, ref_logprobs=-numbers)
    pieces = batch.split(max_tokens)
    assert [piece.layout.lengths for piece in pieces] == lengths
    assert all(isinstance(piece, TrainBatch) and piece.counts == batch.counts for piece in pieces)
    for name in ("token_ids", "completion_mask", "sampling_logprobs", "advantages", "old_logprobs", "ref_logprobs"):
        assert torch.cat([getattr(piece, name) for piece in pieces]).equal(getattr(batch, name))
    for piece in pieces:
        assert piece.layout.positions.equal(Layout.of(piece.layout.lengths).positions)


def test_split_keeps_what_a_step_does_not_have():
    pieces = train_batch(make_batch(), old_logprobs=None, ref_logprobs=None).split(5)
    assert all(piece.old_logprobs is None and piece.ref_logprobs is None for piece in pieces)


def test_pack_splits_too():
    """Before there are advantages: all completions in order, cut ones with their sampled tokens."""
    batch = pack([judged.group for judged in make_judged()])
    assert batch.token_ids.equal(make_batch().token_ids) and batch.completion_mask.equal(make_batch().completion_mask)
    assert [piece.layout.num_sequences for piece in batch.split(9)] == [2, 3, 2]


def test_loss_inputs_by_hand():
    batch = train_batch(make_batch(mask_cut=True, drop_dead=True), old_logprobs=None, ref_logprobs=None)
    logprobs = torch.arange(15.0).neg().requires_grad_()  # ids 1 2 3 4 | 1 2 8 | 13 14 15 16 -> 11 tokens
    inputs = loss_inputs(batch, Logprobs(logprobs[:11], entropy=torch.arange(11.0)))
    assert trained_ids(batch) == [3, 4, 8, 14, 16]
    assert inputs.logprobs.tolist() == [-2, -3, -6, -8, -10] == inputs.old_logprobs.tolist()
    assert inputs.logprobs.requires_grad and not inputs.old_logprobs.requires_grad
    assert inputs.entropy.tolist() == [2, 3, 6, 8, 10]
    assert inputs.sampling_logprobs.tolist() == pytest.approx([-0.3, -0.4, -0.8, -1.4, -1.6])
    assert inputs.advantages.tolist() == [1.5, 1.5, -1.0, 2.0, 2.0]
    assert inputs.sequence.tolist() == [0, 0, 1, 2, 2] and inputs.num_sequences == 3
    assert inputs.weights.tolist() == [1.0] * 5


def test_loss_inputs_take_the_old_logprobs_that_were_made():
    rollout = make_batch()
    numbers = torch.arange(rollout.token_ids.numel(), dtype=torch.float32)
    batch = train_batch(rollout, old_logprobs=numbers, ref_logprobs=None)
    inputs = loss_inputs(batch, Logprobs(-numbers, entropy=numbers))
    assert inputs.old_logprobs.equal(batch.trained(numbers)) and inputs.logprobs.equal(-batch.trained(numbers))


def test_c15_three_sequences_and_three_trained_tokens():
    """B == M == 3, but the first sequence has two trained tokens and the second none: A is looked up, not aligned."""
    batch = TrainBatch(
        token_ids=torch.arange(7),
        layout=Layout.of([3, 2, 2]),
        completion_mask=torch.tensor([False, True, True, False, False, False, True]),
        sampling_logprobs=torch.zeros(7),
        advantages=torch.tensor([1.0, 2.0, 3.0]),
        counts=StepCounts(3, 2, 1, 16.0),
        old_logprobs=None,
        ref_logprobs=None,
    )
    inputs = loss_inputs(batch, Logprobs(torch.zeros(7), torch.zeros(7)))
    assert inputs.advantages.tolist() == [1.0, 1.0, 3.0]
    # every ratio is 1: -(1 + 1) / 2 - 3; aligned advantages would give -(1 + 2) / 2 - 3
    assert Grpo()(inputs).sum.item() == -4.0


def test_b6_a_first_token_is_never_trained():
    batch = train_batch(make_batch(), old_logprobs=None, ref_logprobs=None)
    wrong = replace(batch, completion_mask=torch.ones_like(batch.completion_mask))
    zeros = torch.zeros(batch.token_ids.numel())
    with pytest.raises(AssertionError, match="first token"):
        loss_inputs(wrong, Logprobs(zeros, zeros))
    with pytest.raises(AssertionError, match="no tokens"):
        pack([Group(Prompt("p", "", "", {}, ()), (make_completion(1),), (SCORE,))])


def test_c16_nan_on_rows_that_are_not_trained():
    """NaN at prompt and tool tokens: they are selected away, so the sum is the same and their gradient exactly 0."""
    batch = train_batch(make_batch(), old_logprobs=None, ref_logprobs=None)
    clean = torch.linspace(-2, -1, batch.token_ids.numel())
    results = []
    for values in (clean, clean.masked_fill(~batch.completion_mask, float("nan"))):
        logprobs = values.clone().requires_grad_()
        output = Grpo()(loss_inputs(batch, Logprobs(logprobs, values)))
        results.append((output.sum.item(), torch.autograd.grad(output.sum, logprobs)[0]))
    assert results[0][0] == results[1][0] and results[0][1].equal(results[1][1])
    assert not results[1][1][~batch.completion_mask].any()
    # what a mask multiplied in would make of it
    poisoned = clean.masked_fill(~batch.completion_mask, float("nan")) * batch.completion_mask
    assert poisoned.sum().isnan()
