"""Optimizers as tensors and JSON, and back exactly: what a checkpoint holds of them.

Any torch optimizer's `state_dict` is a tree of tensors, numbers and names, 8-bit ones included; each tensor gets a
name, the rest is JSON with tuples and integer keys marked. No pickle. Left out: random generators. Every step seeds
them from where the run stands, so that they have no state worth keeping.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from reasoner.errors import ConfigError, RunFolderError

OPTIMIZER = "optimizer"  # first part of the tensors' names


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], Any]:
    """(tensors by name, JSON): the optimizer's state. Raises ConfigError if it holds anything else."""
    tensors: dict[str, Tensor] = {}
    tree = _flatten(optimizer.state_dict(), OPTIMIZER, tensors, _name(optimizer))
    return tensors, {"class": _name(optimizer), "state": tree}


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], json_state: Any) -> None:
    """Put the optimizer where `optimizer_tensors` found it; `tensors` may hold others too.

    Raises RunFolderError if the state is another optimizer's, or of other parameters.
    """
    if json_state["class"] != _name(optimizer):
        raise RunFolderError(
            f"the checkpoint's optimizer is {json_state['class']}, this run's is {_name(optimizer)}: "
            "give the old one, or start a new run"
        )
    state = _restore(json_state["state"], tensors)
    there, here = (_sizes(one["param_groups"]) for one in (state, optimizer.state_dict()))
    if there != here:
        raise RunFolderError(
            f"the checkpoint's optimizer state is of other parameters ({there} tensors by group, here {here}): other "
            "weights are trained, or a version wrote it that stepped each matrix of an adapter by itself. Go on with "
            "the settings and the version that wrote it, or start a new run"
        )
    optimizer.load_state_dict(state)
    _undo_casts(optimizer, state)


def _sizes(groups: Any) -> list[int]:
    return [len(group["params"]) for group in groups]


def _name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _flatten(value: Any, name: str, tensors: dict[str, Tensor], owner: str) -> Any:
    """The value as JSON; its tensors go into `tensors` under `name` and are said as {"tensor": name}."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, _flatten(inner, f"{name}.{key}", tensors, owner)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        inner = [_flatten(item, f"{name}.{index}", tensors, owner) for index, item in enumerate(value)]
        return inner if isinstance(value, list) else {"tuple": inner}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"{owner} keeps a {type(value).__name__} at {name}, which a checkpoint can't hold: choose another optimizer"
    )


def _restore(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_restore(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, inner),) = tree.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_restore(item, tensors) for item in inner)
    return {key: _restore(item, tensors) for key, item in inner}


def _undo_casts(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Give state back the dtype that load_state_dict cast to its parameter's: fp32 moments of bf16 weights, say."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, saved in _tensors_by_key(state["state"].get(number, {})):
            now = optimizer.state[parameter].get(name)
            if isinstance(now, Tensor) and now.dtype != saved.dtype:
                optimizer.state[parameter][name] = saved.to(now.device)


def _tensors_by_key(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """A parameter's tensors by their own key, also where bitsandbytes nests them to hide them from FSDP."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, Mapping):
            yield from _tensors_by_key(value)
