"""The parts of a card, worked by hand for four cards; the rehearsal on the CPU, and on a card under the gpu marker."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reasoner import peak
from reasoner.compose import compose_conf
from reasoner.config import Config, Lora, validate
from reasoner.errors import ModelError, OutOfMemory
from reasoner.grpo.batch import PackedBatch
from reasoner.kernels import linear_logprobs, tiles
from reasoner.memory import (
    GIB,
    Held,
    MemoryPlan,
    divide,
    held_by,
    kv_token_bytes,
    longest_sampled,
    parts_before,
    plan_memory,
)
from reasoner.models import adapters
from reasoner.models.attention import Layout
from reasoner.models.policy import Policy, _recomputes
from reasoner.peak import peak_bytes, rehearse
from reasoner.worst_batch import worst_layout, worst_lengths
from tests.models.tiny_models import lora_of, make_config, make_model, make_policy

MIB = 1 << 20
# The shape of a 1.5B model with r=16: 16 Mi trained weights, 28 layers x 2 heads of 128 for keys and for values.
SMALL = Held(
    base=GIB,
    second_base=0,
    in_16_bits=0,
    masters=64 * MIB,
    below=0,
    num_trained=16 * MIB,
    kv_token=28_672,
    score_row=0,
)
CONTEXT = 32_768
ENGINE = 751_619_276  # 0.7 GiB


@cache
def conf(*overrides: str, name: str = "gsm8k") -> Config:
    return validate(compose_conf(name, list(overrides)).values)


def gib(size: float) -> int:
    return int(size * GIB)


def planned(config: Config, card_gib: float, peak_gib: float, held: Held = SMALL, taken_gib: float = 0.5) -> MemoryPlan:
    """The plan on a card where CUDA and others hold taken_gib beside the policy."""
    total = gib(card_gib)
    free = total - gib(taken_gib) - held.base - held.masters - held.below
    before = parts_before(config, held, total=total, free=free, max_context=CONTEXT)
    return divide(config, before, {"grpo": gib(peak_gib)})


def test_the_parts_of_an_8_gib_card_by_hand():
    plan = planned(conf("card=8"), 8, 3)
    assert plan == MemoryPlan(
        total=8 * GIB,
        taken=512 * MIB,
        base=GIB,
        second_base=0,
        adapter=96 * MIB,  # 64 MiB of masters, 16 Mi x 2 bytes in the engine
        optimizer=32 * MIB,  # 16 Mi x 2 bytes: 8-bit states
        engine=ENGINE,
        keep_free=512 * MIB,
        training=3 * GIB,
        dequantized=0,
        scores=0,
        kv_bytes=1536 * MIB,  # rollout.kv_gib of card=8
        kv_token=28_672,
        longest=768,  # 256 + 512
    )
    assert plan.while_training == (512 + 1024 + 96 + 32 + 512 + 3072) * MIB + ENGINE
    assert plan.while_sampling == (512 + 1024 + 96 + 32 + 512 + 1536) * MIB + ENGINE


@pytest.mark.parametrize(
    ("card", "base_gib", "kv_bytes"),
    [
        # max_sequences x ceil(1.05 x longest x 28,672)
        (8, 1, 64 * 23_121_101),
        (12, 3, 128 * 23_121_101),
        (16, 3, 192 * 30_828_135),
        (24, 3, 256 * 38_535_168),
        # What is left: the card less 0.5 taken, base, 0.09375 adapter, 0.03125 optimizer, 0.7 engine, 0.5 kept free.
        (8, 5, 8 * GIB - (512 + 5 * 1024 + 96 + 32 + 512) * MIB - ENGINE),
        (12, 9, 12 * GIB - (512 + 9 * 1024 + 96 + 32 + 512) * MIB - ENGINE),
        (16, 13, 16 * GIB - (512 + 13 * 1024 + 96 + 32 + 512) * MIB - ENGINE),
        (24, 15, 24 * GIB - (512 + 15 * 1024 + 96 + 32 + 512) * MIB - ENGINE),
    ],
)
def test_without_kv_gib_the_cache_is_what_is_left_or_what_can_be_used(card: int, base_gib: int, kv_bytes: int):
    plan = planned(conf(f"card={card}", "rollout.kv_gib=null"), card, 0.25, replace(SMALL, base=base_gib * GIB))
    assert plan.kv_bytes == kv_bytes
    assert plan.while_sampling <= plan.total


@pytest.mark.parametrize(
    ("setting", "card_gib", "dequantized"),
    [
        # 2.825 stay and 1.5 are rollout.kv_gib's: the 2.5 fit on 8, and on 6.82 not beside the whole cache
        ("auto", 8, 2560 * MIB),
        ("auto", 6.82, 0),
        ("auto", 6.83, 2560 * MIB),
        ("false", 8, 0),
        ("true", 8, 2560 * MIB),
    ],
)
def test_the_base_is_held_in_16_bits_where_the_cache_stays_whole_beside_it(
    setting: str, card_gib: float, dequantized: int
):
    held = replace(SMALL, in_16_bits=2560 * MIB)
    plan = planned(conf("card=8", f"rollout.dequantize={setting}"), card_gib, 1, held)
    assert (plan.dequantized, plan.kv_bytes) == (dequantized, 1536 * MIB)
    assert plan.while_sampling == plan.always + dequantized + 1536 * MIB
    assert any(line.startswith("base in 16 bits (rollout.dequantize)") for line in plan.lines()) == bool(dequantized)


def test_a_base_in_16_bits_that_was_asked_for_takes_from_the_cache_and_is_refused_where_none_is_left():
    held = replace(SMALL, in_16_bits=2560 * MIB)
    asked = conf("card=8", "rollout.dequantize=true", "rollout.kv_gib=null")
    plan = planned(asked, 6, 1, held)
    assert plan.kv_bytes == 6 * GIB - plan.always - 2560 * MIB
    with pytest.raises(ModelError, match=r"^rollout\.dequantize=true needs .* set it to auto or false$"):
        planned(asked, 5.3, 1, held)
    with pytest.raises(ModelError, match=r"^rollout\.dequantize=true .* this base is not NF4"):
        planned(asked, 8, 1)


def test_the_scores_of_a_token_of_every_sequence_take_from_the_cache():
    held = replace(SMALL, score_row=4 * MIB)
    settings = (conf("card=8", "rollout.kv_gib=null", f"rollout.max_sequences={size}") for size in (64, 128))
    few, many = (planned(config, 4.25, 1, held) for config in settings)
    assert (few.scores, many.scores) == (64 * 4 * MIB, 128 * 4 * MIB) and many.always == few.always
    for plan in (few, many):
        assert plan.while_sampling == plan.total == plan.always + plan.scores + plan.kv_bytes
    assert many.parts_gib()["scores"] == 0.5
    assert ["scores of rollout.max_sequences tokens", "-", "0.50"] in [re.split("  +", line) for line in many.lines()]
    with pytest.raises(ModelError, match=r"^sampling one sequence of 768 tokens needs 6\.85 GiB"):
        planned(conf("card=8", "rollout.max_sequences=1024"), 6, 1, held)


def test_training_and_sampling_take_turns():
    """3.5 + 1.5 GiB beside the 2.83 that stay would be more than 7.5: together they don't fit, in turns they do."""
    plan = planned(conf("card=8"), 7.5, 3.5)
    assert plan.always + plan.training + plan.kv_bytes > plan.total
    assert max(plan.while_training, plan.while_sampling) <= plan.total


