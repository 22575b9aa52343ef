"""Folders and hub ids: what is loaded is what was asked for, and what can't serve is refused in one line."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration

from reasoner import config
from reasoner.errors import ModelError
from reasoner.models import loading, sources, weights
from reasoner.models.loading import load_model, load_saved, load_tokenizer
from reasoner.models.policy import Policy
from reasoner.models.sources import check_model, context_limit
from tests.models.tiny_models import SIZES, gradients, lora_of, make_batch, make_model, make_policy, one_at_a_time

LETTERS = config.Scratch(characters="".join(chr(code) for code in range(40, 100)))


def save(model: torch.nn.Module, folder: Path) -> config.Model:
    model.save_pretrained(folder)
    load_tokenizer(config.Model(name="letters", scratch=LETTERS)).save_pretrained(folder)
    return config.Model(name=str(folder))


def load(model: config.Model) -> Policy:
    return load_model(model, load_tokenizer(model), seed=0, device="cpu")


@pytest.fixture
def llama(tmp_path: Path) -> config.Model:
    return save(make_model("llama"), tmp_path / "llama")


def edit_config(model: config.Model, **changes: object) -> None:
    path = Path(model.name) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("quantize", "lora", "remedy"),
    [
        ("none", config.Lora(), "set model.quantize=nf4"),
        ("nf4", config.Lora(), "choose a smaller model"),
        ("none", None, "choose a smaller model"),  # all weights are trained, which NF4's can't be
    ],
)
def test_weights_that_do_not_fit_on_the_card_are_one_line(
    llama: config.Model, quantize: Any, lora: config.Lora | None, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(weights, "read", read)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 29, 8 << 30))
    monkeypatch.setattr(sources, "check_model", lambda model: None)  # which wants a GPU for NF4
    said = rf"^the weights of .*llama do not fit .* \(8\.0 GiB in all, 0\.5 still free\): {remedy}, or end the programs"
    with pytest.raises(ModelError, match=said):
        load(replace(llama, quantize=quantize, lora=lora))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_a_folder_gives_the_model_that_was_saved_there(tmp_path: Path, family: str) -> None:
    model, batch = save(make_model(family), tmp_path), make_batch()
    policy = load(model)
    assert policy.base.config._attn_implementation == "reasoner_packed"
    torch.testing.assert_close(
        policy.logprobs(batch, temperature=1.0).logprobs,
        one_at_a_time(make_model(family, attention=policy.family.decode_attention), batch),
        atol=1e-5,
        rtol=0,
    )


def test_h6_a_float32_request_is_float32_whatever_the_checkpoint_is(tmp_path: Path) -> None:
    model = save(make_model("llama").to(torch.bfloat16), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for dtype in ("auto", "float32"):
        assert {weight.dtype for weight in load(replace(model, dtype=dtype)).model.parameters()} == {torch.float32}
    base = load(replace(model, dtype="bfloat16", lora=lora_of("llama")))
    assert base.head_weight.dtype == torch.bfloat16


def test_a_whole_model_saved_is_a_whole_model_read(tmp_path: Path, llama: config.Model) -> None:
    policy, tokenizer, batch = load(llama), load_tokenizer(llama), make_batch()
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight += 0.05
    policy.save(tmp_path / "out", tokenizer, stop_ids=(1, 9))
    expected = policy.logprobs(batch, temperature=1.0).logprobs
    again = load_saved(tmp_path / "out", llama, tokenizer, device="cpu")
    assert torch.equal(again.logprobs(batch, temperature=1.0).logprobs, expected)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"} <= files
    assert "reasoner" not in (tmp_path / "out/config.json").read_text()
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [1, 9]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(one_at_a_time(theirs, batch), expected, atol=1e-5, rtol=0)


def test_the_pad_token_learns_too_where_it_is_also_the_stop_token(tmp_path: Path) -> None:
    # A1's other half: an nn.Embedding with padding_idx = eos gives the eos row no gradient.
    model = save(make_model("llama", pad_token_id=2), tmp_path)
    policy, batch = load(model), make_batch()
    batch.token_ids[batch.layout.cu_seqlens[1] + 1] = 2
    found = gradients(policy, policy.logprobs(batch, temperature=1.0).logprobs.sum())
    assert found["model.embed_tokens.weight"][2].abs().max() > 0


def test_weights_missing_from_the_files_are_not_made_up(llama: config.Model) -> None:
    path = Path(llama.name) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 of its weights, first model\.layers\.1\.mlp\.up_proj\.weight"):
        load(llama)


def test_a_vision_checkpoint_gives_its_text_model(tmp_path: Path) -> None:
    sizes = {**SIZES, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    settings = AutoConfig.for_model(
        "gemma3", text_config=sizes, vision_config=vision | {"patch_size": 14}, mm_tokens_per_image=4
    )
    whole = Gemma3ForConditionalGeneration(settings).eval()
    model, batch = save(whole, tmp_path), make_batch()
    policy = load(model)
    assert policy.family.name == "gemma3_text" and policy.family.packs and context_limit(model) == 64
    found = policy.logprobs(batch, temperature=1.0).logprobs
    torch.testing.assert_close(found, one_at_a_time(whole, batch), atol=1e-5, rtol=0)


def test_g7_pickled_weights_are_never_loaded(llama: config.Model) -> None:
    folder = Path(llama.name)
    (folder / "model.safetensors").unlink()
    torch.save(make_model("llama").state_dict(), folder / "pytorch_model.bin")
    for refuses in (check_model, load_tokenizer):
        with pytest.raises(ModelError, match=r"only pytorch_model\.bin; pickled weights are never loaded"):
            refuses(llama)


def test_g7_code_of_a_repository_is_never_run(llama: config.Model) -> None:
    marker = Path(llama.name) / "ran"
    (Path(llama.name) / "modelling.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit_config(llama, model_type="own", auto_map={"AutoConfig": "modelling.A", "AutoModelForCausalLM": "modelling.B"})
    with pytest.raises(ModelError, match="can't be read"):
        check_model(llama)
    assert not marker.exists()


@pytest.mark.parametrize("damage", ["no config", "broken config", "unknown type", "cut weights"])
def test_a_broken_folder_is_one_line(llama: config.Model, damage: str) -> None:
    folder = Path(llama.name)
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "broken config":
        (folder / "config.json").write_text('{"model_type": ')
    elif damage == "unknown type":
        edit_config(llama, model_type="no_such_type")
    else:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.name=.*llama") as caught:
        load(llama)
    assert "\n" not in str(caught.value)


def test_d18_the_context_is_known_before_any_weight_is_read(llama: config.Model) -> None:
    (Path(llama.name) / "model.safetensors").write_bytes(b"not read")
    assert context_limit(llama) == 64 and context_limit(replace(llama, max_context=48)) == 48
    with pytest.raises(ModelError, match="max_context=65 is more than the 64 tokens"):
        check_model(replace(llama, max_context=65))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": "nf4"}, r"model\.quantize=none"),
        ({"scratch": LETTERS, "lora": config.Lora()}, r"model\.lora=null"),
        ({"scratch": LETTERS, "gguf": config.Gguf("a.gguf")}, "both set"),
        ({"scratch": LETTERS, "revision": "main"}, r"model\.revision=main"),
        ({"scratch": LETTERS, "dtype": "bfloat16"}, r"model\.dtype=float32"),
    ],
)
def test_settings_that_can_not_be_are_refused_with_the_key_to_change(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_model(config.Model(name="x", **changes))


def test_special_tokens_are_named_or_refused(llama: config.Model) -> None:
    tokenizer = load_tokenizer(replace(llama, eos_token="A", pad_token="B"))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("A", "B") and tokenizer.pad_token_id != tokenizer.eos_token_id
    with pytest.raises(ModelError, match=r"model\.eos_token='<no>' is not one of the 63 tokens"):
        load_tokenizer(replace(llama, eos_token="<no>"))


def test_a_tokenizer_larger_than_the_head_is_refused(tmp_path: Path) -> None:
    model = save(make_model("llama", vocab_size=40), tmp_path)
    with pytest.raises(ModelError, match="40 rows in its head for the 63 tokens"):
        load(model)


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no plain matrix"):
        load(save(make_model("phi", attention="sdpa", num_key_value_heads=4), tmp_path))


def test_h5_an_unknown_family_whose_logits_we_would_misread_is_refused() -> None:
    policy = make_policy("llama", attention="sdpa")
    unknown = replace(policy.family, packs=False, known=False)
    loading._probe(Policy(policy.base, unknown, revision=None), torch.float32)
    for wrong in ({"logit_scale": 1.1}, {"soft_cap": 5.0}):
        with pytest.raises(ModelError, match="in a way we don't know"):
            loading._probe(Policy(policy.base, replace(unknown, **wrong), revision=None), torch.float32)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exception]]:
    """A hub that answers every question with the first exception of the list."""
    answers: list[Exception] = []

    class Hub:
        def model_info(self, *_: object, **__: object) -> None:
            raise answers[0]

    monkeypatch.setattr(sources, "HfApi", Hub)
    sources.locate.cache_clear()
    yield answers
    sources.locate.cache_clear()


def answer(kind: type[Exception]) -> Exception:
    request = sources.httpx.Request("GET", "https://huggingface.co/api/models/me/model")
    return kind("no", response=sources.httpx.Response(404, request=request))


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (lambda: answer(RepositoryNotFoundError), "the hub has no model 'me/model' that you may see"),
        (lambda: answer(RevisionNotFoundError), "no revision abc"),
        (lambda: answer(GatedRepoError), "accept its licence at https://huggingface.co/me/model and set HF_TOKEN"),
        (lambda: sources.httpx.ConnectError("down"), "can't be reached and me/model was not downloaded before"),
        (lambda: ConnectionError("offline mode"), "can't be reached and me/model was not downloaded before"),
    ],
)
def test_hub_troubles_are_one_line_that_says_what_to_do(hub: list[Exception], raised: Any, message: str) -> None:
    hub.append(raised())
    model = config.Model(name="me/model", revision="abc")
    for asks in (check_model, load_tokenizer):
        with pytest.raises(ModelError, match=message) as caught:
            asks(model)
        assert "\n" not in str(caught.value)


def test_a_hub_model_is_pinned_to_its_commit_and_needs_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(rfilename="config.json"), SimpleNamespace(rfilename="pytorch_model.bin")]
    hub = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(sha="c0ffee", siblings=files))
    monkeypatch.setattr(sources, "HfApi", lambda: hub)
    model = config.Model(name="me/pinned")
    with pytest.raises(ModelError, match=r"no \.safetensors file; pickled weights are never loaded"):
        sources.locate(model)
    files.append(SimpleNamespace(rfilename="model-00001-of-00002.safetensors"))
    source = sources.locate(model)
    sources.locate.cache_clear()
    assert source.options == {"revision": "c0ffee", "local_files_only": False, "trust_remote_code": False}


def test_a_name_that_is_nothing_is_one_line() -> None:
    with pytest.raises(ModelError, match="neither a folder here nor a hub id"):
        check_model(config.Model(name="./no such folder"))
