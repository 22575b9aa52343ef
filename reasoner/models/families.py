"""What differs between model families, as a table: whether they pack, and what happens to the logits after the head.

A family is named by its config's `model_type`. One that is not in the table may still be trained: its sequences run one
a pass, and the loader compares its first logits with ours. Left out: anything that transformers' own modelling code
already answers.
"""

import re
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from reasoner.errors import ModelError


@dataclass(frozen=True, slots=True)
class Family:
    """One model's answers: logits = logit_scale * hidden @ head.T, then soft_cap * tanh(logits / soft_cap) if there is
    a cap.

    >>> family_of(Gemma2Config())
    Family(name='gemma2', packs=True, soft_cap=30.0, logit_scale=1.0, decode_attention='eager', known=True,
           shares=True, fused=True)
    """

    name: str
    packs: bool  # False: one sequence a pass
    soft_cap: float | None
    logit_scale: float
    decode_attention: str  # transformers' attention for `generate`, which needs a cache and a mask
    known: bool
    shares: bool  # an engine can hold views of its weights (base_model.py), which NF4 needs too
    fused: bool  # its norms, rotary positions and MLPs can go to kernels (fused.py)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; keys are names in the model's config."""

    packs: bool = True
    soft_cap_key: str | None = None
    multiplies_key: str | None = None
    divides_key: str | None = None
    decode_attention: str = "sdpa"  # eager where transformers' sdpa lacks what the family needs
    shares: bool = False  # tried with vLLM: its parameters are those of transformers, q, k, v and gate, up side by side
    fused: bool = False  # its modules are of the forms that fused.py knows


PLAIN = Row()
SHARED = Row(shares=True, fused=True)
ONE_A_PASS = Row(packs=False)  # linear attention carries its state across a packed row
GRANITE = Row(divides_key="logits_scaling")
COHERE = Row(multiplies_key="logit_scale")
FAMILIES: dict[str, Row] = {
    "llama": SHARED,
    "mistral": SHARED,
    "qwen2": SHARED,
    "qwen3": SHARED,
    "qwen3_moe": PLAIN,
    "phi3": SHARED,
    "olmo2": PLAIN,
    "smollm3": PLAIN,
    "gemma2": Row(soft_cap_key="final_logit_softcapping", decode_attention="eager", shares=True, fused=True),
    "gemma3_text": Row(soft_cap_key="final_logit_softcapping", shares=True, fused=True),
    "cohere": COHERE,
    "cohere2": COHERE,
    "granite": GRANITE,
    "gpt_oss": Row(decode_attention="eager"),
    "qwen3_next": ONE_A_PASS,
    "qwen3_5_text": ONE_A_PASS,
}

# Names under which configs of transformers' models change the logits after the head (logits_soft_cap,
# lm_head_multiplier, output_multiplier, logits_mup_width_multiplier, MiniCPM's dim_model_base ...).
SCALES_LOGITS = re.compile(r"logit|soft_?cap|lm_head_(mult|scal)|output_(mult|scal)|mup|dim_model_base")
# These speak of attention scores, of experts or of what a forward returns.
OTHER_LOGITS = re.compile(r"^(attn|attention|conf_attention)_|router|^num_logits_to_keep$|^output_\w*logits$")


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model's (text) config. Raises ModelError if the config scales logits in a way that is not in the
    table."""
    row = FAMILIES.get(config.model_type)
    known = row or ONE_A_PASS
    _refuse_unknown_scaling(config, known)
    return Family(
        name=config.model_type,
        packs=known.packs,
        soft_cap=_number(config, known.soft_cap_key),
        logit_scale=(_number(config, known.multiplies_key) or 1.0) / (_number(config, known.divides_key) or 1.0),
        decode_attention=known.decode_attention,
        known=row is not None,
        shares=known.shares,
        fused=known.fused,
    )


def _number(config: PretrainedConfig, key: str | None) -> float | None:
    value = getattr(config, key, None) if key else None
    return None if value is None else float(value)


def _refuse_unknown_scaling(config: PretrainedConfig, row: Row) -> None:
    handled = {row.soft_cap_key, row.multiplies_key, row.divides_key}
    for key, value in _flat(config).items():
        neutral = value is None or value is False or value in (0, 1)
        if SCALES_LOGITS.search(key) and not OTHER_LOGITS.search(key) and key not in handled and not neutral:
            raise ModelError(
                f"config.json of this {config.model_type} model has {key}={value!r}, which seems to scale its "
                "logits in a way we don't know. Use another model, or add a row to reasoner/models/families.py"
            )


def _flat(config: PretrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if not isinstance(value, dict | list)}