def test_rows_below_the_base_are_of_the_engines_copy_and_there_before_the_engine():
    """They are allocated with the base: neither twice in the plan nor taken by another program."""
    assert planned(conf("card=8"), 8, 3, replace(SMALL, below=16 * MIB)) == planned(conf("card=8"), 8, 3)


def test_each_part_follows_its_setting():
    def parts(held: Held = SMALL, *overrides: str) -> MemoryPlan:
        return planned(conf("card=8", *overrides), 24, 1, held)

    assert parts(SMALL, "optim@grpo.optim=adamw").optimizer == 128 * MIB  # two float32 moments
    assert parts(SMALL, "grpo.kl_coef=0.01").adapter == (96 + 64) * MIB  # the reference's float32 copy
    assert parts(SMALL, "rollout.keep_free_gib=0").keep_free == 0
    assert parts(replace(SMALL, second_base=3 * GIB)).always - parts().always == 3 * GIB
    base = conf("card=8", name="gsm8k_base")
    mixed = replace(base, sft=replace(base.sft, optim=conf("optim@grpo.optim=adamw").grpo.optim))
    assert planned(mixed, 24, 1).optimizer == 128 * MIB  # the larger of two stages


@pytest.mark.parametrize(
    ("overrides", "card_gib", "peak_gib", "said"),
    [
        # 2.825 stay: 0.5 + 1 + 0.09375 + 0.03125 + 0.7 + 0.5
        (
            [],
            8,
            5.5,
            "training with grpo.tokens_per_micro_batch=4096 needs 8.33 GiB of GPU memory, and the card has 8.00 (0.50 "
            "of them taken by CUDA and other programs): lower that, rollout.keep_free_gib or model.lora.r",
        ),
        (
            ["model.gradient_checkpointing=false", "model.quantize=none", "rollout.share_base=false"],
            8,
            5.5,
            "or set rollout.share_base=true or model.gradient_checkpointing=true or model.quantize=nf4",
        ),
        (
            ["rollout.kv_gib=null"],
            2.834375,
            0,
            "sampling one sequence of 768 tokens needs 2.85 GiB of GPU memory, and the card has 2.83 (0.50 of them "
            "taken by CUDA and other programs): lower grpo.max_completion_tokens, data.max_prompt_tokens or "
            "rollout.keep_free_gib",
        ),
        (
            ["rollout.kv_gib=6"],
            8,
            1,
            "rollout.kv_gib=6 needs 8.83 GiB of GPU memory, and the card has 8.00 (0.50 of them taken by CUDA and "
            "other programs): set it to at most 5.17, or to null for what is left",
        ),
        (
            ["rollout.kv_gib=0.02"],
            8,
            1,
            "rollout.kv_gib=0.02 is less than the 0.03 GiB that one sequence of 768 tokens needs (there are 5.17)",
        ),
    ],
)
def test_too_little_is_one_line_with_need_what_there_is_and_the_keys(
    overrides: list[str], card_gib: float, peak_gib: float, said: str
):
    with pytest.raises(ModelError) as caught:
        planned(conf("card=8", *overrides), card_gib, peak_gib)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_cache_that_a_refusal_names_is_taken():
    assert planned(conf("card=8", "rollout.kv_gib=5.17"), 8, 1).kv_bytes == gib(5.17)


