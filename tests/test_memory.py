"""The parts of a card, worked by hand for four cards."""

import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reasoner.compose import compose_conf
from reasoner.config import Config, validate
from reasoner.errors import ModelError
from reasoner.memory import (
    GIB,
    Held,
    MemoryPlan,
    divide,
    held_by,
    kv_token_bytes,
    longest_sampled,
    parts_before,
)
from tests.models.tiny_models import lora_of, make_config, make_policy

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
    prompt_token=0,
    packed=0,
)
CONTEXT = 32_768
ENGINE = GIB // 2


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
        prompts=0,
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
        # What is left: the card less 0.5 taken, base, 0.09375 adapter, 0.03125 optimizer, 0.5 engine, 0.5 kept free.
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
        # 2.625 stay and 1.5 are rollout.kv_gib's: the 2.5 fit on 8, and on 6.62 not beside the whole cache
        ("auto", 8, 2560 * MIB),
        ("auto", 6.62, 0),
        ("auto", 6.63, 2560 * MIB),
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
        planned(asked, 5.1, 1, held)
    with pytest.raises(ModelError, match=r"^rollout\.dequantize=true .* this base is not NF4"):
        planned(asked, 8, 1)


def test_what_a_step_of_the_engine_makes_takes_from_the_cache():
    """The scores of every sequence's token, and twice that in vLLM's sampler, where prompts take no more."""
    held = replace(SMALL, score_row=MIB, prompt_token=MIB // 8)
    settings = (conf("card=8", "rollout.kv_gib=null", f"rollout.max_sequences={size}") for size in (64, 256))
    few, many = (planned(config, 4, 1, held) for config in settings)
    assert (few.scores, many.scores) == (64 * MIB, 256 * MIB) and many.always == few.always
    assert (few.prompts, many.prompts) == (2048 * MIB // 8, 2 * 256 * MIB)  # 2,048 tokens of prompts
    for plan in (few, many):
        assert plan.while_sampling == plan.total == plan.always + plan.scores + plan.prompts + plan.kv_bytes
    assert many.parts_gib()["scores"] == 0.25 and many.parts_gib()["prompts"] == 0.5
    lines = [re.split("  +", line) for line in many.lines()]
    assert ["scores of rollout.max_sequences tokens", "-", "0.25"] in lines
    assert ["reading prompts (rollout.max_batched_tokens, max_sequences)", "-", "0.50"] in lines
    with pytest.raises(ModelError, match=r"^sampling one sequence of 768 tokens needs 5\.65 GiB"):
        planned(conf("card=8", "rollout.max_sequences=1024"), 5, 1, held)


def test_training_and_sampling_take_turns():
    """3.5 + 1.5 GiB beside the 2.63 that stay would be more than 7.5: together they don't fit, in turns they do."""
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
        # 2.625 stay: 0.5 + 1 + 0.09375 + 0.03125 + 0.5 + 0.5
        (
            [],
            8,
            5.5,
            "training with grpo.tokens_per_micro_batch=4096 needs 8.13 GiB of GPU memory, and the card has 8.00 (0.50 "
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
            2.634375,
            0,
            "sampling one sequence of 768 tokens needs 2.65 GiB of GPU memory, and the card has 2.63 (0.50 of them "
            "taken by CUDA and other programs): lower rollout.max_batched_tokens, rollout.max_sequences, "
            "grpo.max_completion_tokens, data.max_prompt_tokens or rollout.keep_free_gib",
        ),
        (
            ["rollout.kv_gib=6"],
            8,
            1,
            "rollout.kv_gib=6 needs 8.63 GiB of GPU memory, and the card has 8.00 (0.50 of them taken by CUDA and "
            "other programs): set it to at most 5.37, or to null for what is left",
        ),
        (
            ["rollout.kv_gib=0.02"],
            8,
            1,
            "rollout.kv_gib=0.02 is less than the 0.03 GiB that one sequence of 768 tokens needs (there are 5.37)",
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
    assert planned(conf("card=8", "rollout.kv_gib=5.37"), 8, 1).kv_bytes == gib(5.37)


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
    shape = make_config("qwen3")
    sizes += (2 * (3 * shape.intermediate_size + 4 * shape.hidden_size), 0)
    assert held == Held(4 * frozen, 0 if share_base else 2 * frozen, 0, *sizes)
    assert kv_token_bytes(make_config("qwen3")) == held.kv_token
    whole = held_by(make_policy("qwen3"), share_base=True)
    assert (whole.base, whole.masters) == (0, 4 * frozen)


def test_a_shared_base_is_its_buffers():
    policy = make_policy("llama", lora=lora_of("llama"))
    policy.weights = SimpleNamespace(  # type: ignore[assignment]
        nbytes=123,
        nbytes_below=45,
        states={"q": SimpleNamespace(shape=torch.Size((8, 64)))},
        fused_states={"q": SimpleNamespace(shape=torch.Size((8, 64))), "k": SimpleNamespace(shape=torch.Size((4, 64)))},
    )
    assert (held_by(policy, share_base=True).base, held_by(policy, share_base=False).second_base) == (123, 123)
    assert held_by(policy, share_base=True).below == 45
    beside = sum(weight.numel() for name, weight in policy.trainable().items() if "lora_A" in name)
    assert beside and held_by(policy, share_base=True).in_16_bits == 2 * (8 * 64 + beside)
    assert held_by(policy, share_base=True).packed == 2 * 8 * 64


def test_an_nf4_matrix_is_made_for_prompts_and_in_the_graphs_memory():
    plain, packed = (
        planned(conf("card=8", "rollout.max_sequences=3000"), 8, 1, replace(SMALL, prompt_token=MIB // 8, packed=size))
        for size in (0, 50 * MIB)
    )
    assert plain.prompts == 3000 * MIB // 8  # a step takes no fewer tokens than sequences
    assert (packed.engine - plain.engine, packed.prompts - plain.prompts) == (50 * MIB, 50 * MIB)


def test_the_table():
    plan = planned(conf("card=8"), 8, 3)
    assert plan.lines() == [
        "GPU memory in GiB                           training   sampling",
        "CUDA and other programs                         0.50       0.50",
        "base                                            1.00       1.00",
        "weights that learn, and the engine's copy       0.09       0.09",
        "optimizer                                       0.03       0.03",
        "engine                                          0.50       0.50",
        "worst micro-batch                               3.00          -",
        "the engine's cache                                 -       1.50",
        "kept free (rollout.keep_free_gib)               0.50       0.50",
        "together, of 8.00                               5.62       4.12",
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
        "engine": 0.5,
        "keep_free": 0.5,
        "training": 3.0,
        "dequantized": 0.0,
        "scores": 0.0,
        "prompts": 0.0,
        "kv": 1.5,
        "while_training": 5.625,
        "while_sampling": 4.125,
    }
