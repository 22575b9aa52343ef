"""The fullest micro-batch, and the rehearsal before step 1: what it measures and leaves behind.

On the CPU, and on a card under the gpu marker.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from reasoner import peak
from reasoner.config import Lora
from reasoner.errors import OutOfMemory
from reasoner.grpo.batch import PackedBatch, pack
from reasoner.kernels import linear_logprobs, tiles
from reasoner.memory import GIB, plan_memory
from reasoner.models import adapters
from reasoner.models.attention import Layout
from reasoner.models.policy import Policy, _recomputes
from reasoner.peak import peak_bytes, rehearse
from reasoner.types import Completion, Group, Prompt
from reasoner.worst_batch import is_whole_step, worst_layout, worst_lengths
from tests.models.tiny_models import lora_of, make_model, make_policy
from tests.test_memory import CONTEXT, conf

MIB = 1 << 20


def own_tokens(layout: Layout) -> int:
    return sum(layout.lengths) - sum(layout.shared)


@pytest.mark.parametrize(
    ("overrides", "context", "lengths"),
    [
        (["grpo.tokens_per_micro_batch=2048"], CONTEXT, [768, 768, 512]),
        (["grpo.tokens_per_micro_batch=1537"], CONTEXT, [768, 768]),  # one token alone trains nothing
        (["grpo.tokens_per_micro_batch=100"], CONTEXT, [768]),  # a longer sequence is a piece of its own
        (["grpo.tokens_per_micro_batch=2048"], 700, [700, 700, 648]),
        (["grpo.prompts_per_step=1", "grpo.completions_per_prompt=2"], CONTEXT, [768, 768]),  # the whole step
    ],
)
def test_the_fullest_micro_batch(overrides: list[str], context: int, lengths: list[int]):
    assert worst_lengths(conf("card=8", *overrides), "grpo", context) == lengths


def test_the_fullest_micro_batch_of_sft_is_its_own():
    config = conf("card=8", "sft.max_completion_tokens=300", "sft.data.max_prompt_tokens=100", name="gsm8k_base")
    assert worst_lengths(config, "sft", CONTEXT) == [400] * 10 + [96]
    worst = worst_layout(config, "sft", CONTEXT, shares=True)
    assert list(worst.lengths) == [400] * 10 + [96] and not any(worst.shared)


@pytest.mark.parametrize("tokens", [768, 769, 1537, 2048, 24_576, 98_303])
def test_the_fullest_micro_batch_holds_as_many_copies_as_a_cut_lets_in(tokens: int):
    """All tokens of the budget are computed, as many again (of 128 sequences as many as there are) are copies."""
    config = conf("card=8", f"grpo.tokens_per_micro_batch={tokens}")
    worst = worst_layout(config, "grpo", CONTEXT, shares=True)
    assert own_tokens(worst) == tokens and sum(worst.lengths) == min(2 * tokens, 128 * 768)
    assert max(worst.lengths) <= 768
    batch = PackedBatch(torch.zeros_like(worst.positions), worst, worst.positions > 0)
    assert len(batch.split(tokens)) == 1 and len(batch.split(tokens - 1)) == 2
    alone = worst_layout(config, "grpo", CONTEXT, shares=False)
    assert list(alone.lengths) == worst_lengths(config, "grpo", CONTEXT) and not any(alone.shared)


@pytest.mark.parametrize("override", ["grpo.tokens_per_micro_batch=1000000", "grpo.prompts_per_step=1"])
def test_the_fullest_micro_batch_of_a_step_that_fits_has_no_copies(override: str):
    worst = worst_layout(conf("card=24", override), "grpo", CONTEXT, shares=True)
    assert len(set(worst.lengths)) == 1 and not any(worst.shared)


def pieces(prompt: int, completion: int, tokens: int, *, shares: bool) -> int:
    """Micro-batches of a step of 3 groups of 4 completions, all of these lengths."""
    ids = (0,) * completion
    several = (Completion(ids, (True,) * completion, (0.0,) * completion, "", "stop", 0, 0),) * 4
    groups = [Group(Prompt("", "", "", {}, (number,) * prompt), several, ()) for number in range(3)]
    return len(pack(groups, share_prompts=shares).split(tokens))


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("longest_prompt", [1, 2, 5, 8, 60])
def test_a_whole_step_is_one_micro_batch_whatever_its_lengths(longest_prompt: int, shares: bool):
    """Short prompts are not shared, and copies of long ones fill a micro-batch before its tokens do."""
    sizes = ["grpo.prompts_per_step=3", "grpo.completions_per_prompt=4", "grpo.max_completion_tokens=24"]
    config = conf(*sizes, f"data.max_prompt_tokens={longest_prompt}")
    prompts, completions = range(1, longest_prompt + 1), (1, 2, 23, 24)

    def is_one(tokens: int) -> bool:
        settings = replace(config.grpo, tokens_per_micro_batch=tokens)
        return is_whole_step(replace(config, grpo=settings), "grpo", CONTEXT, shares=shares)

    fewest = next(tokens for tokens in range(1, 1100) if is_one(tokens))
    assert all(pieces(p, c, fewest, shares=shares) == 1 for p in prompts for c in completions)
    ends = {1, longest_prompt // 2 + 1, longest_prompt}
    needed = next(n for n in range(fewest, 0, -1) if max(pieces(p, 24, n - 1, shares=shares) for p in ends) > 1)
    assert fewest <= needed * 32 / 31 + 3, "a step that is one micro-batch is not known for one"
    assert is_one(fewest + 1) and not any(is_one(tokens) for tokens in range(1, needed))


def test_conf_smol_has_one_micro_batch_a_step_in_grpo_and_several_in_sft():
    smol = conf(name="smol")
    assert is_whole_step(smol, "grpo", 2048, shares=True) and not is_whole_step(smol, "grpo", 2048, shares=False)
    assert not is_whole_step(smol, "sft", 2048, shares=True)
    few = replace(smol, sft=replace(smol.sft, examples_per_step=4))
    assert is_whole_step(few, "sft", 2048, shares=True)


class SmallCard(Policy):
    """A policy on a card that runs out at some tokens: the CPU itself would be killed."""

    most_tokens = 0
    seen: tuple[int, ...] = ()

    def logprobs(self, batch: Any, *, temperature: float) -> Any:
        self.seen += (own_tokens(batch.layout),)
        if own_tokens(batch.layout) > self.most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().logprobs(batch, temperature=temperature)


def small_card(most_tokens: int) -> SmallCard:
    policy = make_policy("llama", lora=replace(lora_of("llama"), dropout=0.5), max_position_embeddings=128)
    policy = SmallCard(policy.model, policy.family, revision=None)
    policy.most_tokens = most_tokens
    return policy


SHORT = ["grpo.max_completion_tokens=24", "data.max_prompt_tokens=8", "sft.max_completion_tokens=12"]


def test_the_rehearsal_runs_every_stage_and_leaves_no_trace():
    config = conf(*SHORT, "sft.tokens_per_micro_batch=50", "grpo.tokens_per_micro_batch=64", name="gsm8k_base")
    policy = small_card(64)
    weights = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
    state = torch.get_rng_state()
    assert rehearse(config, policy, max_context=128, room=0) == {"sft": 0, "grpo": 0}  # a CPU measures nothing
    assert policy.seen == (50, 50, 64, 64)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in policy.trainable().values())
    assert all(torch.equal(weight, weights[name]) for name, weight in policy.trainable().items())
    assert not any(part.training for part in policy.model.modules())


def test_layers_recompute_only_where_the_worst_micro_batch_does_not_fit_without(monkeypatch: pytest.MonkeyPatch):
    config = conf(*SHORT, "sft.tokens_per_micro_batch=50", "grpo.tokens_per_micro_batch=64", name="gsm8k_base")
    assert config.model.gradient_checkpointing == "auto"
    sizes = {50: 3, 64: 5}  # bytes without recomputing; with, 2; with inputs on the host, 1

    def measured(policy: Policy, layout: Layout, *, entropy: bool, passes: int) -> int:
        assert all(part.training for part in policy.model.modules() if _recomputes(part))
        return 1 if policy.offloads else 2 if policy.recomputed else sizes[own_tokens(layout)]

    monkeypatch.setattr(peak, "peak_bytes", measured)
    for room, sft, grpo in ((8, 3, 5), (7, 3, 2), (2, 2, 2), (1, 1, 1)):  # of 7 seven tenths are less than 5
        policy = small_card(64)
        assert rehearse(config, policy, max_context=128, room=room) == {"sft": sft, "grpo": grpo}
        assert policy.recomputed == (room < 8) and policy.offloads is (room < 2)
    fixed = replace(config, model=replace(config.model, gradient_checkpointing=False))
    policy = small_card(64)
    assert rehearse(fixed, policy, max_context=128, room=2) == {"sft": 3, "grpo": 5} and not policy.recomputed


@pytest.mark.parametrize(
    ("each", "room", "recomputed", "tried"),
    [
        (100, 2000, 0, [0]),  # 12 that keep take 1,300
        (100, 1299, 4, [0, 11, 10, 4]),  # seven tenths of the room hold 8 of 12: 100 + 8 * 100
        (100, 1000, 6, [0, 11, 10, 6]),
        (100, 430, 10, [0, 11, 10]),  # 301: no more than two
        (100, 330, 11, [0, 11, 10]),  # one, whatever the share
        (0, 1000, 1, [0, 11, 10, 1]),  # the head hides what they take
        (300, 770, 11, [0, 11, 10]),  # 700 of two is within the room, and not within its share
    ],
)
def test_as_many_layers_as_fit_keep_what_they_made(
    each: int, room: int, recomputed: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
):
    """A layer that keeps takes `each`; without recomputation more than any room but the first row's."""
    config = conf(*SHORT, "stages=[grpo]")
    policy = make_policy("llama", lora=lora_of("llama"), num_hidden_layers=12)
    seen = []

    def measured(policy: Policy, layout: Layout, *, entropy: bool, passes: int) -> int:
        assert all(part.training for part in policy.model.modules() if _recomputes(part))
        seen.append(policy.recomputed)
        return 100 + each * (12 - policy.recomputed) if policy.recomputed else 1300

    monkeypatch.setattr(peak, "peak_bytes", measured)
    peaks = rehearse(config, policy, max_context=128, room=room)
    assert (policy.recomputed, seen) == (recomputed, tried) and not policy.offloads
    assert peaks == {"grpo": 100 + each * (12 - recomputed) if recomputed else 1300}


