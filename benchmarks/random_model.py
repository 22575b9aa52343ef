"""Policies of a real model's shape with random weights, made on the card: speed and memory ask no more of a model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from reasoner import config
from reasoner.models import adapters, base_model
from reasoner.models.families import family_of
from reasoner.models.loading import recompute_layers
from reasoner.models.policy import Policy

QWEN2: dict[str, Any] = {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "use_sliding_window": False,
    "dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": {  # Qwen2.5-1.5B
        **QWEN2,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": {  # Qwen2.5-7B
        **QWEN2,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
STD = 0.02


def hf_config(shape: str) -> PretrainedConfig:
    """transformers' config of a shape."""
    return AutoConfig.for_model("qwen2", **SHAPES[shape])


def weights(settings: PretrainedConfig, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name with a random value, drawn on the card one at a time."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(settings)
    draws = torch.Generator("cuda").manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=draws, device="cuda", dtype=torch.bfloat16)
        yield name, 1 + 0.1 * drawn if "norm" in name else drawn * (STD if parameter.dim() == 2 else 0.1)


def random_policy(shape: str, *, nf4: bool, lora: config.Lora, recompute: bool = False) -> Policy:
    """A policy of this shape whose base is in buffers of ours, with a new adapter on it."""
    settings = hf_config(shape)
    base, buffers = base_model.build(
        settings, weights(settings), device=torch.device("cuda", 0), dtype=torch.bfloat16, quantize=nf4
    )
    if recompute:
        recompute_layers(base, shape)
    adapted = adapters.attach(base, lora, name=shape, revision=None)
    return Policy(adapted, family_of(settings), revision=None, weights=buffers)
