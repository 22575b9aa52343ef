"""Optimizers through a checkpoint, bit by bit (G6)."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from reasoner import checkpoint
from reasoner.checkpoint import Progress
from reasoner.compose import compose_conf
from reasoner.config import build
from reasoner.errors import ConfigError, RunFolderError
from reasoner.optimizer_state import load_optimizer, optimizer_tensors

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.99), amsgrad=True),
    "adamw_tensor_lr": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.01), foreach=False),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "sgd_plain": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, centered=True),
    "asgd": lambda parameters: torch.optim.ASGD(parameters, lr=0.01),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
    "two_groups": lambda parameters: torch.optim.Adam(
        [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.1}]
    ),
}


class FloatMoments(torch.optim.Optimizer):
    """Keeps fp32 moments whatever its parameters are; torch's load_state_dict alone would round them."""

    def __init__(self, parameters: list[Parameter]):
        super().__init__(parameters, {"lr": 0.01})

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for parameter in self.param_groups[0]["params"]:
            moment = self.state[parameter].setdefault("moment", torch.zeros(parameter.shape))
            moment.mul_(0.9).add_(parameter.grad.float())
            parameter.data.sub_((0.01 * moment).to(parameter.dtype))


class Odd(FloatMoments):
    """Keeps what no checkpoint can hold."""

    def step(self) -> None:
        super().step()
        self.state[self.param_groups[0]["params"][0]]["rule"] = object()


def weights(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        Parameter(torch.randn(5, 3, generator=generator).to(dtype)),
        Parameter(torch.randn(4, generator=generator).to(dtype)),
    ]


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        for parameter in parameters:
            parameter.grad = torch.cos(parameter.detach().float() * (step + 1)).to(parameter.dtype)
        optimizer.step()


def round_trip(tmp_path: Path, make: Callable, dtype: torch.dtype = torch.float32) -> None:
    """6 steps == 3 + checkpoint + 3, bit by bit."""
    unbroken = weights(dtype)
    train(make(unbroken), range(6))
    first = weights(dtype)
    optimizer = make(first)
    train(optimizer, range(3))
    tensors, state = optimizer_tensors(optimizer)
    tensors |= {f"w{index}": weight for index, weight in enumerate(first)}
    path = checkpoint.save(tmp_path, Progress(1, "sft", 3, 0, 0), tensors, {"optimizer": state})
    _, loaded, loaded_state = checkpoint.load(path)
    second = [Parameter(loaded[f"w{index}"]) for index in range(len(first))]
    again = make(second)
    load_optimizer(again, loaded, loaded_state["optimizer"])
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    train(again, range(3, 6))
    for resumed, whole in zip(second, unbroken, strict=True):
        assert torch.equal(resumed, whole)


@pytest.mark.parametrize("name", MAKERS)
def test_g6_three_steps_and_three_more_are_six(tmp_path: Path, name: str) -> None:
    round_trip(tmp_path, MAKERS[name])


def test_g6_without_the_optimizer_it_would_differ() -> None:
    """The test above sees a fresh optimizer: the moments matter."""
    unbroken, broken = weights(), weights()
    train(MAKERS["adamw"](unbroken), range(6))
    train(MAKERS["adamw"](broken), range(3))
    train(MAKERS["adamw"](broken), range(3, 6))
    assert not torch.equal(unbroken[0], broken[0])


def test_g6_fp32_moments_of_bf16_weights_are_not_rounded(tmp_path: Path) -> None:
    round_trip(tmp_path, FloatMoments, torch.bfloat16)


def test_g6_eight_bit_optimizer(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra gpu")
    round_trip(tmp_path, lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=0.01, min_8bit_size=8))


class KeepsItsSettings(torch.optim.SGD):
    """Holds what it is given as it is given, which bitsandbytes' optimizers do."""

    def __init__(self, params: list[Parameter], lr: float, betas: list[float]):
        super().__init__(params, lr)
        self.param_groups[0]["betas"] = betas


def test_g6_an_optimizer_of_a_conf_that_keeps_its_settings(tmp_path: Path) -> None:
    """Hydra's own lists, kept in a state, are nothing that a checkpoint can hold."""
    node = {"_target_": f"{__name__}.KeepsItsSettings", "betas": [0.9, 0.99]}
    round_trip(tmp_path, lambda parameters: build(node, params=parameters, lr=0.01))


def test_g6_the_eight_bit_optimizer_of_a_conf(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra gpu")
    node = compose_conf("gsm8k", []).values["grpo"]["optim"]["optimizer"]
    assert node["_target_"] == "bitsandbytes.optim.AdamW8bit"
    round_trip(tmp_path, lambda parameters: build({**node, "min_8bit_size": 8}, params=parameters, lr=0.01))


def test_state_is_plain_json_and_every_tensor_has_the_prefix() -> None:
    optimizer = MAKERS["adamw"](weights())
    train(optimizer, range(1))
    tensors, state = optimizer_tensors(optimizer)
    assert json.loads(json.dumps(state)) == state
    assert {"optimizer.state.0.exp_avg", "optimizer.state.1.step"} <= tensors.keys()
    assert all(name.startswith("optimizer.") for name in tensors)


def test_state_that_json_cannot_say_is_refused_by_name() -> None:
    optimizer = Odd(weights())
    train(optimizer, range(1))
    with pytest.raises(
        ConfigError, match=r"Odd keeps a object at optimizer\.state\.0\.rule, which a checkpoint can't hold"
    ):
        optimizer_tensors(optimizer)


def test_another_optimizer_or_other_parameters_are_refused() -> None:
    optimizer = MAKERS["adamw"](weights())
    train(optimizer, range(1))
    tensors, state = optimizer_tensors(optimizer)
    with pytest.raises(
        RunFolderError, match=r"optimizer is torch\.optim\.adamw\.AdamW, this run's is torch\.optim\.sgd\.SGD"
    ):
        load_optimizer(MAKERS["sgd"](weights()), tensors, state)
    with pytest.raises(RunFolderError, match="of other parameters"):
        load_optimizer(MAKERS["adamw"](weights()[:1]), tensors, state)