def test_where_keeping_more_layers_runs_out_half_as_many_are_tried(monkeypatch: pytest.MonkeyPatch):
    """The first layers hide behind the loss head, so that two measures promise what a third one does not hold."""
    config = conf(*SHORT, "stages=[grpo]")
    policy = make_policy("llama", lora=lora_of("llama"), num_hidden_layers=12)
    seen = []

    def measured(policy: Policy, layout: Layout, *, entropy: bool, passes: int) -> int | None:
        seen.append(kept := 12 - policy.recomputed)
        return None if kept > 8 else max(500, 100 * kept)

    monkeypatch.setattr(peak, "peak_bytes", measured)
    assert rehearse(config, policy, max_context=128, room=1000) == {"grpo": 500}
    assert seen == [12, 1, 2, 11, 5] and policy.recomputed == 7


def test_layers_keep_what_the_stage_that_takes_most_leaves_them(monkeypatch: pytest.MonkeyPatch):
    config = conf(*SHORT, "sft.tokens_per_micro_batch=50", "grpo.tokens_per_micro_batch=64", name="gsm8k_base")
    policy = make_policy("llama", lora=lora_of("llama"), num_hidden_layers=12)

    def measured(policy: Policy, layout: Layout, *, entropy: bool, passes: int) -> int:
        return own_tokens(layout) * (12 - policy.recomputed)

    monkeypatch.setattr(peak, "peak_bytes", measured)
    assert rehearse(config, policy, max_context=128, room=500) == {"sft": 50 * 5, "grpo": 64 * 5}
    assert policy.recomputed == 7


