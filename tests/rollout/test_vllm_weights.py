"""What vLLM's layers compute on the trainer's weights, over stand-ins for vLLM's classes: base, bias and adapter are
the trainer's own, with the A's below the base's matrix and apart from it; three hand-overs each arrive, the base stays.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reasoner import config
from reasoner.models import adapters, base_model
from reasoner.models.adapters import linear_rows
from reasoner.models.families import family_of
from reasoner.models.policy import Policy
from reasoner.rollout.vllm_adapter import EngineAdapter
from tests.models.tiny_models import TARGETS, fill_b, make_model
from tests.rollout import vllm_stand_in
from tests.rollout.vllm_stand_in import MLP, PACKED, GeluAndMul, LinearBase, SiluAndMul

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # rows that NF4's blocks fit
PARENTS = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    return vllm_stand_in.imported(monkeypatch)


def make_policy(lora: config.Lora, *, rows: bool = True, nf4: bool = False) -> Policy:
    """Qwen2, whose q, k and v have biases; float32, or NF4 in bfloat16."""
    model = make_model("qwen2", **SIZES)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(generator=torch.Generator().manual_seed(3))
    dtype = torch.bfloat16 if nf4 else torch.float32
    how: Any = {"device": torch.device("cpu"), "dtype": dtype, "quantize": nf4, "beside": lora if rows else None}
    base, weights = base_model.build(model.config, model.state_dict().items(), **how)
    adapted = adapters.attach(base, lora, name="tiny", revision=None)
    fill_b(adapted)
    return Policy(adapted, family_of(model.config), revision=None, weights=weights)


@torch.no_grad()
def change(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in policy.trainable().values():
        weight.normal_(std=0.2, generator=generator)


class Engine(nn.Module):
    """vLLM's linear layers over a policy: [layer][name](x)."""

    packed_modules_mapping = PACKED

    def __init__(self, vllm: tuple[Any, Any], policy: Policy):
        super().__init__()
        weights, quantizations = vllm
        assert policy.weights is not None
        with_rows, dtype = policy.weights.with_rows, policy.head_weight.dtype
        rows = linear_rows(policy.base)
        self.adapter = EngineAdapter(policy.trainable(), rows, policy.adapter_scaling, dtype, with_rows)
        weights.register(policy.weights, self.adapter, "Tiny")
        methods = quantizations.classes[weights.QUANTIZATION]()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for i, layer in enumerate(policy.base.model.layers):
            block: Any = nn.Module()
            block.self_attn, block.mlp = nn.Module(), MLP(SiluAndMul())
            for leaf, parent in PARENTS.items():
                parts = [layer.get_submodule(f"{parent}.{part}") for part in PACKED.get(leaf, [leaf])]
                outputs, width = [part.out_features for part in parts], parts[0].in_features
                prefix, bias = f"model.layers.{i}.{parent}.{leaf}", parts[0].bias is not None
                made = LinearBase(methods, prefix, outputs, width, bias=bias, dtype=dtype)
                setattr(getattr(block, parent), leaf, made)
            self.model.layers.append(block)
        self.adapter.check_taken()
        weights.bind(self, policy.weights)


def outputs(model: nn.Module, leaf: str, x: Tensor) -> Tensor:
    """Both layers' outputs of one of the engine's projections."""
    layers = [model.get_submodule(f"model.layers.{i}.{PARENTS[leaf]}") for i in (0, 1)]
    with torch.no_grad():
        if hasattr(layers[0], leaf):
            return torch.stack([getattr(layer, leaf)(x) for layer in layers])
        return torch.stack([torch.cat([getattr(layer, p)(x) for p in PACKED[leaf]], -1) for layer in layers])


def inputs(policy: Policy, leaf: str) -> Tensor:
    width = SIZES["intermediate_size"] if leaf == "down_proj" else SIZES["hidden_size"]
    return torch.randn(5, width, generator=torch.Generator().manual_seed(0)).to(policy.head_weight.dtype)


@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("rows", [True, False], ids=["below", "apart"])
@pytest.mark.parametrize("targets", [TARGETS, ("k_proj", "up_proj", "down_proj"), ("v_proj", "q_proj")])
def test_every_layer_gives_what_the_trainers_gives_after_each_of_three_hand_overs(
    vllm: tuple[Any, Any], targets: tuple[str, ...], rows: bool, nf4: bool
) -> None:
    policy = make_policy(config.Lora(r=3, alpha=6, targets=targets), rows=rows, nf4=nf4)
    assert policy.weights is not None
    checksum = policy.weights.checksum()
    engine = Engine(vllm, policy)
    together = [part for part in engine.adapter._parts.values() if part.matrix is not None]
    assert len(together) == (len(engine.adapter._parts) if rows and not nf4 else 0)
    places = [part.a.data_ptr() for part in engine.adapter._parts.values()]
    for step in range(3):
        change(policy, step)
        stale = {leaf: outputs(engine, leaf, inputs(policy, leaf)) for leaf in PARENTS}
        engine.adapter.load(policy.trainable())
        for leaf in PARENTS:
            x = inputs(policy, leaf)
            expected, found = outputs(policy.base, leaf, x), outputs(engine, leaf, x)
            close = {"rtol": 0.02, "atol": 0.02 * float(expected.abs().max())} if nf4 else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(found, expected, **close)
            adapted = any(part in targets for part in PACKED.get(leaf, [leaf]))
            assert torch.equal(stale[leaf], found) != adapted  # the old adapter would be seen
    assert policy.weights.checksum() == checksum
    assert places == [part.a.data_ptr() for part in engine.adapter._parts.values()]
    for part in together:
        assert part.matrix is not None and part.a.any()
        assert not part.matrix[len(part.b) + len(part.a) :].any()  # padding


