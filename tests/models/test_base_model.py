"""A model on our own buffers is the model transformers loads, its fused views are its parts, and NF4 loses no more than
NF4 does. Rows are PITFALLS.md D7, D9 and D11."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from reasoner import config
from reasoner.errors import ModelError
from reasoner.models import adapters, base_files, base_model, nf4, sources, weights
from reasoner.models.base_weights import BaseWeights
from reasoner.models.families import FAMILIES, family_of
from reasoner.models.policy import Policy
from reasoner.models.rms_norm import replace_norms
from reasoner.models.sources import Source
from tests.models.tiny_models import lora_of, make_batch, make_model

SHARED = [name for name, row in FAMILIES.items() if row.shares]
CPU = torch.device("cpu")
NF4_SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # rows that NF4's blocks fit


def rebuilt(model, *, quantize: bool = False, skip=()) -> tuple[Policy, BaseWeights]:
    source = model.state_dict().items()
    dtype = torch.bfloat16 if quantize else torch.float32
    base, buffers = base_model.build(model.config, source, device=CPU, dtype=dtype, quantize=quantize, skip=skip)
    return Policy(base, family_of(base.config), revision=None, weights=buffers), buffers


def logprobs(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.logprobs(make_batch(), temperature=1.0).logprobs


@pytest.mark.parametrize("family", SHARED)
def test_it_is_the_model_that_transformers_makes(family: str) -> None:
    model = make_model(family)
    policy, buffers = rebuilt(model)
    replace_norms(model, family)
    assert torch.equal(logprobs(policy), logprobs(Policy(model, policy.family, revision=None)))
    assert policy.model.state_dict().keys() == model.state_dict().keys()
    assert all(buffers.owns(weight) for weight in policy.model.parameters())
    assert not any(weight.requires_grad or weight.is_meta for weight in policy.model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_d7_a_tied_head_is_the_embedding_and_an_untied_one_is_not(tied: bool) -> None:
    policy, buffers = rebuilt(make_model("llama", tie_word_embeddings=tied, vocab_size=70))
    embedding = policy.base.get_input_embeddings().weight
    assert (policy.head_weight.data_ptr() == embedding.data_ptr()) is tied
    padded = buffers.view(["model.embed_tokens.weight"], (128, 32))
    assert torch.equal(padded[:70], embedding) and not padded[70:].any()


def test_d11_a_fused_view_is_its_parts_in_order() -> None:
    policy, buffers = rebuilt(make_model("qwen2"))
    layer = policy.base.model.layers[1].self_attn
    names = [f"model.layers.1.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
    for leaf in ("weight", "bias"):
        parts = [getattr(getattr(layer, name.rpartition(".")[2]), leaf) for name in names]
        whole = torch.cat(parts)
        view = buffers.view([f"{name}.{leaf}" for name in names], whole.shape)
        assert torch.equal(view, whole) and view.data_ptr() == parts[0].data_ptr()


def test_a_view_over_strangers_is_refused_by_name() -> None:
    _, buffers = rebuilt(make_model("llama"))
    q, k, o = (f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qko")
    with pytest.raises(ValueError, match="no neighbours"):
        buffers.view([k, q], (48, 32))
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.0\.wrong"):
        buffers.view(["model.layers.0.wrong"], (1,))
    with pytest.raises(ValueError, match="too small"):
        buffers.view([o], (64, 32))


@pytest.mark.parametrize("family", SHARED)
def test_d11_every_nf4_matrix_is_the_same_alone_and_in_its_group(family: str) -> None:
    model = make_model(family, **NF4_SIZES)
    _, buffers = rebuilt(model, quantize=True)
    assert buffers.states
    for first, state in buffers.fused_states.items():
        names = [n for n in base_model.siblings(first) if n in buffers.states]
        alone = torch.cat([buffers.matrix(name) for name in names])
        data = buffers.view([f"{name}.weight" for name in names], (alone.numel() // 2, 1))
        assert torch.equal(nf4.dequantize(data, state), alone)
        for name in names:
            true = model.get_submodule(name).weight
            error = (buffers.matrix(name).float() - true).norm() / true.norm()
            assert 0.02 < error < 0.12  # 4 bits of a normal distribution cost about 9%; blocks in disorder cost 140%


def test_d9_nf4_computes_in_bf16_and_its_adapter_learns_in_float32() -> None:
    policy, _ = rebuilt(make_model("llama", **NF4_SIZES), quantize=True)
    adapted = Policy(
        adapters.attach(policy.base, lora_of("llama"), name="x", revision=None), policy.family, revision=None
    )
    found = adapted.logprobs(make_batch(), temperature=1.0).logprobs
    found.sum().backward()
    gradients = {name: weight.grad for name, weight in adapted.trainable().items()}
    assert len(gradients) == 2 * 7 * 2 and all(g is not None and g.dtype == torch.float32 for g in gradients.values())
    layers = [part for part in adapted.model.modules() if hasattr(part, "compute_dtype")]
    assert len(layers) == 14 and all(layer.compute_dtype == torch.bfloat16 for layer in layers)
    moved = (logprobs(adapted) - logprobs(policy)).abs().max()
    assert moved == 0  # B is 0: the adapter changes nothing yet


def test_rows_that_blocks_do_not_fit_and_names_to_skip_stay_16_bit_a_whole_group_at_a_time() -> None:
    _, buffers = rebuilt(make_model("llama", **NF4_SIZES), quantize=True, skip=["k_proj", "model.layers.1.mlp"])
    kept = {name for name in buffers.tensors if name.endswith("proj.weight")} - {f"{n}.weight" for n in buffers.states}
    assert {name.rpartition(".weight")[0].rpartition("layers.")[2] for name in kept} == {
        *(f"{i}.self_attn.{leaf}_proj" for i in (0, 1) for leaf in "qkv"),
        *(f"1.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
    }
    _, buffers = rebuilt(make_model("llama"), quantize=True)  # rows of 32 and 48
    assert not buffers.states


def test_the_checksum_sees_one_bit_and_a_swap() -> None:
    _, buffers = rebuilt(make_model("llama"))
    before = buffers.checksum()
    norm = buffers.tensors["model.norm.weight"]
    assert buffers.checksum() == before
    norm[3] = torch.nextafter(norm[3], norm.new_tensor(9.0))
    assert buffers.checksum() != before
    norm.copy_(torch.linspace(0, 1, 32))
    before = buffers.checksum()
    norm[[3, 4]] = norm[[4, 3]]
    assert buffers.checksum() != before


def shards(folder: Path, tensors: dict[str, Tensor], pieces: int) -> Path:
    names = sorted(tensors)
    index = {}
    for piece in range(pieces):
        file = f"model-{piece}.safetensors"
        save_file({name: tensors[name].contiguous() for name in names[piece::pieces]}, folder / file)
        index |= dict.fromkeys(names[piece::pieces], file)
    (folder / base_files.INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


def read(folder: Path) -> Iterator:
    return base_files.read(Source(str(folder), None, local_only=True))


def test_files_are_read_a_weight_at_a_time_under_the_text_models_names(tmp_path: Path) -> None:
    model = make_model("gemma3_text")
    named = {
        f"language_model.{name}": tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(named, shards(tmp_path, named, 3) / "consolidated.safetensors")  # a second copy that nobody asked for
    found = dict(read(tmp_path))
    assert len(list(read(tmp_path))) == len(named)
    assert all(torch.equal(found[name.removeprefix("language_model.")], tensor) for name, tensor in named.items())


def test_a_missing_weight_and_one_of_another_shape_are_named() -> None:
    model = make_model("llama")
    tensors = {name: t for name, t in model.state_dict().items() if name != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"lack 1 of its weights, first model\.norm\.weight"):
        base_model.build(model.config, tensors.items(), device=CPU, dtype=torch.float32, quantize=False)
    tensors["model.norm.weight"] = torch.ones(31)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: the file has \(31,\), the model \(32,\)"):
        base_model.build(model.config, tensors.items(), device=CPU, dtype=torch.float32, quantize=False)


@pytest.mark.parametrize(("nested", "pieces"), [(False, 1), (True, 1), (False, 3)])
def test_a_checkpoint_that_bitsandbytes_quantized_keeps_its_codes(tmp_path: Path, nested: bool, pieces: int) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = make_model("llama", **NF4_SIZES).bfloat16()
    tensors, truth = {}, {}
    for name, tensor in model.state_dict().items():
        if "proj" in name:
            packed, state = quantize_4bit(tensor, blocksize=64, quant_type="nf4", compress_statistics=nested)
            tensors[name] = packed
            tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
            truth[name.removesuffix(".weight")] = dequantize_4bit(packed, state)
        else:
            tensors[name] = tensor
    base, buffers = base_model.build(
        model.config, read(shards(tmp_path, tensors, pieces)), device=CPU, dtype=torch.bfloat16, quantize=True
    )
    assert base.config is not None and set(buffers.states) == set(truth)
    for name, true in truth.items():
        torch.testing.assert_close(buffers.matrix(name), true, rtol=2**-8, atol=0)


NF4 = config.Model(name="m", quantize="nf4", lora=config.Lora())
PLAIN = config.Model(name="m", lora=config.Lora())


def test_a_family_that_can_not_be_quantized_says_so() -> None:
    with pytest.raises(ModelError, match=r"not there for this olmo2 model \(it is for llama, mistral"):
        weights.shares(NF4, make_model("olmo2").config, torch.device("cuda"))
    with pytest.raises(ModelError, match="needs a CUDA GPU"):
        weights.shares(NF4, make_model("llama").config, CPU)


@pytest.mark.parametrize(
    ("before", "model", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, PLAIN, r"quantized already: set model\.quantize=nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, NF4, "quantized \\(bitsandbytes, 8 bits\\), and only"),
        ({"quant_method": "fp8"}, NF4, "quantized \\(fp8\\), and only bitsandbytes' NF4"),
        ({"quant_method": "gptq", "bits": 4}, PLAIN, "quantized \\(gptq\\), and only"),
    ],
)
def test_a_checkpoint_whose_numbers_are_no_weights_is_refused(before, model, said: str) -> None:
    settings = make_model("llama").config
    settings.quantization_config = before
    with pytest.raises(ModelError, match=said):
        weights._check_quantized(model, settings)
    settings.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    weights._check_quantized(NF4, settings)


def test_stored_numbers_that_are_no_weights_are_refused_by_name() -> None:
    model = make_model("llama")
    tensors = {name: t.to(torch.float8_e4m3fn) if "k_proj" in name else t for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj\.weight: the file has torch\.float8_e4m3fn"):
        base_model.build(model.config, tensors.items(), device=CPU, dtype=torch.float32, quantize=False)


def test_a_composite_checkpoints_settings_and_names_reach_the_text_model(tmp_path: Path) -> None:
    whole = {
        "model_type": "gemma3",
        "text_config": make_model("gemma3_text").config.to_dict(),
        "vision_config": {"model_type": "siglip_vision_model"},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    (tmp_path / "config.json").write_text(json.dumps(whole, default=str))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    found = sources.read_config(config.Model(name=str(tmp_path)))
    assert found.model_type == "gemma3_text" and weights._quantization(found)["load_in_4bit"]
    for name in ("language_model.model.layers.1.mlp", "model.language_model.layers.1.mlp", "model.layers.1.mlp"):
        assert base_files.text_name(name) == "model.layers.1.mlp"


def test_transformers_loads_nothing_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is ever there twice: the model is made on meta."""
    made = []
    original = AutoModelForCausalLM.from_config

    def watch(*args, **kwargs):
        made.append(original(*args, **kwargs))
        assert all(p.is_meta for n, p in made[-1].named_parameters() if "norm" not in n)
        return made[-1]

    source = make_model("llama")
    monkeypatch.setattr(base_model.AutoModelForCausalLM, "from_config", watch)
    rebuilt(source)
    assert len(made) == 1
