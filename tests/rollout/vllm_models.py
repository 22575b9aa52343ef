"""Tiny random policies whose weights vLLM can share, on the card: heads of 64 and rows that NF4 fits."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from reasoner import config
from reasoner.models import adapters, base_model
from reasoner.models.families import family_of
from reasoner.models.policy import Policy
from tests.models.tiny_models import FUSED, TARGETS

VOCABULARY = 500  # no multiple of 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.06,
}
GEMMA_LAYERS = {"num_hidden_layers": 4, "sliding_window": 64, "query_pre_attn_scalar": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "phi3": {},
    "gemma2": {**GEMMA_LAYERS, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0},
    "gemma3_text": {**GEMMA_LAYERS, "sliding_window_pattern": 2},
}


def make_policy(family: str, *, nf4: bool, r: int = 8, rows: bool = True, **changes: Any) -> Policy:
    """A policy with a random base and an adapter that changes much, in buffers of ours; with `rows` those of a 16-bit
    base have room for the engine's A's."""
    settings = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        for name, weight in source.named_parameters():
            if "norm" in name:
                weight.data += 0.1 * torch.randn(weight.shape)
            elif name.endswith("bias"):
                weight.data = 0.1 * torch.randn(weight.shape)
    lora = config.Lora(r=r, alpha=2 * r, targets=FUSED if family == "phi3" else TARGETS)
    how: Any = {"device": torch.device("cuda", 0), "dtype": torch.bfloat16, "quantize": nf4}
    base, weights = base_model.build(settings, source.state_dict().items(), **how, beside=lora if rows else None)
    adapted = adapters.attach(base, lora, name="tiny", revision=None)
    policy = Policy(adapted, family_of(settings), revision=None, weights=weights)
    change(policy, seed=1)
    return policy


@torch.no_grad()
def change(policy: Policy, seed: int, std: float = 0.03, only: str = "") -> None:
    """Draw every B anew (those of modules ending in `only`; the others become 0)."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in policy.trainable().items():
        module, matrix = adapters.place_of(name)
        if matrix == "B":
            drawn = torch.randn(weight.shape, generator=generator) * std
            weight.copy_(drawn if module.endswith(only) else torch.zeros(()))