def test_the_largest_stage_is_the_one_that_counts_and_is_named():
    config = conf("card=8", name="gsm8k_base")
    before = parts_before(config, SMALL, total=8 * GIB, free=gib(6.4375), max_context=CONTEXT)
    assert divide(config, before, {"sft": 2 * GIB, "grpo": GIB}).training == 2 * GIB
    assert divide(config, before, {}).training == 0
    with pytest.raises(ModelError, match=r"^training with sft\.tokens_per_micro_batch=4096"):
        divide(config, before, {"sft": 6 * GIB, "grpo": GIB})


def test_the_longest_sequence_is_that_of_any_stage_and_at_most_the_context():
    assert longest_sampled(conf("card=8"), CONTEXT) == 768
    assert longest_sampled(conf("card=8"), 600) == 600
    assert longest_sampled(conf("card=8", "evaluate.max_completion_tokens=2000"), CONTEXT) == 2256
    assert longest_sampled(conf("card=8", "grpo.data.max_prompt_tokens=300"), CONTEXT) == 812
    assert longest_sampled(conf("card=8", "evaluate.sets.gsm8k_test.max_prompt_tokens=400"), CONTEXT) == 912


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


@pytest.mark.parametrize(
    ("hf_config", "size"),
    [
        (SimpleNamespace(num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, head_dim=128), 28_672),
        (SimpleNamespace(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576), 23_040),
        (SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, hidden_size=64, head_dim=None), 512),
    ],
)
def test_a_tokens_cache_by_hand(hf_config: Any, size: int):
    """Keys and values x layers x key-value heads x head size x 2 bytes."""
    assert kv_token_bytes(hf_config) == size


