"""Our LoRA layer is peft's, forward and backward, over plain and NF4 bases."""

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from reasoner import config
from reasoner.models import adapted_linear, adapters, base_model
from reasoner.models.adapted_linear import AdaptedLinear, Frozen, adapted
from reasoner.models.attention import Layout
from reasoner.models.families import family_of
from reasoner.models.loading import recompute_layers
from reasoner.models.policy import Policy
from reasoner.peak import peak_bytes
from tests.models.tiny_models import TARGETS, fill_b, gradients, lora_of, make_batch, make_model, make_policy

LORA = config.Lora(r=4, alpha=12)


def twins(dtype: torch.dtype, nf4: bool) -> tuple[Policy, Policy]:
    """The same model with our layers, and with peft's own."""
    source = make_model("qwen2", hidden_size=64, intermediate_size=128, head_dim=16)
    policies = []
    for ours in (True, False):
        base, weights = base_model.build(
            source.config, source.state_dict().items(), device=torch.device("cpu"), dtype=dtype, quantize=nf4
        )
        settings = LoraConfig(r=4, lora_alpha=12, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        torch.manual_seed(0)
        with adapters._old_names_allowed():
            model = (
                adapters.attach(base, LORA, name="tiny", revision=None)
                if ours
                else get_peft_model(base, settings, adapter_name=adapters.ADAPTER)
            )
        fill_b(model)
        policies.append(Policy(model, family_of(base.config), revision=None, weights=weights if ours else None))
    return policies[0], policies[1]


def learned(policy: Policy) -> tuple[Tensor, dict[str, Tensor]]:
    found = policy.logprobs(make_batch(), temperature=1.0).logprobs
    return found.detach(), gradients(policy, found.square().sum())


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_in_float32_it_is_peft_to_the_last_digits() -> None:
    ours, pefts = twins(torch.float32, nf4=False)
    assert sum(isinstance(part, AdaptedLinear) for part in ours.model.modules()) == 14
    assert not any(isinstance(part, AdaptedLinear) for part in pefts.model.modules())
    (found, grads), (true, true_grads) = learned(ours), learned(pefts)
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-5)
    assert grads.keys() == true_grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, true_grads[name], rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("nf4", [False, True])
def test_in_bf16_it_errs_no_more_than_16_bits_cost(nf4: bool) -> None:
    ours, pefts = twins(torch.bfloat16, nf4)
    (found, grads), (true, true_grads) = learned(ours), learned(pefts)
    assert (found - true).abs().mean() < 0.03
    for name, gradient in grads.items():
        assert gradient.dtype == torch.float32
        assert off(gradient, true_grads[name]) < 0.1


def test_its_gradients_are_those_of_its_output() -> None:
    draws = torch.Generator().manual_seed(0)
    x, w, bias, a, b, other_a, other_b = (
        torch.randn(shape, generator=draws, dtype=torch.float64)
        for shape in ((2, 3, 6), (9, 6), (5,), (2, 6), (5, 2), (3, 6), (4, 3))
    )
    frozen = Frozen(w, None, (5, 4), (bias, None))
    for tensor in (x, a, b, other_a, other_b):
        tensor.requires_grad_()

    def both(x: Tensor, a: Tensor, other_a: Tensor, b: Tensor, other_b: Tensor) -> Tensor:
        rounded = torch.cat([a, other_a]).detach(), [b.detach(), other_b.detach()]
        return torch.cat(adapted(x, frozen, 1.7, *rounded, [a, other_a, b, other_b]), -1)

    true = torch.cat([x @ w[:5].T + bias + 1.7 * x @ a.T @ b.T, x @ w[5:].T + 1.7 * x @ other_a.T @ other_b.T], -1)
    torch.testing.assert_close(both(x, a, other_a, b, other_b), true)
    assert torch.autograd.gradcheck(both, (x, a, other_a, b, other_b))
    first = x.detach()  # the first layer of a frozen base
    both(first, a, other_a, b, other_b).sum().backward()
    assert a.grad is not None and first.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_its_output_errs_less_than_with_the_adapter_added_last(dtype: torch.dtype, with_bias: bool) -> None:
    draws = torch.Generator().manual_seed(0)
    shapes = {"x": (200, 96), "w": (160, 96), "bias": (160,), "a": (8, 96), "b": (160, 8)}
    drawn = {name: torch.randn(shape, generator=draws).to(dtype) for name, shape in shapes.items()}
    x, w, bias, a, b = drawn["x"], drawn["w"], drawn["bias"] if with_bias else None, drawn["a"] / 10, drawn["b"] / 10
    (out,) = adapted(x, Frozen(w, None, (160,), (bias,)), 1.7, a, [b], [a.float(), b.float()])
    last = torch.nn.functional.linear(x, w, bias).addmm_(x @ a.T, b.T, alpha=1.7)
    base, low = x.double() @ w.double().T, x.double() @ a.double().T
    true = base + 1.7 * low @ b.double().T + (0 if bias is None else bias.double())
    allowed = 1.02 if dtype == torch.float32 else 0.8  # of 16 bits, the large term is rounded once and not twice
    assert off(out.double(), true) <= allowed * off(last.double(), true) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("nf4", [False, True])
