"""Prompts that a batch shares: which, how a budget cuts them, and that no cut of them changes what a step learns."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reasoner.compose import compose_conf
from reasoner.config import validate
from reasoner.grpo.advantages import judge
from reasoner.grpo.batch import PackedBatch, collate, pack
from reasoner.grpo.trainer import GRPOTrainer
from reasoner.kernels.linear_logprobs import Logprobs
from reasoner.models.attention import Layout
from reasoner.models.policy import Policy
from reasoner.models.rms_norm import replace_norms
from reasoner.types import Completion, Group, Prompt, Score
from reasoner.update import Updater
from tests.models.tiny_models import VOCABULARY, fill_b, lora_of, make_policy

# Prompt and completions in tokens; the rewards make the second group dead and two of the last one's rows zero.
SIZES = ((9, (4, 7, 2)), (3, (3, 5)), (1, (6, 2, 3)), (6, (5,)), (8, (4, 6, 9, 5)))
REWARDS = ((1.0, 0.0, 0.5), (1.0, 1.0), (0.0, 0.0, 1.0), (1.0,), (1.0, 0.5, 0.0, 0.5))


def make_groups(sizes: Sequence[tuple[int, Sequence[int]]] = SIZES, seed: int = 3) -> list[Group]:
    draws = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=draws).tolist())

    def completion(length: int) -> Completion:
        return Completion(draw(length), (True,) * length, (-4.0,) * length, "", "stop", 0, 0)

    return [
        Group(
            Prompt(f"p{n}", "", "", {}, draw(prompt)),
            tuple(completion(length) for length in lengths),
            tuple(Score(reward, {"x": reward}) for reward in REWARDS[n % len(REWARDS)][: len(lengths)]),
        )
        for n, (prompt, lengths) in enumerate(sizes)
    ]


def shared_of(groups: Sequence[Group]) -> list[int]:
    return list(pack(groups, share_prompts=True).layout.shared)


def test_a_groups_prompt_is_shared_and_its_copies_stay_in_the_vectors():
    batch, alone = pack(make_groups(), share_prompts=True), pack(make_groups())
    assert list(batch.layout.shared) == [0, 9, 9, 0, 3, 0, 1, 1, 0, 0, 8, 8, 8]
    assert not any(alone.layout.shared) and batch.layout.lengths == alone.layout.lengths
    assert batch.token_ids.equal(alone.token_ids) and batch.completion_mask.equal(alone.completion_mask)


def test_prompts_are_shared_by_their_ids_alone():
    first, second = make_groups(((4, (2, 2)), (4, (3,))))
    assert shared_of([first, second]) == [0, 4, 0]
    other_text = replace(second, prompt=replace(second.prompt, token_ids=first.prompt.token_ids, text="other"))
    assert shared_of([first, other_text]) == [0, 4, 4]
    longer = replace(second, prompt=replace(second.prompt, token_ids=(*first.prompt.token_ids, 5)))
    assert shared_of([first, longer]) == [0, 4, 0]
    assert shared_of([first, second, first]) == [0, 4, 0, 0, 4]  # only neighbours


def test_it_is_shared_where_that_saves_one_token_in_32():
    assert shared_of(make_groups(((1, (15, 15)),))) == [0, 1]
    assert shared_of(make_groups(((1, (15, 16)),))) == [0, 0]
    assert shared_of(make_groups(((1, (15, 16)), (2, (20, 30))))) == [0, 0, 0, 2]


def test_where_nothing_was_sampled_a_sequence_still_computes_a_token():
    (group,) = make_groups(((3, (0, 2, 0)),))
    assert shared_of([group]) == [0, 3, 2]
    (group,) = make_groups(((1, (1, 0, 1)),))
    assert shared_of([group]) == [0, 0, 1]


def test_rows_that_leave_share_nothing():
    judged = judge(make_groups(), advantage="group", scale="none")
    batch = collate(judged, mask_cut=False, max_completion_tokens=9, drop_dead=True, share_prompts=True)
    assert batch.layout.lengths == (13, 16, 7, 3, 4, 12, 17) and batch.layout.shared == (0, 9, 0, 1, 1, 0, 8)


def fake(lengths: Sequence[int], shared: Sequence[int]) -> PackedBatch:
    layout = Layout.of(lengths, shared=shared)
    return PackedBatch(torch.arange(sum(lengths)), layout, layout.positions >= 4)


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (13, [((6, 7, 8), (0, 4, 4)), ((5, 9), (0, 4))]),  # 6 + 3 + 4; 5 + 5
        (12, [((6, 7), (0, 4)), ((8,), (0,)), ((5, 9), (0, 4))]),  # the third one's prompt is computed again
        (23, [((6, 7, 8, 5, 9), (0, 4, 4, 0, 4))]),
        (22, [((6, 7, 8, 5), (0, 4, 4, 0)), ((9,), (0,))]),
        (1, [((6,), (0,)), ((7,), (0,)), ((8,), (0,)), ((5,), (0,)), ((9,), (0,))]),
    ],
)
def test_a_cut_counts_what_is_computed(max_tokens: int, expected: list[tuple[tuple[int, ...], tuple[int, ...]]]):
    batch = fake((6, 7, 8, 5, 9), (0, 4, 4, 0, 4))
    pieces = batch.split(max_tokens)
    assert [(piece.layout.lengths, piece.layout.shared) for piece in pieces] == expected
    assert torch.cat([piece.token_ids for piece in pieces]).equal(batch.token_ids)


def test_copies_of_a_piece_are_at_most_as_many_as_its_budget():
    """Eight times 20 + 1 tokens: 28 are computed, and keys are held for 168."""
    batch = fake((21,) * 8, (0, *(20,) * 7))
    assert [piece.layout.num_sequences for piece in batch.split(84)] == [8]
    assert [piece.layout.num_sequences for piece in batch.split(83)] == [7, 1]
    assert [piece.layout.num_sequences for piece in batch.split(30)] == [2, 2, 2, 2]


def make_trainer(policy: Policy, tmp: Path, tokens: int, *overrides: str) -> GRPOTrainer:
    config = validate(compose_conf("tiny", [*overrides, "grpo.mask_cut=false"]).values)
    updater = Updater(
        policy.trainable(),
        config.grpo.optim,
        num_steps=10,
        tokens_per_micro_batch=tokens,
        say=lambda line: None,
        save_bad_batches_to=tmp,
    )
    engine: Any = SimpleNamespace()  # nothing is sampled here
    return GRPOTrainer(
        config, policy=policy, engine=engine, rewards=engine, updater=updater, stop_ids=(), accuracy_part="x"
    )


def learnt(policy: Policy, tmp: Path, tokens: int, *overrides: str) -> tuple[dict[str, Tensor], int]:
    """A step's gradients from groups to weights, and how many tokens its passes with gradient computed."""
    trainer = make_trainer(policy, tmp, tokens, *overrides)
    batch = trainer._with_logprobs(trainer._judge(make_groups()))
    pieces = batch.split(tokens)
    policy.train_mode(dropout=False)
    for piece in pieces:
        output = trainer._objective(piece)
        (output.sum / piece.counts.of(output.normalizer)).backward()
    policy.eval()
    found = {name: weight.grad for name, weight in policy.trainable().items() if weight.grad is not None}
    for weight in policy.trainable().values():
        weight.grad = None
    assert len(found) == len(policy.trainable())
    return found, sum(sum(piece.layout.lengths) - sum(piece.layout.shared) for piece in pieces)