@pytest.mark.parametrize("share_base", [True, False])
def test_what_a_policy_holds(share_base: bool):
    policy = make_policy("qwen3", lora=lora_of("qwen3"))
    frozen = sum(p.numel() for p in policy.model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in policy.trainable().values())
    held = held_by(policy, share_base=share_base)
    sizes = 4 * trained, 0, trained, 2 * 2 * 2 * 8 * 2, 4 * policy.base.config.vocab_size
    assert held == Held(4 * frozen, 0 if share_base else 2 * frozen, 0, *sizes)
    assert kv_token_bytes(make_config("qwen3")) == held.kv_token
    whole = held_by(make_policy("qwen3"), share_base=True)
    assert (whole.base, whole.masters) == (0, 4 * frozen)


def test_a_shared_base_is_its_buffers():
    policy = make_policy("llama", lora=lora_of("llama"))
    policy.weights = SimpleNamespace(  # type: ignore[assignment]
        nbytes=123, nbytes_below=45, states={"q": SimpleNamespace(shape=torch.Size((8, 64)))}
    )
    assert (held_by(policy, share_base=True).base, held_by(policy, share_base=False).second_base) == (123, 123)
    assert held_by(policy, share_base=True).below == 45
    beside = sum(weight.numel() for name, weight in policy.trainable().items() if "lora_A" in name)
    assert beside and held_by(policy, share_base=True).in_16_bits == 2 * (8 * 64 + beside)


def test_the_table():
    plan = planned(conf("card=8"), 8, 3)
    assert plan.lines() == [
        "GPU memory in GiB                           training   sampling",
        "CUDA and other programs                         0.50       0.50",
        "base                                            1.00       1.00",
        "weights that learn, and the engine's copy       0.09       0.09",
        "optimizer                                       0.03       0.03",
        "engine                                          0.70       0.70",
        "worst micro-batch                               3.00          -",
        "the engine's cache                                 -       1.50",
        "kept free (rollout.keep_free_gib)               0.50       0.50",
        "together, of 8.00                               5.82       4.32",
        "the cache holds 56,173 tokens: 73 sequences of 768, the longest",
    ]
    second = replace(plan, second_base=3 * GIB)
    assert "the engine's own base (rollout.share_base)       3.00       3.00" in second.lines()
    assert plan.parts_gib() == {
        "total": 8.0,
        "taken": 0.5,
        "base": 1.0,
        "second_base": 0.0,
        "adapter": 0.094,
        "optimizer": 0.031,
        "engine": 0.7,
        "keep_free": 0.5,
        "training": 3.0,
        "dequantized": 0.0,
        "scores": 0.0,
        "kv": 1.5,
        "while_training": 5.825,
        "while_sampling": 4.325,
    }


