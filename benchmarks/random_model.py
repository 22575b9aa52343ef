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

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
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
    "135m": {  # SmolLM2-135M, as a Qwen2
        **QWEN2,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
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
    "8b": {  # Llama-3.1-8B
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "trial": {  # to see whether a benchmark runs, on any machine
        **QWEN2,
        "vocab_size": 515,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
}
STD = 0.02


def hf_config(shape: str, **other: Any) -> PretrainedConfig:
    """transformers' config of a shape; `other` settings replace its own."""
    settings = {**SHAPES[shape], **other}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def num_projection_weights(settings: PretrainedConfig) -> int:
    """Weights of the projections in all layers: what a token is multiplied by outside embedding and head."""
    heads: int = settings.num_attention_heads
    width: int = settings.hidden_size
    head_dim = getattr(settings, "head_dim", None) or width // heads
    attention = 2 * width * head_dim * (heads + settings.num_key_value_heads)
    return settings.num_hidden_layers * (attention + 3 * width * settings.intermediate_size)


def weights(settings: PretrainedConfig, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name with a random value, drawn one at a time where it stays."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(settings)
    draws = torch.Generator(DEVICE).manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=draws, device=DEVICE, dtype=torch.bfloat16)
        drawn *= STD if parameter.dim() == 2 else 0.1  # in place: a copy of an embedding is a gigabyte
        yield name, drawn.add_(1) if "norm" in name else drawn


def random_policy(
    shape: str, *, nf4: bool, lora: config.Lora, recompute: bool = False, engine_rows: bool = False
) -> Policy:
    """A policy of this shape whose base is in buffers of ours, with a new adapter on it. `engine_rows`: as for
    `load_model`."""
    settings = hf_config(shape)
    how: Any = {"device": DEVICE, "dtype": torch.bfloat16, "quantize": nf4, "beside": lora if engine_rows else None}
    base, buffers = base_model.build(settings, weights(settings), **how)
    adapted = adapters.attach(base, lora, name=shape, revision=None)
    policy = Policy(adapted, family_of(settings), revision=None, weights=buffers)
    if recompute:  # after peft, as a run does
        recompute_layers(policy.base, shape)
    return policy
