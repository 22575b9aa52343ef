"""Rows below the base's matrices, kept for an engine's copy of the adapter: they are there where they were asked for,
right below a whole group, and the base, its checksum and all that is made of it never see what stands in them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reasoner import config
from reasoner.models import adapters, base_model, merged, weights
from reasoner.models.base_weights import BaseWeights
from reasoner.models.families import family_of
from reasoner.models.loading import load_model, load_saved, load_tokenizer
from reasoner.models.policy import Policy
from tests.models.test_loading import save
from tests.models.tiny_models import FUSED, TARGETS, fill_b, lora_of, make_batch, make_model

CPU = torch.device("cpu")
NF4_SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # rows that NF4's blocks fit


def built(
    beside: config.Lora | None, family: str = "llama", *, quantize: bool = False, skip: tuple[str, ...] = (), **changes
) -> tuple[Policy, BaseWeights]:
    """A base with rows for `beside`, under an adapter; float32, or NF4 in bfloat16."""
    model = make_model(family, **changes)
    dtype = torch.bfloat16 if quantize else torch.float32
    how = {"device": CPU, "dtype": dtype, "quantize": quantize, "skip": skip}
    base, buffers = base_model.build(model.config, model.state_dict().items(), **how, beside=beside)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = adapters.attach(base, beside or lora_of(family), name="tiny", revision=None)
    fill_b(adapted)
    return Policy(adapted, family_of(model.config), revision=None, weights=buffers), buffers


def below(buffers: BaseWeights) -> dict[str, Tensor]:
    """The rows below each group, by its first module."""
    names = {group[0]: group for group in buffers.groups}
    return {first: whole[len(buffers.group(names[first])) :] for first, whole in buffers.with_rows.items()}


@pytest.mark.parametrize(
    ("family", "targets", "r", "expected"),
    [
        # rows for r x adapted siblings, in multiples of 8: used, kept
        ("llama", TARGETS, 4, {"self_attn.q_proj": (12, 16), "self_attn.o_proj": (4, 8), "mlp.gate_proj": (8, 8),
                               "mlp.down_proj": (4, 8)}),
        ("qwen2", ("v_proj", "up_proj"), 8, {"self_attn.q_proj": (8, 8), "mlp.gate_proj": (8, 8)}),
        ("phi3", FUSED, 3, {"self_attn.o_proj": (3, 8), "self_attn.qkv_proj": (3, 8), "mlp.gate_up_proj": (3, 8),
                            "mlp.down_proj": (3, 8)}),
    ],
)  # fmt: skip
def test_rows_are_kept_right_below_a_group_for_its_adapted_parts(family: str, targets, r: int, expected) -> None:
    lora = config.Lora(r=r, alpha=8, targets=targets)
    _, plain = built(None, family)
    _, buffers = built(lora, family)
    found = below(buffers)
    assert {name: len(rows) for name, rows in found.items()} == {
        f"model.layers.{i}.{leaf}": kept for i in (0, 1) for leaf, (_, kept) in expected.items()
    }
    assert not any(rows.any() for rows in found.values())
    widths = {first: whole.shape[1] for first, whole in buffers.with_rows.items()}
    used = {first: expected[first.split(".", 3)[3]][0] for first in found}
    assert buffers.nbytes_below == sum(4 * used[first] * widths[first] for first in found)
    padding = sum(4 * (len(found[first]) - used[first]) * widths[first] for first in found)
    assert buffers.nbytes == plain.nbytes + padding and plain.nbytes_below == 0 and not plain.with_rows
    for group in buffers.groups:
        if group[0] in buffers.with_rows:
            whole, matrix = buffers.with_rows[group[0]], buffers.group(group)
            assert whole.data_ptr() == matrix.data_ptr() and torch.equal(whole[: len(matrix)], matrix)
            assert whole.is_contiguous() and whole.shape[1] == matrix.shape[1]


def test_the_base_is_what_it_is_without_them_and_its_checksum_never_sees_them() -> None:
    _, plain = built(None, "qwen2", tie_word_embeddings=True)
    policy, buffers = built(lora_of("qwen2"), "qwen2", tie_word_embeddings=True)
    assert plain.tensors.keys() == buffers.tensors.keys() and plain.groups == buffers.groups
    for name, tensor in plain.tensors.items():
        there = buffers.tensors[name]
        assert torch.equal(tensor, there) and (tensor.shape, tensor.stride()) == (there.shape, there.stride()), name
    assert [buffer.shape for buffer in plain.buffers] == [buffer.shape for buffer in buffers.buffers]
    checksum = buffers.checksum()
    assert checksum == plain.checksum()
    for rows in below(buffers).values():
        rows.fill_(float("nan"))
    assert buffers.checksum() == checksum
    assert all(weight.isfinite().all() for weight in policy.model.parameters())
    buffers.with_rows["model.layers.1.mlp.down_proj"][-9, -1] += 1  # the last number that is the base's
    assert buffers.checksum() != checksum


def test_the_trainer_its_gradients_and_what_is_exported_never_see_them(tmp_path: Path) -> None:
    found = []
    for beside in (None, lora_of("llama")):
        policy, buffers = built(beside)
        for rows in below(buffers).values():
            rows.fill_(float("nan"))
        logprobs = policy.logprobs(make_batch(), temperature=1.0).logprobs
        gradients = torch.autograd.grad(logprobs.sum(), list(policy.trainable().values()))
        folder = tmp_path / f"{beside is None}"
        folder.mkdir()
        merged.write(policy, folder, dtype=torch.float32)
        found.append((logprobs.detach(), gradients, load_file(folder / "model.safetensors"), policy.state()))
    (logprobs, gradients, files, state), (again, others, other_files, other_state) = found
    assert torch.equal(logprobs, again) and all(map(torch.equal, gradients, others))
    for one, other in ((files, other_files), (state, other_state)):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_no_view_reaches_into_them_and_they_are_not_the_bases() -> None:
    _, buffers = built(lora_of("llama"))
    name = "model.layers.0.mlp.down_proj"
    whole, matrix = buffers.with_rows[name], buffers.tensors[f"{name}.weight"]
    assert len(whole) == len(matrix) + 8
    with pytest.raises(ValueError, match="too small"):
        buffers.view([f"{name}.weight"], (len(matrix) + 1, matrix.shape[1]))
    assert buffers.owns(matrix) and buffers.owns(whole[: len(matrix)])
    assert not buffers.owns(whole) and not buffers.owns(whole[-1:]) and not buffers.owns(matrix.clone())


def test_an_nf4_base_keeps_none_but_below_what_stays_16_bit() -> None:
    _, buffers = built(lora_of("llama"), quantize=True, **NF4_SIZES)
    assert buffers.states and not buffers.with_rows and buffers.nbytes_below == 0
    _, buffers = built(lora_of("llama"), quantize=True, skip=("o_proj",), **NF4_SIZES)
    assert list(buffers.with_rows) == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    assert buffers.nbytes_below == 2 * 2 * 4 * 64


@pytest.mark.parametrize("engine_rows", [False, True])
def test_the_loader_keeps_them_where_an_engine_will_sample_from_this_base(
    tmp_path: Path, engine_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers of ours are for a card; here the CPU has them."""
    monkeypatch.setattr(weights, "shares", lambda *_: True)
    model = save(make_model("llama"), tmp_path / "llama")
    model = config.Model(name=model.name, dtype="bfloat16", lora=config.Lora(r=16, targets=("q_proj", "k_proj")))
    policy = load_model(model, load_tokenizer(model), seed=0, device="cpu", engine_rows=engine_rows)
    assert policy.weights is not None
    kept = {f"model.layers.{i}.self_attn.q_proj": 32 for i in (0, 1)} if engine_rows else {}
    assert {name: len(rows) for name, rows in below(policy.weights).items()} == kept
    policy.save(tmp_path / "adapter", load_tokenizer(model))
    again = load_saved(tmp_path / "adapter", model, load_tokenizer(model), device="cpu")
    assert again.weights is not None and not again.weights.with_rows