def own_tokens(layout: Layout) -> int:
    return sum(layout.lengths) - sum(layout.shared)


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

    def measured(policy: Policy, layout: Layout, *, entropy: bool) -> int:
        assert all(part.training for part in policy.model.modules() if _recomputes(part))
        return 1 if policy.offloads else 2 if policy.recomputed else sizes[own_tokens(layout)]

    monkeypatch.setattr(peak, "peak_bytes", measured)
    for room, sft, grpo in ((5, 3, 5), (4, 3, 2), (2, 2, 2), (1, 1, 1)):
        policy = small_card(64)
        assert rehearse(config, policy, max_context=128, room=room) == {"sft": sft, "grpo": grpo}
        assert policy.recomputed == (room < 5) and policy.offloads is (room < 2)
    fixed = replace(config, model=replace(config.model, gradient_checkpointing=False))
    policy = small_card(64)
    assert rehearse(fixed, policy, max_context=128, room=2) == {"sft": 3, "grpo": 5} and not policy.recomputed


@pytest.mark.parametrize(
    ("each", "room", "recomputed", "tried"),
    [
        (100, 2000, 0, [0]),  # 12 that keep take 1,300
        (100, 1299, 2, [0, 11, 10, 2]),  # nine tenths of the room hold 10 of 12: 100 + 10 * 100
        (100, 1000, 4, [0, 11, 10, 4]),
        (100, 400, 10, [0, 11, 10]),  # 300: no more than two
        (100, 330, 11, [0, 11, 10]),  # one, whatever the share
        (0, 1000, 1, [0, 11, 10, 1]),  # the head hides what they take
        (300, 770, 11, [0, 11, 10]),  # 700 of two is within the room, and not within nine tenths
    ],
)
def test_as_many_layers_as_fit_keep_what_they_made(
    each: int, room: int, recomputed: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
):
    """A layer that keeps takes `each`; without recomputation more than any room but the first row's."""
    config = conf(*SHORT, "stages=[grpo]")
    policy = make_policy("llama", lora=lora_of("llama"), num_hidden_layers=12)
    seen = []

    def measured(policy: Policy, layout: Layout, *, entropy: bool) -> int:
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

    def measured(policy: Policy, layout: Layout, *, entropy: bool) -> int | None:
        seen.append(kept := 12 - policy.recomputed)
        return None if kept > 8 else max(500, 100 * kept)

    monkeypatch.setattr(peak, "peak_bytes", measured)
    assert rehearse(config, policy, max_context=128, room=1000) == {"grpo": 500}
    assert seen == [12, 1, 2, 11, 5] and policy.recomputed == 7


def test_layers_keep_what_the_stage_that_takes_most_leaves_them(monkeypatch: pytest.MonkeyPatch):
    config = conf(*SHORT, "sft.tokens_per_micro_batch=50", "grpo.tokens_per_micro_batch=64", name="gsm8k_base")
    policy = make_policy("llama", lora=lora_of("llama"), num_hidden_layers=12)

    def measured(policy: Policy, layout: Layout, *, entropy: bool) -> int:
        return own_tokens(layout) * (12 - policy.recomputed)

    monkeypatch.setattr(peak, "peak_bytes", measured)
    assert rehearse(config, policy, max_context=128, room=500) == {"sft": 50 * 7, "grpo": 64 * 7}
    assert policy.recomputed == 5


def test_the_second_of_two_micro_batches_runs_beside_the_firsts_gradients():
    policy = small_card(64)
    gradients_there: list[bool] = []
    logprobs = policy.logprobs
    policy.logprobs = lambda *a, **k: (  # type: ignore[method-assign]
        gradients_there.append(all(w.grad is not None for w in policy.trainable().values())) or logprobs(*a, **k)
    )
    assert peak_bytes(policy, Layout.of([30, 20]), entropy=True) == 0
    assert gradients_there == [False, True]


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
    assert plan.total == total and plan.kv_bytes == gib(1.5) and plan.training > 0
    assert abs(plan.taken + plan.base + plan.adapter - (total - free)) < 64 * MIB
    assert plan.while_sampling <= total and plan.while_training <= total
