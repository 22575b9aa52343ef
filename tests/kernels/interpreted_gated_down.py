"""An MLP's second half as one function, in Triton's interpreter: the bits of the product handed on to the down
projection, gate and up alone kept, a layer that runs again stopped as soon as they are there.

test_without_a_card.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from triton import knobs

from reasoner.config import Lora
from reasoner.kernels import elementwise_triton
from reasoner.models import adapters
from reasoner.models.adapted_linear import AdaptedLinear, Frozen
from reasoner.models.families import family_of
from reasoner.models.fused import fuse
from reasoner.models.gated_down import gated_down
from reasoner.models.loading import recompute_layers
from reasoner.models.policy import Policy
from tests.kernels.interpreted_elementwise import counted
from tests.models.test_adapted_linear import twins
from tests.models.test_tiled import cut
from tests.models.tiny_models import fill_b, gradients, lora_of, make_batch, make_model, make_policy

assert knobs.runtime.interpret, "set TRITON_INTERPRET=1 before this process starts"
WIDE, ROWS = 128, 9


def down_of(dtype: torch.dtype, *, nf4: bool = False, bias: bool = False) -> AdaptedLinear:
    policy, _ = twins(dtype, nf4)
    down = policy.base.get_decoder().layers[1].mlp.down_proj
    assert isinstance(down, AdaptedLinear)
    if bias:
        down.get_base_layer().bias = torch.nn.Parameter(torch.randn(64).to(dtype), requires_grad=False)
    return down


def handed_on(down: AdaptedLinear, kernels: Any, gate: Tensor, up: Tensor | None, *, tanh: bool) -> Tensor:
    return down(kernels.gated(gate, up, tanh=tanh, overwrite=True))


def counted_bases(monkeypatch) -> list[Frozen]:
    """Each that is asked for its matrices from here on."""
    bases: list[Frozen] = []
    matrices = Frozen.matrices
    monkeypatch.setattr(Frozen, "matrices", lambda self: bases.append(self) or matrices(self))
    return bases


def learnt(function: Callable[..., Tensor], down: AdaptedLinear, given: list[Tensor], tanh: bool) -> list[Tensor]:
    """The output, and the gradients of what needs one."""
    leaves = [*(one for one in given if one.requires_grad), *down.masters]
    gate, up = (one * 1 for one in given) if len(given) == 2 else (given[0] * 1, None)
    out = function(down, elementwise_triton, gate, up, tanh=tanh)
    upstream = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def drawn(dtype: torch.dtype, *, halves: bool = False, needed: tuple[bool, ...] = (True, True)) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    whole = torch.randn(1, ROWS, 2 * WIDE, generator=draws).to(dtype)
    given = [whole] if halves else [one.contiguous() for one in whole.chunk(2, -1)]
    return [one.requires_grad_(wanted) for one, wanted in zip(given, needed[: len(given)], strict=True)]


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (torch.bfloat16, {"nf4": True}),
        (torch.bfloat16, {"bias": True}),
        (torch.float16, {}),
        (torch.float32, {"bias": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("halves", "tanh"), [(False, False), (True, True)], ids=["two, silu", "halves, gelu"])
def test_output_and_gradients_are_to_the_bit_those_of_the_product_handed_on(dtype, how, halves, tanh):
    down = down_of(dtype, **how)
    found, true = (learnt(function, down, drawn(dtype, halves=halves), tanh) for function in (gated_down, handed_on))
    assert len(found) == 4 + (not halves) and all(one.abs().max() > 0 for one in found)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(found, true, strict=True))


@pytest.mark.parametrize("needed", [(False, False), (True, False), (False, True)], ids=str)
def test_what_needs_no_gradient_changes_nothing_of_the_rest(needed, monkeypatch):
    """Before the first adapter of a model gate and up have none: the backward asks for no matrix."""
    down = down_of(torch.float32)
    bases = counted_bases(monkeypatch)
    given = drawn(torch.float32, needed=needed)
    held = [one.detach().clone() for one in given]
    found = learnt(gated_down, down, given, False)
    assert len(bases) == 1 + any(needed)
    true = learnt(handed_on, down, given, False)
    assert len(found) == 3 + sum(needed)
    assert all(torch.equal(one, other) for one, other in zip(found, true, strict=True))
    assert all(torch.equal(one.detach(), other) for one, other in zip(given, held, strict=True))


def test_h4_a_second_backward_over_gradients_that_were_overwritten_raises():
    gate, up = (one * 1 for one in drawn(torch.float32))
    loss = gated_down(down_of(torch.float32), elementwise_triton, gate, up, tanh=False).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """What the graph keeps of size beside parameters, each memory once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        held = run()
    assert held.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_mlp_keeps_its_input_and_gate_and_up_and_one_low_term(family, monkeypatch):
    policy = make_policy(family, lora=lora_of(family))
    fuse(policy.base, family)
    counted(monkeypatch)
    x = torch.randn(1, ROWS, 32, requires_grad=True)
    adapters = 1 if family == "phi3" else 2
    assert kept_bytes(lambda: policy.base.get_decoder().layers[0].mlp(x)) == 4 * ROWS * (32 + 2 * 48 + 4 * adapters)


