"""LoRA through peft: one adapter, `policy`, trained by SFT and continued by GRPO, written in the PEFT layout.

arXiv:2106.09685. Its matrices are float32 whatever the base is: bfloat16 would swallow small steps (0.02 - 1e-5 stays
0.02). Left out: DoRA, biases, modules_to_save and adapters on the head or the embeddings, which would untie them.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from reasoner import config
from reasoner.errors import ModelError
from reasoner.models.adapted_linear import AdaptedLinear
from reasoner.models.sources import first_line

ADAPTER = "policy"
WEIGHTS_FILE = "adapter_model.safetensors"


def attach(base: PreTrainedModel, lora: config.Lora, *, name: str, revision: str | None) -> PeftModel:
    """The base frozen, with a new adapter that changes nothing yet (B = 0). `name` and `revision` say in its config
    what base it is for.

    Raises ModelError if a target is not a linear layer of this model, and lists those there.
    """
    there = _linear_names(base)
    unknown = [target for target in lora.targets if target not in there]
    if unknown:
        raise ModelError(
            f"model.lora.targets: {name} has no linear layer {', '.join(unknown)}; it has {', '.join(there)}. "
            f"Set model.lora.targets=[{','.join(there)}]"
        )
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (peft writes int and divides it as a float)
        target_modules=list(lora.targets),
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        bias="none",
        task_type="CAUSAL_LM",
        revision=revision,
    )
    _compute_by_ours(settings)
    base.name_or_path = name  # what peft writes as the adapter's base
    with _old_names_allowed():
        model = get_peft_model(base, settings, adapter_name=ADAPTER)
    assert isinstance(model, PeftModel)
    return model


def _compute_by_ours(settings: LoraConfig) -> None:
    """Have peft put our layer around linear ones, NF4 or not: its way for layers of one's own."""
    settings._register_custom_module({torch.nn.Linear: AdaptedLinear})


def _linear_names(base: PreTrainedModel) -> list[str]:
    head = base.get_output_embeddings()
    linears = (name for name, part in base.named_modules() if isinstance(part, torch.nn.Linear) and part is not head)
    return sorted({name.rsplit(".", 1)[-1] for name in linears})


def place_of(name: str) -> tuple[str, str]:
    """The module of the base that a trained matrix belongs to, and which of the two it is.

    >>> place_of("base_model.model.model.layers.0.mlp.up_proj.lora_A.policy.weight")
    ('model.layers.0.mlp.up_proj', 'A')
    """
    module, _, matrix = name.removeprefix("base_model.model.").removesuffix(f".{ADAPTER}.weight").rpartition(".lora_")
    assert module and matrix in ("A", "B"), name
    return module, matrix


def linear_rows(base: PreTrainedModel) -> dict[str, int]:
    """How many outputs each linear layer of the base has, by its name without an adapter around it."""
    return {
        name.removesuffix(".base_layer"): part.out_features
        for name, part in base.named_modules()
        if isinstance(part, torch.nn.Linear) and ".lora_" not in name
    }


def scaling(model: PeftModel) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) with rslora."""
    settings = cast(LoraConfig, model.peft_config[ADAPTER])
    return settings.lora_alpha / (settings.r**0.5 if settings.use_rslora else settings.r)


def save(model: PeftModel, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors in `folder`, as `PeftModel.from_pretrained` reads them."""
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    settings = copy(model.peft_config[ADAPTER])
    settings.inference_mode = True
    settings.save_pretrained(str(folder))


def load(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base with the adapter that `save` wrote, trainable. Raises ModelError if the folder does not hold one."""
    if not (folder / WEIGHTS_FILE).is_file() or not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds no adapter: it needs adapter_config.json and {WEIGHTS_FILE}")
    try:
        settings = cast(LoraConfig, PeftConfig.from_pretrained(str(folder)))
        _compute_by_ours(settings)
        base.name_or_path = settings.base_model_name_or_path or ""
        with _old_names_allowed():
            return PeftModel.from_pretrained(
                base, str(folder), adapter_name=ADAPTER, is_trainable=True, config=settings
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the adapter in {folder} can't be read: {first_line(error)}") from None


def reload(model: PeftModel, folder: Path) -> None:
    """Read the files that `save` wrote into the adapter that is there.

    Raises ModelError if the files describe another adapter, or lack a matrix of this one.
    """
    saved, live = PeftConfig.from_pretrained(str(folder)), model.peft_config[ADAPTER]
    for setting in ("r", "lora_alpha", "use_rslora", "target_modules", "base_model_name_or_path"):
        if getattr(saved, setting) != getattr(live, setting):
            raise ModelError(
                f"the adapter in {folder} has {setting}={getattr(saved, setting)}, not {getattr(live, setting)}"
            )
    report = set_peft_model_state_dict(model, load_file(folder / WEIGHTS_FILE), adapter_name=ADAPTER)
    lost = [key for key in report.missing_keys if ".lora_" in key] + list(report.unexpected_keys)
    if lost:
        raise ModelError(f"the adapter in {folder} does not fit: {len(lost)} matrices differ, first {lost[0]}")


def dropouts(model: torch.nn.Module) -> list[torch.nn.Dropout]:
    """Those that drop an adapter's inputs; none where its dropout is 0."""
    named = model.named_modules()
    return [part for name, part in named if isinstance(part, torch.nn.Dropout) and ".lora_dropout." in name]


@contextmanager
def _old_names_allowed() -> Iterator[None]:
    """peft 0.21 asks transformers 5.24 by a name that it deprecates; a user can do nothing about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
