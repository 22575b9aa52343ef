"""A policy's weights as a model folder that transformers, vLLM and converters read: W + scaling B A, in safetensors.

W is what the policy computes with, so that an NF4 base is merged as it dequantizes: that is what was trained. Sums are
float32 and rounded once. Written a shard at a time; of weights on a GPU the host holds no more than one shard, as
tensors and as a file's bytes. Left out: experts, which files hold in another layout than the modules.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from reasoner.errors import ModelError
from reasoner.models.adapters import place_of
from reasoner.models.base_files import INDEX, WHOLE
from reasoner.models.policy import Policy

SHARD_BYTES = 1 << 30
Original = Callable[[str], Tensor]  # the weight of a module before it was quantized
Values = dict[str, tuple[torch.Size, Callable[[], Tensor]]]


def write(policy: Policy, folder: Path, *, dtype: torch.dtype, original: Original | None = None) -> None:
    """config.json and the weights in `dtype`, in one file or in shards with an index; a tied head once.

    `original`: takes the place of what a quantized matrix dequantizes to. Raises ModelError for a model with experts.
    """
    refuse_experts(policy.base)
    found = values(policy, original)
    shards = _shards({name: shape.numel() * dtype.itemsize for name, (shape, _) in found.items()})
    names = [WHOLE] if len(shards) == 1 else [_name(i, len(shards)) for i in range(len(shards))]
    total = 0
    for file, inside in zip(names, shards, strict=True):
        tensors = {name: _stored(found[name][1](), dtype) for name in inside}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file, {"format": "pt"})
        del tensors
    if len(shards) > 1:
        places = {name: file for file, inside in zip(names, shards, strict=True) for name in inside}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    settings = copy.deepcopy(policy.base.config)
    settings.architectures = [type(policy.base).__name__]
    settings.dtype = dtype
    settings.save_pretrained(folder)


def refuse_experts(base: PreTrainedModel) -> None:
    """Raises ModelError for a model whose layers hold experts."""
    if any(weight.dim() == 3 for name, weight in base.named_parameters() if ".experts." in name):
        raise ModelError(
            f"to=merged is not there for {base.config.model_type}, whose experts are stored in another layout: export "
            "to=adapter, which vLLM and peft load onto the base"
        )


def _name(index: int, count: int) -> str:
    return f"model-{index + 1:05}-of-{count:05}.safetensors"


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    """The names in order, cut where a file would pass SHARD_BYTES; a larger weight has one of its own."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.to(dtype) if value.is_floating_point() else value
    return value.detach().to("cpu").contiguous()


def values(policy: Policy, original: Original | None = None) -> Values:
    """The merged weights by their names in transformers' files, a tied one once: the shape, and how to make the tensor,
    on the policy's device. None is made before it is asked for."""
    adapted = isinstance(policy.model, PeftModel)
    trained = policy.trainable() if adapted else {}
    matrices: dict[str, dict[str, Tensor]] = {}
    for name, weight in trained.items():
        module, which = place_of(name)
        matrices.setdefault(module, {})[which] = weight
    scaling = policy.adapter_scaling if adapted else 0.0
    states = policy.weights.states if policy.weights else {}

    def make(module: str, weight: Tensor) -> Tensor:
        if module in states and original is not None:
            base = original(module).to(weight.device)
        else:
            base = policy.weights.matrix(module) if policy.weights and module in states else weight
        return base if module not in matrices else merge(base, matrices[module], scaling)

    found: Values = {}
    for name, weight in (*policy.base.named_parameters(), *_kept_buffers(policy.base)):
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        module, _, leaf = plain.rpartition(".")
        shape = states[module].shape if leaf == "weight" and module in states else weight.shape
        found[plain] = (shape, (lambda m=module, w=weight: make(m, w)) if leaf == "weight" else (lambda w=weight: w))
    return found


def merge(base: Tensor, adapter: dict[str, Tensor], scaling: float) -> Tensor:
    """W + scaling B A in float32: [rows, columns]. arXiv:2106.09685, eq. 3."""
    a, b = adapter["A"].detach().float(), adapter["B"].detach().float()
    return torch.addmm(base.detach().float(), b, a, alpha=scaling)


def _kept_buffers(base: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Buffers that are part of the model's files."""
    kept = base.state_dict().keys()
    return [(name, buffer) for name, buffer in base.named_buffers() if name in kept]