def test_neighbours_are_computed_together_and_each_alone_as_well(nf4: bool) -> None:
    ours, _ = twins(torch.bfloat16, nf4)
    layers = {name.rpartition(".")[2]: part for name, part in ours.model.named_modules() if "layers.1" in name}
    q, k, v, o, gate, up = (layers[f"{name}_proj"] for name in ("q", "k", "v", "o", "gate", "up"))
    x, other = torch.randn(2, 1, 7, 64, dtype=torch.bfloat16)
    alone = [q(x), k(x.clone()), v(x)]  # nothing of k was asked for with this x
    assert q.siblings is k.siblings is v.siblings and gate.siblings is up.siblings is not q.siblings
    assert o(x) is not None and o.siblings is not q.siblings
    for out, layer in zip(alone, (q, k, v), strict=True):
        base = layer.get_base_layer()(x)
        a, b = (one.to(torch.bfloat16) for one in layer.masters)
        torch.testing.assert_close(out, base + layer.scale * (x @ a.T) @ b.T, rtol=0.02, atol=0.02)
    assert torch.equal(v(other), v(other)) and not torch.equal(v(other), v(x))
    assert torch.equal(k(x), alone[1]) and torch.equal(q(x), alone[0])


@pytest.mark.parametrize(("family", "again"), [("llama", 6), ("gemma3_text", 7)])
def test_a_layer_that_runs_again_leaves_out_the_product_whose_output_nobody_asks_for(
    family: str, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's norm after the MLP does ask for it. Of the two layers' backward, the first's q, k and v need no base; it
    alone runs again."""
    policy = make_policy(family, lora=lora_of(family))
    policy.train_mode(dropout=False)
    calls: list[Frozen] = []
    matrices = Frozen.matrices
    monkeypatch.setattr(Frozen, "matrices", lambda self: calls.append(self) or matrices(self))

    def run() -> tuple[dict[str, Tensor], int]:
        loss = policy.logprobs(make_batch(), temperature=1.0).logprobs.square().sum()
        before = len(calls)
        return gradients(policy, loss), len(calls) - before

    kept, once = run()
    recompute_layers(policy.base, "tiny")
    policy.train_mode(dropout=False)
    found, twice = run()
    assert (once, twice) == (2 * 7 - 3, 2 * 7 - 3 + again)
    assert all(torch.equal(gradient, kept[name]) for name, gradient in found.items())


def test_every_change_of_a_master_is_seen() -> None:
    ours, _ = twins(torch.bfloat16, nf4=False)
    before = learned(ours)[0]
    b = next(weight for name, weight in ours.trainable().items() if "lora_B" in name)
    held = b.detach().clone()
    with torch.no_grad():
        b.mul_(3)
    changed = learned(ours)[0]
    assert not torch.equal(changed, before)
    with torch.no_grad():
        b.copy_(held)
    ours.freeze_reference()
    with torch.no_grad():
        b.mul_(3)
    with ours.reference():
        assert torch.equal(ours.logprobs(make_batch(), temperature=1.0).logprobs, before)
    assert torch.equal(learned(ours)[0], changed)


def test_a_wrong_scaling_would_be_seen() -> None:
    ours, pefts = twins(torch.float32, nf4=False)
    for part in ours.model.modules():
        if isinstance(part, AdaptedLinear):
            part.scaling[adapters.ADAPTER] *= 1.1
    assert off(learned(ours)[0], learned(pefts)[0]) > 0.003


def test_dropout_drops_in_training_alone() -> None:
    ours, _ = twins(torch.float32, nf4=False)
    calm = learned(ours)[0]
    dropping = copy.deepcopy(ours.model)
    for part in dropping.modules():
        if isinstance(part, AdaptedLinear):
            part.lora_dropout[adapters.ADAPTER] = torch.nn.Dropout(0.5)
    policy = Policy(dropping, ours.family, revision=None)
    assert torch.equal(learned(policy)[0], calm)
    policy.train_mode(dropout=True)
    assert not torch.equal(learned(policy)[0], calm)


def test_switched_off_it_is_the_base() -> None:
    ours, _ = twins(torch.float32, nf4=False)
    with_adapter = learned(ours)[0]
    with ours.model.disable_adapter(), torch.no_grad():
        without = ours.logprobs(make_batch(), temperature=1.0).logprobs
    assert (with_adapter - without).abs().max() > 0.1


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_pass_that_ran_out_of_memory_between_siblings_leaves_nothing(recomputes: bool) -> None:
    """The activation between gate and up is the largest allocation of a layer: that is where it happens."""
    ours, _ = twins(torch.float32, nf4=False)
    if recomputes:
        recompute_layers(ours.base, "tiny")
    ours.train_mode(dropout=False)
    mlp = ours.model.get_submodule("base_model.model.model.layers.1.mlp")
    first: list[weakref.ref[Tensor]] = []
    ours.model.get_submodule("base_model.model.model.layers.0.mlp").register_forward_hook(
        lambda module, given, out: first.append(weakref.ref(out))
    )
    calm, calls = mlp.act_fn, []

    class Full(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 1 + recomputes:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return calm(x)

    mlp.act_fn = Full()
    assert peak_bytes(ours, Layout.of([8, 8]), entropy=False) is None and len(calls) == 1 + recomputes
    gc.collect()
    assert all(one() is None for one in first) and not adapted_linear._unfinished