def test_without_a_graph_gate_and_up_are_gone_before_the_base_is_asked_for(monkeypatch):
    policy = make_policy("llama", lora=lora_of("llama"))
    fuse(policy.base, "llama")
    counted(monkeypatch)
    mlp = policy.base.get_decoder().layers[0].mlp
    given: list[weakref.ref[Tensor]] = []
    for part in (mlp.gate_proj, mlp.up_proj):
        part.register_forward_hook(lambda _, __, out: given.append(weakref.ref(out)))
    there: list[list[bool]] = []
    matrices = Frozen.matrices
    monkeypatch.setattr(
        Frozen, "matrices", lambda self: there.append([one() is not None for one in given]) or matrices(self)
    )
    with torch.no_grad():
        mlp(torch.randn(1, ROWS, 32))
    assert there == [[], [True], [False, False]]


def test_where_it_does_not_go_the_product_is_handed_on(monkeypatch):
    """Dropout that is on, an adapter switched off, none at all."""
    dropping = make_policy("llama", lora=lora_of("llama", dropout=0.5))
    bare = make_policy("llama", lora=Lora(r=4, alpha=8, targets=["gate_proj"]))
    for policy in (dropping, bare):
        fuse(policy.base, "llama")
    calls = counted(monkeypatch)

    def asked(policy: Policy) -> set[str]:
        calls.clear()
        policy.logprobs(make_batch(), temperature=1.0).logprobs.sum().backward()
        return {name for name in calls if name.startswith("gated")}

    assert asked(dropping) == {"gated_product", "gated_backward"}
    dropping.train_mode(dropout=True)
    assert asked(dropping) == asked(bare) == {"gated", "gated_product"}
    with dropping.model.disable_adapter(), torch.no_grad():
        calls.clear()
        dropping.logprobs(make_batch(), temperature=1.0)
        assert calls.count("gated") == 2


@pytest.mark.parametrize(("family", "target"), [("llama", "gate_proj"), ("phi3", "gate_up_proj")])
def test_the_product_that_is_handed_on_is_that_of_transformers(family, target, monkeypatch):
    """Of an MLP whose down projection has no adapter, in two tensors or the halves of one."""
    policy = make_policy(family, lora=Lora(r=4, alpha=8, targets=[target]))
    fuse(policy.base, family)

    def learn() -> tuple[Tensor, dict[str, Tensor]]:
        found = policy.logprobs(make_batch(), temperature=1.0).logprobs
        return found.detach(), gradients(policy, found.square().sum())

    truth, true_gradients = learn()
    calls = counted(monkeypatch)
    found, found_gradients = learn()
    assert "gated" in calls and "gated_backward" not in calls
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    for name, true in true_gradients.items():
        assert true.norm() > 0
        assert (found_gradients[name] - true).norm() <= 1e-4 * true.norm(), name


@pytest.mark.parametrize(("family", "again"), [("llama", 6), ("phi3", 3), ("gemma3_text", 7)])
def test_a_layer_that_runs_again_stops_as_soon_as_gate_and_up_are_there(family, again, monkeypatch):
    """Gemma's norm after the MLP asks for the output, and so for the product too."""
    policy = make_policy(family, lora=lora_of(family))
    fuse(policy.base, family)
    calls = counted(monkeypatch)
    bases = counted_bases(monkeypatch)

    def run() -> tuple[dict[str, Tensor], int, int]:
        loss = policy.logprobs(make_batch(), temperature=1.0).logprobs.square().sum()
        bases.clear(), calls.clear()
        found = gradients(policy, loss)
        return found, len(bases), calls.count("gated_product")

    kept, once, products = run()
    recompute_layers(policy.base, "tiny")
    policy.train_mode(dropout=False)
    found, twice, products_again = run()
    layers = sum(part.gradient_checkpointing for part in policy.base.get_decoder().layers)
    assert twice - once == again * layers and products == 0
    assert products_again == layers * (family == "gemma3_text")
    assert all(torch.equal(gradient, kept[name]) for name, gradient in found.items())


@pytest.mark.parametrize("recompute", [False, True])
def test_in_tiles_the_gradients_are_those_of_the_whole_and_no_output_is_made_twice(recompute, monkeypatch):
    base = make_model("llama").requires_grad_(False)
    fuse(base, "llama")  # before its MLPs get tiles, as on a card
    model = adapters.attach(base, lora_of("llama"), name="tiny", revision=None)
    fill_b(model)
    policy = Policy(model, family_of(base.config), revision=None)
    if recompute:
        recompute_layers(policy.base, "tiny")
    policy.train_mode(dropout=False)
    calls = counted(monkeypatch)
    batch = make_batch((30, 21))

    def learn() -> dict[str, Tensor]:
        return gradients(policy, policy.logprobs(batch, temperature=1.0).logprobs.sum())

    whole = learn()
    assert calls.count("gated_backward") == 2
    cut(monkeypatch, 50, 8)
    calls.clear()
    bases = counted_bases(monkeypatch)
    found = learn()
    assert calls.count("gated_backward") == calls.count("gated_product") == 2 * 7
    # Of each tile gate, up and down, and for its gradients gate and up again, down, and gate and up transposed.
    in_mlps = [one for one in bases if 48 in (*one.rows, one.weight.shape[1])]
    assert len(in_mlps) == 2 * 7 * (3 + 2 + 1 + 2)
    for name, truth in whole.items():
        assert float((found[name] - truth).norm()) <= 2e-5 * float(truth.norm())
