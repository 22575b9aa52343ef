"""The engine's copy of the adapter, on the CPU: every projection arrives where it belongs, scaled once, and the
trainer's tensors stay as they are. Rows are PITFALLS.md D1, D2 and D6."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from reasoner import config
from reasoner.errors import ModelError
from reasoner.models.adapters import linear_rows, place_of
from reasoner.models.base_model import GROUPS
from reasoner.rollout.vllm_adapter import EngineAdapter
from tests.models.tiny_models import TARGETS, make_policy

LAYER = "model.layers.1"
PARENT = {leaf: "self_attn" if leaf[0] in "qkvo" else "mlp" for leaf in TARGETS}


def adapted(targets=TARGETS, r: int = 3, family: str = "qwen2", **how):
    policy = make_policy(family, lora=config.Lora(r=r, alpha=6, targets=targets, **how))
    generator = torch.Generator().manual_seed(7)
    for weight in policy.trainable().values():
        weight.data.normal_(generator=generator)
    return policy


def copy_of(policy) -> EngineAdapter:
    rows = linear_rows(policy.base)
    return EngineAdapter(policy.trainable(), rows, policy.adapter_scaling, torch.float32, with_rows={})


def modules_of(leaf: str) -> list[str]:
    group = next((group for group in GROUPS if leaf in group), (leaf,))
    return [f"{LAYER}.{PARENT[leaf]}.{sibling}" for sibling in group]


def added(adapter: EngineAdapter, leaf: str, x: torch.Tensor, outputs: int) -> torch.Tensor:
    part = adapter.part(modules_of(leaf))
    assert part is not None
    return part.add_to(torch.zeros(*x.shape[:-1], outputs), x)


def truth(policy, leaf: str, x: torch.Tensor) -> torch.Tensor:
    """What peft adds, siblings side by side."""
    found = []
    for module in modules_of(leaf):
        layer = policy.base.get_submodule(module)
        if hasattr(layer, "lora_A"):
            low = layer.lora_A["policy"](x)
            found.append(layer.lora_B["policy"](low) * layer.scaling["policy"])
        else:
            found.append(torch.zeros(*x.shape[:-1], layer.out_features))
    return torch.cat(found, -1)


@pytest.mark.parametrize("leaf", ["q_proj", "o_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("targets", [TARGETS, ("k_proj", "o_proj", "up_proj", "down_proj"), ("v_proj", "q_proj")])
@pytest.mark.parametrize("rslora", [False, True])
def test_d6_a_layer_adds_what_peft_adds(leaf: str, targets, rslora: bool) -> None:
    policy = adapted(targets, rslora=rslora)
    adapter = copy_of(policy)
    if not any(module.rpartition(".")[2] in targets for module in modules_of(leaf)):
        assert adapter.part(modules_of(leaf)) is None
        return
    width = policy.base.get_submodule(modules_of(leaf)[0]).in_features
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
    expected = truth(policy, leaf, x)
    torch.testing.assert_close(added(adapter, leaf, x, expected.shape[-1]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "activation"), [("qwen2", "silu"), ("gemma2", "gelu_tanh")])
@pytest.mark.parametrize("targets", [("gate_proj", "up_proj"), ("gate_proj",), ("up_proj",)], ids=str)
def test_a_layer_over_gate_and_up_gives_the_product_that_the_trainers_mlp_makes(family, activation, targets) -> None:
    policy = adapted(targets, family=family)
    part = copy_of(policy).part(modules_of("up_proj"))
    mlp: Any = policy.base.get_submodule(f"{LAYER}.mlp")
    assert part is not None
    part = replace(part, activation=activation)
    x = torch.randn(2, 5, part.a.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        with policy.model.disable_adapter():
            base = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1)
        apart = part.add_to(base.clone(), x)
        below = part.joined(torch.cat([base - 1, x @ part.a.T, base], -1).flatten(0, 1), torch.ones(base.shape[-1]))
    assert apart.shape == expected.shape and expected.abs().max() > 1
    torch.testing.assert_close(apart, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(below, expected.flatten(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leaf", TARGETS)
def test_d2_each_projection_alone_arrives(leaf: str) -> None:
    policy = adapted()
    adapter = copy_of(policy)
    for name, weight in policy.trainable().items():
        if not place_of(name)[0].endswith(leaf):
            weight.data.zero_()
    adapter.load(policy.trainable())
    width = policy.base.get_submodule(modules_of(leaf)[0]).in_features
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    expected = truth(policy, leaf, x)
    found = added(adapter, leaf, x, expected.shape[-1])
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_d1_three_hand_overs_leave_the_trainers_tensors_bit_equal_and_the_buffers_in_place() -> None:
    policy = adapted()
    before = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
    adapter = copy_of(policy)
    places = {name: target.data_ptr() for name, target in adapter._targets.items()}
    for _ in range(3):
        adapter.load(policy.trainable())
    assert all(torch.equal(before[name], weight) for name, weight in policy.trainable().items())
    assert places == {name: target.data_ptr() for name, target in adapter._targets.items()}
    name = next(name for name in places if "lora_B" in name)
    assert torch.equal(adapter._targets[name], before[name])  # alpha / r comes in the product, once


def test_an_adapter_of_other_names_is_our_own_mistake() -> None:
    policy = adapted()
    state = dict(policy.trainable())
    adapter = copy_of(policy)
    state.pop(next(iter(state)))
    with pytest.raises(AssertionError):
        adapter.load(state)


def test_every_part_has_to_be_taken_whole_by_a_layer_of_the_engine() -> None:
    policy = adapted(("q_proj", "down_proj"))
    adapter = copy_of(policy)
    first = "model.layers.0.self_attn"
    with pytest.raises(ModelError, match=r"computes model\.layers\.0\.self_attn\.q_proj apart .* rollout=hf"):
        adapter.part([f"{first}.q_proj"])
    assert adapter.part(["language_model.model.layers.0.mlp.down_proj"]) is None  # another name for it
    for layer in (0, 1):
        assert adapter.part([f"model.layers.{layer}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")])
        with pytest.raises(ModelError, match=r"no layer for \d parts of the adapter, first model\.layers\.\d"):
            adapter.check_taken()
    assert adapter.part(["model.layers.0.mlp.down_proj"]) and adapter.part(["model.layers.1.mlp.down_proj"])
    adapter.check_taken()