def test_the_second_of_two_micro_batches_runs_beside_the_firsts_gradients():
    policy = small_card(64)
    gradients_there: list[bool] = []
    logprobs = policy.logprobs
    policy.logprobs = lambda *a, **k: (  # type: ignore[method-assign]
        gradients_there.append(all(w.grad is not None for w in policy.trainable().values())) or logprobs(*a, **k)
    )
    assert peak_bytes(policy, Layout.of([30, 20]), entropy=True) == 0
    assert gradients_there == [False, True]


def test_where_a_step_is_one_micro_batch_it_is_rehearsed_once():
    config = conf(*SHORT, "sft.tokens_per_micro_batch=50", "grpo.tokens_per_micro_batch=64", name="gsm8k_base")
    few = replace(config.grpo, prompts_per_step=1, completions_per_prompt=2)
    policy = small_card(64)
    rehearse(replace(config, grpo=few), policy, max_context=128, room=0)
    assert policy.seen == (50, 50, 64)


def test_the_rehearsal_trains_what_it_computes_and_no_copy():
    """Of 30 + 20 tokens 15 are copies, and before the first one is nothing: 29 and 5 are left."""
    policy, masks = small_card(64), list[torch.Tensor]()
    logprobs = policy.logprobs
    policy.logprobs = lambda batch, **k: masks.append(batch.completion_mask) or logprobs(batch, **k)  # type: ignore[method-assign]
    assert peak_bytes(policy, Layout.of([30, 20], shared=[0, 15]), entropy=False) == 0
    assert masks[0].nonzero()[:, 0].tolist() == [*range(1, 30), *range(45, 50)]


