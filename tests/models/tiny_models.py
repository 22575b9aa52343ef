"""Tiny random models of every family that packs, by transformers, and the naive truth: one sequence at a time."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from reasoner import config
from reasoner.grpo.batch import PackedBatch
from reasoner.models import adapters
from reasoner.models.attention import PACKED, Layout
from reasoner.models.families import family_of
from reasoner.models.policy import Policy

VOCABULARY = 64
WINDOW = 5  # tokens, shorter than most of LENGTHS
LENGTHS = (1, 7, 30, 1, 12, 13, 2)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
SLIDING: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0, **SLIDING},
    "qwen3": {"tie_word_embeddings": True},
    "phi3": {"sliding_window": WINDOW},
    "gemma2": {**SLIDING, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SLIDING, "final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **SLIDING},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
    "olmo2": {},
    "smollm3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
ATTENTION_ONLY = TARGETS[:4]  # experts are no linear layers


Batch = PackedBatch


def make_config(family: str, **changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **changes})


def make_model(family: str, seed: int = 0, *, attention: str = PACKED, **changes: Any) -> PreTrainedModel:
    """Weights large enough that logits spread, so that a wrong scale or a leak moves logprobs far."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = make_config(family, initializer_range=0.2, **changes)
        return AutoModelForCausalLM.from_config(settings, attn_implementation=attention, dtype=torch.float32)


def make_policy(
    family: str = "llama", *, lora: config.Lora | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> Policy:
    """A policy that is trained whole, or through an adapter whose B is not zero."""
    base = make_model(family, **changes).to(dtype)
    if lora is None:
        return Policy(base, family_of(base.config), revision=None)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = adapters.attach(base.requires_grad_(False), lora, name="tiny", revision=None)
    fill_b(model)
    return Policy(model.to(dtype), family_of(base.config), revision=None)


def lora_of(family: str, **changes: Any) -> config.Lora:
    targets = FUSED if family == "phi3" else ATTENTION_ONLY if family in ("qwen3_moe", "gpt_oss") else TARGETS
    return config.Lora(r=4, alpha=8, targets=targets, **changes)


def fill_b(model: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def make_batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 2, high: int = VOCABULARY) -> Batch:
    """Random tokens; every token but each sequence's first is trained."""
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.of(lengths)
    ids = torch.randint(3, high, (sum(lengths),), generator=generator)
    return Batch(ids, layout, layout.positions > 0)


def one_at_a_time(model: torch.nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
    """[N] logprobs by transformers' own forward, a sequence alone, log_softmax of its logits; 0 at first tokens."""
    rows = []
    for ids in batch.token_ids.split(batch.layout.lengths):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        found = (logits / temperature).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        rows.append(torch.cat([found.new_zeros(1), found]))
    return torch.cat(rows)


def gradients(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of everything that learns."""
    weights = policy.trainable()
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
