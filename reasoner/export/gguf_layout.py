"""What a GGUF file says of a model's shape, and its weights under llama.cpp's names, in llama.cpp's order.

The names come from the `gguf` package's map; what differs by family is one row of ARCHITECTURES. Left out: experts, and
whatever llama.cpp would compute otherwise than transformers does. That is refused by name, before anything is written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from reasoner.errors import ModelError
from reasoner.models import merged

SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)
PLAIN_ROPE, LINEAR, LLAMA3, LONG = "default", "linear", "llama3", "longrope"
REMEDY = "export to=merged, or to=adapter"
# Sizes whose attention scale llama.cpp takes from the width and not from head_dim (its source: LLM_TYPE_27B).
WIDE_LAYERS = {"gemma2": 46, "gemma3_text": 62}


@dataclass(frozen=True, slots=True)
class Architecture:
    """How llama.cpp computes one of our families."""

    arch: MODEL_ARCH
    activations: tuple[str, ...] = SILU
    interleaved: bool = False  # a rotary pair lies side by side in its q and k, not half a head apart
    norm_offset: float = 0.0  # what transformers adds to a norm's weight when it computes
    windows: bool = False  # it keeps sliding windows; else a sequence must fit into one
    ropes: tuple[str, ...] = (PLAIN_ROPE, LINEAR, LLAMA3)
    any_head_dim: bool = True  # heads x head_dim may differ from the width
    tied: bool = False  # it knows no head apart from the embedding


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, any_head_dim=False),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "phi3": Architecture(MODEL_ARCH.PHI3, ropes=(PLAIN_ROPE, LONG), any_head_dim=False),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, GELU, norm_offset=1.0, windows=True, ropes=(PLAIN_ROPE,), tied=True),
    "gemma3_text": Architecture(
        MODEL_ARCH.GEMMA3, GELU, norm_offset=1.0, windows=True, ropes=(PLAIN_ROPE, LINEAR), tied=False
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One tensor of the file: made when asked for, on the policy's device."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def architecture(config: PretrainedConfig) -> Architecture:
    """The row for a model's config. Raises ModelError, naming what llama.cpp has not, or would compute otherwise."""
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"GGUF is not there for {config.model_type} models (it is for {known}): {REMEDY}")
    wrong = list(_differences(config, row))
    if wrong:
        raise ModelError(f"llama.cpp can't compute this {config.model_type} model: {'; '.join(wrong)}: {REMEDY}")
    return row


def _differences(config: Any, row: Architecture):
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in row.activations:
        yield f"its activation is {activation}, not {row.activations[0]}"
    rope = _rope(config)
    if rope["rope_type"] not in row.ropes:
        yield f"its rope scaling is {rope['rope_type']}; known are {', '.join(row.ropes)}"
    if rope["rope_type"] != LONG and float(rope.get("partial_rotary_factor") or 1.0) != 1.0 and row.interleaved:
        yield f"only {rope['partial_rotary_factor']:.0%} of each head is rotated"
    heads, head_dim = config.num_attention_heads, head_size(config)
    if not row.any_head_dim and heads * head_dim != config.hidden_size:
        yield f"{heads} heads of {head_dim} are not its width of {config.hidden_size}"
    if row.tied and not config.tie_word_embeddings:
        yield "its head is not the embedding (tie_word_embeddings=false)"
    if row.windows:
        wide = config.num_hidden_layers == WIDE_LAYERS[config.model_type]
        scale = config.hidden_size // heads if wide else head_dim
        if config.query_pre_attn_scalar != scale:
            yield f"its query_pre_attn_scalar is {config.query_pre_attn_scalar}, not {scale}"
        if config.model_type == "gemma3_text" and config.attn_logit_softcapping:
            yield f"it caps attention scores at {config.attn_logit_softcapping}"
        if config.model_type == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
            yield "it caps no attention scores or no logits"


def head_size(config: Any) -> int:
    """Numbers in one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: Any) -> dict[str, Any]:
    """The rotary settings of the layers that see everything."""
    given = config.rope_parameters
    return {"rope_type": PLAIN_ROPE, **given.get("full_attention", given)}


def context_length(config: Any) -> int:
    """Tokens that llama.cpp may be given and computes as transformers does: where it has no sliding window, no more
    than one holds; with longrope no more than the short factors are for, as it chooses by the context and not by the
    sequence."""
    row, most, rope = ARCHITECTURES[config.model_type], config.max_position_embeddings, _rope(config)
    if rope["rope_type"] == LONG:
        most = min(most, _original_context(config, rope))
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if row.windows or not window or (kinds and "sliding_attention" not in kinds):
        return most
    return min(most, window)


def write_settings(writer: GGUFWriter, config: Any, *, rows: int) -> None:
    """The keys of the model's shape; `rows` of the embedding."""
    row, rope, head_dim = ARCHITECTURES[config.model_type], _rope(config), head_size(config)
    rotated = int(head_dim * float(rope.get("partial_rotary_factor") or 1.0))
    writer.add_vocab_size(rows)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == LINEAR:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == LONG:
        _, scale = ROPE_INIT_FUNCTIONS[LONG](config, torch.device("cpu"))
        writer.add_rope_scaling_orig_ctx_len(_original_context(config, rope))
        writer.add_rope_scaling_attn_factors(scale)
    if row.windows:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        if config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _original_context(config: Any, rope: dict[str, Any]) -> int:
    own = getattr(config, "original_max_position_embeddings", None)
    return rope.get("original_max_position_embeddings") or own or config.max_position_embeddings


def weights(config: Any, values: merged.Values) -> list[Weight]:
    """The file's tensors, of the merged values. Raises ModelError for a weight that has no name there."""
    row = ARCHITECTURES[config.model_type]
    names = get_tensor_name_map(row.arch, config.num_hidden_layers)
    found = [Weight(name, tuple(factors.shape), lambda f=factors: f) for name, factors in _rope_factors(config)]
    for name, (shape, make) in values.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ModelError(f"{MODEL_ARCH_NAMES[row.arch]} of llama.cpp has no place for the weight {name}: {REMEDY}")
        found.append(Weight(target, tuple(shape), _arranged(name, make, config, row)))
    return found


def _arranged(name: str, make: Callable[[], Tensor], config: Any, row: Architecture) -> Callable[[], Tensor]:
    module = name.rpartition(".")[0]
    if row.norm_offset and name.endswith("norm.weight"):
        return lambda: make().float() + row.norm_offset
    if row.interleaved and module.endswith((".q_proj", ".k_proj")):
        return lambda: interleave(make(), head_size(config))
    return make


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k [heads * head_dim, ...], transformers' order (i pairs with i + head_dim / 2) to Meta's, which
    llama.cpp kept (2i with 2i + 1)."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def _rope_factors(config: Any) -> list[tuple[str, Tensor]]:
    """What llama.cpp divides the plain rotary frequencies by: float32 [rotated / 2], under its tensors' names."""
    rope = _rope(config)
    if rope["rope_type"] == LONG:
        both = (("rope_factors_long.weight", rope["long_factor"]), ("rope_factors_short.weight", rope["short_factor"]))
        return [(name, torch.tensor(factors, dtype=torch.float32)) for name, factors in both]
    if rope["rope_type"] == LLAMA3:
        scaled, _ = ROPE_INIT_FUNCTIONS[LLAMA3](config, torch.device("cpu"))
        size = head_size(config)
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        return [("rope_freqs.weight", plain / scaled)]
    return []
