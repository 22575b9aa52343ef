"""A transformers model whose weights are views of `BaseWeights`: made without weights, then pointed at the buffers.

So nothing is ever allocated twice, and an engine can hold the same memory. Works for families whose layers are plain
`nn.Linear` (families.py says which); the others are loaded by transformers itself (weights.py). Left out: experts.
"""

from collections.abc import Collection, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from reasoner.config import Lora
from reasoner.models import nf4
from reasoner.models.attention import PACKED
from reasoner.models.base_weights import BaseWeights
from reasoner.models.rms_norm import replace_norms

# Modules under one parent that engines compute as one matrix, in the engines' order.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class EmptyOnMeta(TorchFunctionMode):
    """Inside, `torch.empty` without a device costs nothing: weights are made on meta, while what has values (rotary
    tables, scales, ones) is made as ever."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build(
    config: PretrainedConfig,
    source: Iterable[tuple[str, "Tensor | nf4.Packed"]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: bool,
    skip: Collection[str] = (),
    beside: Lora | None = None,
) -> tuple[PreTrainedModel, BaseWeights]:
    """The model, frozen and in eval mode, and the weights it looks at.

    `source` yields (parameter name, value) in any order and is asked for one at a time, so that no more than one weight
    is held beside the buffers; names that the model does not have are passed over. `quantize`: its linear layers, but
    the head and those that `skip` names, become NF4 where their rows allow it. `beside`: the adapter that an engine
    will add to this base, so that rows for its A's are kept below the matrices that are not NF4. Raises ValueError if
    a weight is missing or of another shape.
    """
    with device, EmptyOnMeta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED)
    replace_norms(model, config.model_type)
    weights = BaseWeights(device, dtype)
    _allocate_linears(model, weights, skip if quantize else None, beside)
    _allocate_others(model, weights)
    missing = set(weights.tensors) - {_tied_head(model)}
    for name, value in source:
        if name in missing:
            weights.fill(name, value)
            missing.remove(name)
    if missing:
        raise ValueError(f"the files lack {len(missing)} of its weights, first {min(missing)}")
    model.requires_grad_(False)
    cast(Any, model).is_loaded_in_4bit = bool(weights.states)  # peft chooses its 4-bit layer by this
    return model.eval(), weights


def _tied_head(model: PreTrainedModel) -> str | None:
    """The name of the head's weight where it is the embedding's own."""
    if not model.config.tie_word_embeddings:
        return None
    head = model.get_output_embeddings()
    return next(f"{name}.weight" for name, part in model.named_modules() if part is head)


def _allocate_linears(
    model: PreTrainedModel, weights: BaseWeights, skip: Collection[str] | None, beside: Lora | None
) -> None:
    """Buffers for every linear layer but the head, a group together; `skip` None: nothing is quantized."""
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    done: set[str] = set()
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or module is head or name in done:
            continue
        names = [sibling for sibling in siblings(name) if isinstance(modules.get(sibling), nn.Linear)]
        linears = [cast(nn.Linear, modules[sibling]) for sibling in names]
        width, bias = linears[0].in_features, linears[0].bias is not None
        packed = skip is not None and nf4.fits(width) and not any(_named(sibling, skip) for sibling in names)
        adapted = [sibling for sibling in names if beside and sibling.rpartition(".")[2] in beside.targets]
        below = beside.r * len(adapted) if beside else 0
        rows = [linear.out_features for linear in linears]
        weights.allocate_group(names, rows, width, bias=bias, packed=packed, below=below)
        for sibling in names:
            _point_linear(model, sibling, weights)
        done.update(names)


def siblings(name: str) -> list[str]:
    """The modules that may share a buffer with this one, itself among them, in order."""
    parent, _, leaf = name.rpartition(".")
    group = next((group for group in GROUPS if leaf in group), (leaf,))
    return [f"{parent}.{sibling}" for sibling in group]


def _named(module: str, skip: Collection[str]) -> bool:
    """Whether a checkpoint's list of unquantized modules means this one: by its whole name, a part, or a prefix."""
    parts = module.split(".")
    return any(entry in parts or module == entry or module.startswith(f"{entry}.") for entry in skip)


def _point_linear(model: PreTrainedModel, name: str, weights: BaseWeights) -> None:
    weight, bias = weights.tensors[f"{name}.weight"], weights.tensors.get(f"{name}.bias")
    parent, _, leaf = name.rpartition(".")
    if name in weights.states:
        setattr(model.get_submodule(parent), leaf, nf4.make_linear(weight, weights.states[name], bias))
        return
    linear = cast(nn.Linear, model.get_submodule(name))
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)


def _allocate_others(model: PreTrainedModel, weights: BaseWeights) -> None:
    """Buffers for embedding, head, norms and whatever else there is; a tied head is the embedding's tensor."""
    tied_head = _tied_head(model)
    embedding, head = cast(Any, model.get_input_embeddings()), cast(Any, model.get_output_embeddings())
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in weights.tensors or name == tied_head:
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        allocate = weights.allocate_rows if module in (embedding, head) else weights.allocate
        setattr(module, leaf, nn.Parameter(allocate(name, parameter.shape), requires_grad=False))
        if module is embedding and tied_head:
            weights.tie(tied_head, name)
    if tied_head:
        head.weight = embedding.weight
