"""A base model from a hub or folder, a GGUF file or a random generator, in the dtype that was asked for.

Two ways lead there. Under an adapter on a GPU the weights go into buffers of ours one by one (base_model.py), so that
an engine can share them and NF4 never meets the whole model in 16 bits. All else transformers loads: it takes the
checkpoint's own dtype unless told, and makes up weights that a checkpoint lacks with no more than a log line; both are
settled here.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from reasoner import config
from reasoner.errors import ModelError
from reasoner.models import base_files, base_model, gguf, scratch, sources
from reasoner.models.attention import PACKED
from reasoner.models.base_weights import BaseWeights
from reasoner.models.families import FAMILIES, family_of

# What transformers raises on files that it can't use.
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


def dtype_of(model: config.Model, device: torch.device) -> torch.dtype:
    """float32 for weights that learn, which in bfloat16 would swallow their steps; a frozen base on CUDA is bfloat16
    unless told."""
    half = model.dtype == "bfloat16" or (model.dtype == "auto" and device.type == "cuda" and model.lora is not None)
    return torch.bfloat16 if half else torch.float32


def read(
    model: config.Model, tokenizer: PreTrainedTokenizerBase, device: torch.device, *, engine_rows: bool = False
) -> tuple[PreTrainedModel, BaseWeights | None]:
    """The model on `device`, its attention ours where its family packs, and the buffers it looks at where it has such.
    `engine_rows`: see `loading.load_model`.

    Raises ModelError if a weight is missing or unreadable, or the model can't be quantized as asked.
    """
    dtype = dtype_of(model, device)
    beside = model.lora if engine_rows else None
    if model.scratch:
        base = _from_config(scratch.make_config(model.scratch, model.max_context), dtype)
    elif model.gguf:
        hf_config, tensors = _read_gguf(gguf.find(model.gguf), tokenizer)
        if shares(model, hf_config, device):
            return _onto_buffers(model, hf_config, tensors.items(), device, beside)
        base = _from_config(hf_config, dtype)
        base.load_state_dict(tensors)
    else:
        hf_config = sources.read_config(model)
        _check_quantized(model, hf_config)
        if shares(model, hf_config, device):
            return _onto_buffers(model, hf_config, base_files.read(sources.locate(model)), device, beside)
        base = _from_pretrained(model, dtype, device)
    return cast(PreTrainedModel, base.to(device)), None  # pyright: ignore[reportArgumentType]


def shares(model: config.Model, hf_config: PretrainedConfig, device: torch.device) -> bool:
    """Whether the base goes into buffers of ours. Raises ModelError where NF4 was asked for and it can't."""
    family = family_of(hf_config)
    fits = model.lora is not None and device.type == "cuda" and dtype_of(model, device) == torch.bfloat16
    if model.quantize == "nf4" and device.type != "cuda":
        raise ModelError("model.quantize=nf4 needs a CUDA GPU: set model.quantize=none")
    if model.quantize == "nf4" and not (fits and family.shares):
        known = ", ".join(name for name, row in FAMILIES.items() if row.shares)
        raise ModelError(
            f"model.quantize=nf4 is not there for this {family.name} model (it is for {known}): set model.quantize=none"
        )
    return fits and family.shares


def _quantization(hf_config: PretrainedConfig) -> dict[str, Any]:
    """How a checkpoint was quantized before, {} where it was not."""
    before = getattr(hf_config, "quantization_config", None) or {}
    return before if isinstance(before, dict) else before.to_dict()


def _check_quantized(model: config.Model, hf_config: PretrainedConfig) -> None:
    """Raises ModelError for a checkpoint whose stored numbers would be read as weights that they are not."""
    before = _quantization(hf_config)
    if not before:
        return
    method = str(before.get("quant_method", "bitsandbytes"))
    if method != "bitsandbytes" or not before.get("load_in_4bit"):
        told = f"{method}, 8 bits" if before.get("load_in_8bit") else method
        raise ModelError(
            f"{model.name} is quantized ({told}), and only bitsandbytes' NF4 can be read: name the model as it was "
            "before, with model.quantize=nf4 if it is too large"
        )
    if model.quantize == "none":
        raise ModelError(
            f"{model.name} is quantized already: set model.quantize=nf4, or name the model as it was before"
        )


def _onto_buffers(
    model: config.Model,
    hf_config: PretrainedConfig,
    source: Iterable[tuple[str, Any]],
    device: torch.device,
    beside: config.Lora | None,
) -> tuple[PreTrainedModel, BaseWeights]:
    skip = [base_files.text_name(name) for name in _quantization(hf_config).get("llm_int8_skip_modules") or ()]
    hf_config = copy.deepcopy(hf_config)
    vars(hf_config).pop("quantization_config", None)
    how: Any = {"device": device, "dtype": torch.bfloat16, "quantize": model.quantize == "nf4", "skip": skip}
    try:
        return base_model.build(hf_config, source, **how, beside=beside)
    except UNREADABLE as error:
        raise sources.unreadable(model, error) from None


def _attention(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {"attn_implementation": PACKED} if family_of(hf_config).packs else {}


def _from_config(hf_config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(hf_config, dtype=dtype, **_attention(hf_config))


def _from_pretrained(model: config.Model, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    source, hf_config = sources.locate(model), sources.read_config(model)
    options = dict(
        source.options, config=hf_config, dtype=dtype, use_safetensors=True, key_mapping=base_files.TEXT_PART
    )
    if device.type == "cuda":
        options["device_map"] = {"": device}  # straight to the card: main memory need not hold the model
    try:
        return _whole(source.path, model.name, options | _attention(hf_config))
    except UNREADABLE as error:
        raise sources.unreadable(model, error) from None


def _read_gguf(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """The model's config and its dequantized weights; a model that transformers loaded from GGUF refuses to be
    saved, so what is made of them is a model of its own."""
    options = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    try:
        loaded = _whole(str(path.parent), str(path), options)
    except UNREADABLE as error:
        raise ModelError(f"{path} can't be read: {sources.first_line(error)}") from None
    settings = loaded.config.to_dict()
    for of_the_file in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(of_the_file, None)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return type(loaded.config).from_dict(settings | special), loaded.state_dict()


def _whole(path: str, name: str, options: dict[str, Any]) -> PreTrainedModel:
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    base, report = loaded
    lost = sorted(str(key) for part in ("missing_keys", "mismatched_keys") for key in report[part])
    if lost:
        raise ModelError(
            f"the files of {name} lack {len(lost)} of its weights, first {lost[0]}: fetch or save the model again"
        )
    return base


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' log lines and progress bars off: what matters of them is raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
