"""A tokenizer and a policy from `config.Model`, whatever the source: hub or folder, GGUF, from scratch.

A model whose logprobs we would get wrong is refused here: a head that is no plain matrix, logits changed in a way we
don't know. Left out: reading the weights (weights.py) and code from a model's repository (never run).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from reasoner import config
from reasoner.errors import ModelError
from reasoner.models import adapters, gguf, scratch, sources, weights
from reasoner.models.base_weights import BaseWeights
from reasoner.models.families import Family, family_of
from reasoner.models.offload import Offload, Offloaded
from reasoner.models.policy import Policy

PROBE_TOKENS = 8
PROBE_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats; a scale or cap left out is off by far more


def load_tokenizer(model: config.Model) -> PreTrainedTokenizerBase:
    """The tokenizer, with an eos; its pad is model.pad_token, its own, or eos.

    Padding with eos does no harm here: labels are masked by position, and only the `hf` engine pads, with a mask.
    Raises ModelError if model.eos_token or model.pad_token is not one of its tokens, or there is no eos.
    """
    tokenizer = _read_tokenizer(model)
    for key, name in (("eos_token", model.eos_token), ("pad_token", model.pad_token)):
        if name is not None and name not in tokenizer.get_vocab():
            raise ModelError(f"model.{key}={name!r} is not one of the {len(tokenizer)} tokens of {model.name}")
        if name is not None:
            setattr(tokenizer, key, name)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model.name} has no end-of-sequence token: name one with model.eos_token=TOKEN"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_tokenizer(model: config.Model) -> PreTrainedTokenizerBase:
    if model.scratch:
        return scratch.make_tokenizer(model.scratch)
    if model.gguf:
        path = gguf.find(model.gguf)
        return gguf.make_tokenizer(gguf.read_metadata(path), path)
    source = sources.locate_tokenizer(model)
    try:
        return AutoTokenizer.from_pretrained(source.path, **source.options)
    except weights.UNREADABLE as error:
        raise sources.unreadable(model, error) from None


def load_model(
    model: config.Model,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    device: torch.device | str | None = None,
    engine_rows: bool = False,
) -> Policy:
    """The policy, in eval mode, on `device` (none: CUDA where there is one); with model.lora, a new adapter on it.

    `seed` draws a scratch model's weights and the adapter's A; the process's own random state is not touched.
    `engine_rows`: an engine will sample from this base, so that rows for its copy of the adapter are kept below the
    matrices (base_weights.py), where the base has 16 bits and is in buffers of ours. Raises ModelError if the model
    can't be found, read or trained as asked.
    """
    sources.check_model(model)
    place = _place(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        base, buffers, family, revision = _load_base(model, tokenizer, place, engine_rows=engine_rows)
        if model.lora:
            adapted = adapters.attach(base, model.lora, name=model.name, revision=revision)
            return _recomputing(Policy(adapted, family, revision=revision, weights=buffers), model)
    return _recomputing(Policy(base.requires_grad_(True), family, revision=revision), model)


def load_saved(
    folder: Path, model: config.Model, tokenizer: PreTrainedTokenizerBase, *, device: torch.device | str | None = None
) -> Policy:
    """The policy that `Policy.save` wrote, read back from its files; an adapter goes onto the base that `model` names.

    Raises ModelError if the folder holds no such files.
    """
    if model.lora is None:
        saved = replace(model, name=str(folder), revision=None, gguf=None, scratch=None)
        return load_model(saved, tokenizer, seed=0, device=device)
    sources.check_model(model)
    base, buffers, family, revision = _load_base(model, tokenizer, _place(device))
    return _recomputing(Policy(adapters.load(base, folder), family, revision=revision, weights=buffers), model)


def load_merged(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, dtype: Literal["float32", "bfloat16"], device: torch.device
) -> Policy:
    """A model folder or a GGUF file as a policy that is scored and not trained, in `dtype` also where every weight
    would be trained.

    Raises ModelError if it can't be read or lacks a weight.
    """
    saved = config.Model(name=str(path), gguf=config.Gguf(str(path)) if path.is_file() else None, dtype=dtype)
    base, _, family, _ = _load_base(saved, tokenizer, device)
    return Policy(base, family, revision=None)


def _place(device: torch.device | str | None) -> torch.device:
    if device is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device or "cpu")


def _load_base(
    model: config.Model, tokenizer: PreTrainedTokenizerBase, device: torch.device, *, engine_rows: bool = False
) -> tuple[PreTrainedModel, BaseWeights | None, Family, str | None]:
    """The base, frozen; the buffers it looks at; its family; the hub's commit."""
    try:
        base, buffers = weights.read(model, tokenizer, device, engine_rows=engine_rows)
    except torch.OutOfMemoryError:
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        smaller = "set model.quantize=nf4" if model.lora and model.quantize == "none" else "choose a smaller model"
        raise ModelError(
            f"the weights of {model.name} do not fit on the GPU: its memory ran out while they were read ({total:.1f} "
            f"GiB in all, {free:.1f} still free): {smaller}, or end the programs that hold the rest"
        ) from None
    base.requires_grad_(False)
    family = family_of(base.config)
    revision = None if model.gguf or model.scratch else sources.locate(model).revision
    _check_head(base, tokenizer, model.name)
    # An embedding gives its padding_idx no gradient. Packed rows hold no padding, and where pad = eos the token is one
    # to learn.
    cast(torch.nn.Embedding, base.get_input_embeddings()).padding_idx = None
    if not family.known:
        _probe(Policy(base, family, revision=revision), weights.dtype_of(model, device))
    return base, buffers, family, revision