EVERYTHING = ("grpo.inner_steps=2", "grpo.kl_coef=0.3", "grpo.entropy_coef=0.1", "grpo.mismatch=off")
IN_REWARD = ("grpo.kl_coef=0.3", "grpo.kl_in=reward", "grpo.mismatch=off")


@pytest.mark.parametrize(
    ("overrides", "dtype", "tolerance"),
    [
        (("loss=dapo",), torch.float64, 1e-12),
        (("loss=gspo",), torch.float64, 1e-12),
        (EVERYTHING, torch.float32, 1e-5),
        (IN_REWARD, torch.float32, 1e-5),
    ],
    ids=["dapo", "gspo", "old, reference and entropy", "kl in the reward"],
)
def test_c22_no_cut_of_shared_prompts_changes_what_a_step_learns(
    overrides: tuple[str, ...], dtype: torch.dtype, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    policy = make_policy("mistral", lora=lora_of("mistral"), dtype=dtype)
    assert replace_norms(policy.base, "mistral")
    policy.freeze_reference()
    fill_b(policy.model, seed=9)
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "shares_prompts", False)
        truth, most = learnt(policy, tmp_path, 1000, *overrides)
    computed = {}
    for tokens in (1000, 40, 24, 1):
        found, computed[tokens] = learnt(policy, tmp_path, tokens, *overrides)
        for name, true in truth.items():
            assert true.abs().max() > 0
            torch.testing.assert_close(found[name], true, atol=tolerance * float(true.abs().max()), rtol=0)
    assert computed[1000] < computed[24] < computed[1] == most


def test_logprobs_keep_their_places(tmp_path: Path):
    """[N] as without sharing, in order, whatever the cut; zeros at prompts."""
    policy = make_policy("llama", lora=lora_of("llama"))
    shared, alone = pack(make_groups(), share_prompts=True), pack(make_groups())
    truth: Logprobs = policy.logprobs(alone, temperature=0.5)
    for tokens in (1000, 40, 1):
        found = [policy.logprobs(piece, temperature=0.5) for piece in shared.split(tokens)]
        for name in ("logprobs", "entropy"):
            whole = torch.cat([getattr(one, name) for one in found])
            torch.testing.assert_close(whole, getattr(truth, name), atol=1e-5, rtol=0)
            assert not whole[~shared.completion_mask].any() and whole[shared.completion_mask].all()