@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("rows", [True, False], ids=["below", "apart"])
@pytest.mark.parametrize("targets", [TARGETS, ("gate_proj", "down_proj"), ("up_proj",)], ids=str)
def test_the_product_of_gate_and_up_comes_from_the_layer_that_adds_their_adapter(
    vllm: tuple[Any, Any], targets: tuple[str, ...], rows: bool, nf4: bool
) -> None:
    policy = make_policy(config.Lora(r=3, alpha=6, targets=targets), rows=rows, nf4=nf4)
    change(policy, 0)
    engine = Engine(vllm, policy)
    x = inputs(policy, "gate_up_proj")
    mlps = [[model.get_submodule(f"model.layers.{i}.mlp") for i in (0, 1)] for model in (policy.base, engine)]
    with torch.no_grad():
        trained, before = (torch.stack([mlp(x) for mlp in several]) for several in mlps)
        vllm[0].join_activations(engine)
        after = torch.stack([mlp(x) for mlp in mlps[1]])
    assert all(type(mlp.act_fn) is nn.Identity for mlp in mlps[1])
    assert {mlp.gate_up_proj(x).shape[-1] for mlp in mlps[1]} == {SIZES["intermediate_size"]}
    close = {"rtol": 0.02, "atol": 0.02 * float(trained.abs().max())} if nf4 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(before, trained, **close)
    torch.testing.assert_close(after, trained, **close)


class Clamped(SiluAndMul):
    """Another activation, that is also one of the class."""


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (SiluAndMul(), "silu"),
        (GeluAndMul(approximate="tanh"), "gelu_tanh"),
        (GeluAndMul(), None),
        (Clamped(), None),
        (nn.SiLU(), None),
        (None, None),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, nn.Module) else str(case),
)
def test_an_activation_that_is_not_known_to_the_letter_stays(
    vllm: tuple[Any, Any], made: nn.Module | None, name: str | None
) -> None:
    policy = make_policy(config.Lora(r=3, alpha=6, targets=TARGETS))
    engine: Any = Engine(vllm, policy)
    for layer in engine.model.layers:
        layer.mlp.act_fn = made  # one for all layers, as vLLM has it where it looks activations up
    vllm[0].join_activations(engine)
    for layer in engine.model.layers:
        assert layer.mlp.gate_up_proj.quant_method.part.activation == name
        assert type(layer.mlp.act_fn) is (type(made) if name is None else nn.Identity)


@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
def test_the_activation_over_an_mlp_without_an_adapter_is_vllms(vllm: tuple[Any, Any], nf4: bool) -> None:
    policy = make_policy(config.Lora(r=3, alpha=6, targets=("q_proj", "down_proj")), nf4=nf4)
    engine: Any = Engine(vllm, policy)
    vllm[0].join_activations(engine)
    assert {type(layer.mlp.act_fn) for layer in engine.model.layers} == {SiluAndMul}


def test_with_the_rows_below_a_layer_makes_one_product(vllm: tuple[Any, Any]) -> None:
    made: list[str] = []

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.linear:
                made.append("linear")
            return func(*args, **(kwargs or {}))

    for rows, expected in ((True, 1), (False, 2)):
        policy = make_policy(config.Lora(r=4, alpha=8, targets=TARGETS), rows=rows)
        layer = Engine(vllm, policy).get_submodule("model.layers.1.self_attn.qkv_proj")
        made.clear()
        with Counted():
            layer(inputs(policy, "qkv_proj"))
        assert len(made) == expected


def test_a_layer_that_would_multiply_with_something_else_is_refused_by_name(vllm: tuple[Any, Any]) -> None:
    weights, _ = vllm
    policy = make_policy(config.Lora(r=4, alpha=8, targets=TARGETS))
    assert policy.weights is not None
    engine: Any = Engine(vllm, policy)
    weights.check_bound(engine, policy.weights)
    layers, kept = engine.model.layers, policy.weights.with_rows
    layers[1].mlp.down_proj.weight.data = kept["model.layers.0.mlp.down_proj"][: SIZES["hidden_size"]]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj would multiply with another matrix"):
        weights.check_bound(engine, policy.weights)
    layers[1].mlp.down_proj.weight.data = kept["model.layers.1.mlp.down_proj"]  # with the adapter's rows
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is not the trainer's: \d+ bytes"):
        weights.check_bound(engine, policy.weights)


def test_rows_for_an_adapter_of_another_rank_are_our_own_mistake() -> None:
    policy = make_policy(config.Lora(r=4, alpha=8, targets=TARGETS))
    other = make_policy(config.Lora(r=32, alpha=8, targets=TARGETS))
    assert policy.weights is not None
    with pytest.raises(AssertionError):
        rows = linear_rows(other.base)
        EngineAdapter(other.trainable(), rows, 1.0, torch.float32, policy.weights.with_rows)