@pytest.mark.parametrize(
    ("most_tokens", "said"),
    [
        (
            600,
            "grpo.tokens_per_micro_batch=2048 is out of memory (0.00 GiB were free): set "
            "grpo.tokens_per_micro_batch=512, which fits",
        ),
        (
            40,
            "grpo.tokens_per_micro_batch=2048 is out of memory (0.00 GiB were free): set "
            "grpo.tokens_per_micro_batch=32, which fits",
        ),
        (
            10,
            "grpo.tokens_per_micro_batch=2048 is out of memory (0.00 GiB were free), and so is one sequence of 32 "
            "tokens alone: lower grpo.max_completion_tokens=24, to 12 say, or data.max_prompt_tokens",
        ),
    ],
)
def test_out_of_memory_names_the_key_and_a_size_that_was_tried(most_tokens: int, said: str):
    config, policy = conf(*SHORT, "card=8", "grpo.tokens_per_micro_batch=2048"), small_card(most_tokens)
    with pytest.raises(OutOfMemory) as caught:
        rehearse(config, policy, max_context=128, room=0)
    assert str(caught.value) == said
    assert all(weight.grad is None for weight in policy.trainable().values())
    assert not any(part.training for part in policy.model.modules())


def on_a_card(test: Callable[..., None]) -> Callable[..., None]:
    skipped = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    return pytest.mark.gpu(skipped(test))


def on_cuda() -> Policy:
    """Llama of two layers and a vocabulary of 32,768, frozen in bfloat16, with an adapter in float32."""
    base = make_model("llama", vocab_size=32_768, hidden_size=256, max_position_embeddings=4096)
    base = base.to("cuda", torch.bfloat16).requires_grad_(False)
    model = adapters.attach(base, Lora(r=8, dropout=0.1), name="tiny", revision=None)
    return Policy(model, make_policy("llama").family, revision=None)


# Bytes beside the outputs that the loss head holds at most: four tiles of float32 logits; blocks of odds, their product
# with the head, sums, and the factor of each row.
LOSS_HEAD = {
    False: 4 * 4 * linear_logprobs.CUDA_TILE_ELEMENTS,
    True: tiles.ODDS_BYTES + tiles.PRODUCT_BYTES + tiles.SUM_BYTES + 4096 * (2 * 256 + 4),
}


@on_a_card
@pytest.mark.parametrize("by_triton", LOSS_HEAD, ids=["torch", "triton"])
def test_on_a_card_the_rehearsal_measures_and_leaves_no_trace(by_triton: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_logprobs, "PREFER_TRITON", by_triton)
    config, policy = conf("card=8", name="gsm8k_base"), on_cuda()
    peak_bytes(policy, Layout.of([768]), entropy=False)  # libraries take their workspaces
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    held = torch.cuda.memory_allocated()
    peaks = rehearse(config, policy, max_context=4096, room=GIB)
    assert torch.cuda.memory_allocated() == held
    assert torch.equal(torch.get_rng_state(), states[0]) and torch.equal(torch.cuda.get_rng_state(), states[1])
    assert all(weight.grad is None for weight in policy.trainable().values())
    hidden = 4096 * 256 * 2
    gradients = sum(weight.nbytes for weight in policy.trainable().values())
    for found in peaks.values():
        assert hidden + gradients < found < 60 * hidden + gradients + LOSS_HEAD[by_triton]
    peaks = [peak_bytes(policy, Layout.of([768] * count), entropy=False) for count in (5, 10)]
    assert None not in peaks and peaks[0] < peaks[1]


@on_a_card
def test_on_a_card_out_of_memory_is_one_line_with_a_size_that_fits():
    total = torch.cuda.mem_get_info()[1]
    absurd = total // (256 * 2)  # tokens whose hidden states alone fill the card
    sizes = [f"grpo.tokens_per_micro_batch={absurd}", f"grpo.prompts_per_step={absurd}"]
    # Long ones: torch's fused attention takes 65,535 sequences at most.
    config = conf("card=8", *sizes, "grpo.max_completion_tokens=3840")
    policy = on_cuda()
    with pytest.raises(OutOfMemory) as caught:
        rehearse(config, policy, max_context=4096, room=GIB)
    said = str(caught.value)
    assert f"grpo.tokens_per_micro_batch={absurd} is out of memory" in said and "\n" not in said
    fits = int(said.split("set grpo.tokens_per_micro_batch=")[1].split(",")[0])
    policy.train_mode(dropout=False)
    worst = worst_layout(config, "grpo", 4096, shares=True, tokens=fits)
    found = peak_bytes(policy, worst, entropy=False)
    assert found is not None and found <= GIB


@on_a_card
def test_on_a_card_the_plan_adds_up():
    plan = plan_memory(conf("card=8"), on_cuda(), max_context=4096)
    free, total = torch.cuda.mem_get_info()
    assert plan.total == total and plan.kv_bytes == 3 * GIB // 2 and plan.training > 0
    assert abs(plan.taken + plan.base + plan.adapter - (total - free)) < 64 * MIB
    assert plan.while_sampling <= total and plan.while_training <= total