def _recomputing(policy: Policy, model: config.Model) -> Policy:
    """The policy, its layers as model.gradient_checkpointing says. After peft, which would undo a part of it."""
    if model.gradient_checkpointing in (True, "offload"):
        offload = model.gradient_checkpointing == "offload" and policy.device.type == "cuda"
        recompute_layers(policy.base, model.name, offload=offload)
    return policy


def recompute_layers(base: PreTrainedModel, name: str, *, offload: bool = False, kept: int = 1) -> None:
    """Each layer keeps its input alone, with `offload` on the host, and runs again in the backward. Not so the last
    `kept`, or all but one, which keep all that they made: the last one's backward is the first, so that it would make
    at once what it had let go.

    Raises ModelError where layers can't.
    """
    layers: list[Any] = layers_of(base)
    if not layers:
        raise ModelError(f"{name} can't recompute its layers: set model.gradient_checkpointing=false")
    # transformers 5.24 deprecates the second name; 5.17 has no other.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    # The random state is kept for an adapter that drops: nothing else of a family that we know does (`train_mode`).
    may_drop = bool(adapters.dropouts(base)) or not family_of(base.config).known
    enable({"use_reentrant": False, "preserve_rng_state": may_drop})
    # Under an adapter transformers has the embedding's output require a gradient, for the other kind of checkpoint:
    # that would keep it on the device for the whole pass, and its gradient beside it.
    if hasattr(base, "_require_grads_hook"):
        base.disable_input_require_grads()
    first_kept = max(1, len(layers) - kept)
    for layer in layers[first_kept:]:
        layer.gradient_checkpointing = False
    if offload:
        place = Offload(base.device)
        for layer in layers[:first_kept]:
            layer._gradient_checkpointing_func = Offloaded(layer._gradient_checkpointing_func, place)


def layers_of(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """Those that may recompute, from the first to the last.

    >>> len(layers_of(base))
    28
    """
    return [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]


def _check_head(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    head = base.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise ModelError(
            f"the head of {name} is no plain matrix but {head}: its logprobs can't be computed. Choose another model"
        )
    if len(tokenizer) > head.weight.shape[0]:
        raise ModelError(
            f"{name} has {head.weight.shape[0]} rows in its head for the {len(tokenizer)} tokens of its tokenizer"
        )


def _probe(policy: Policy, dtype: torch.dtype) -> None:
    """Raises ModelError if our logprobs of a family not in the table are not those of its own forward."""
    ids = torch.arange(PROBE_TOKENS, device=policy.device) % policy.head_weight.shape[0]
    with torch.no_grad():
        logits = policy.base(input_ids=ids[None], use_cache=False).logits[0].float()
    theirs = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    gap = float((policy.score(ids.tolist()) - theirs).abs().max())
    if not gap <= PROBE_GAP[dtype]:
        raise ModelError(
            f"our logprobs of this {policy.family.name} model are {gap:.2g} nats from its own: it changes its logits "
            "in a way we don't know. Use another model, or add a row to reasoner/models/families.py"
        )
