"""LoRA: who gets gradient, in which dtype, what is refused, and the PEFT layout that others read."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from reasoner import config
from reasoner.errors import ModelError
from reasoner.models import adapters
from reasoner.models.loading import load_model, load_saved, load_tokenizer, recompute_layers
from reasoner.models.policy import Policy
from reasoner.models.sources import check_model
from tests.models.tiny_models import fill_b, gradients, lora_of, make_batch, make_model, make_policy

NEAR = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Qwen 3 as a hub would give it, with a tokenizer."""
    place = tmp_path_factory.mktemp("qwen3")
    make_model("qwen3").save_pretrained(place)
    letters = config.Scratch(characters="".join(chr(code) for code in range(40, 100)))
    load_tokenizer(config.Model(name="letters", scratch=letters)).save_pretrained(place)
    return place


def model_of(folder: Path, **changes: object) -> config.Model:
    return config.Model(name=str(folder), **{"lora": lora_of("qwen3"), **changes})


def load(model: config.Model, seed: int = 0) -> Policy:
    return load_model(model, load_tokenizer(model), seed=seed, device="cpu")


@pytest.mark.parametrize("recompute", [False, True])
def test_b7_every_b_gets_gradient_at_step_one_and_every_a_at_step_two(folder: Path, recompute: bool) -> None:
    policy = load(model_of(folder, gradient_checkpointing=recompute))
    weights = policy.trainable()
    assert len(weights) == 2 * 7 * 2 and all(".lora_" in name for name in weights)
    for part, other in (("lora_B", "lora_A"), ("lora_A", "lora_B")):
        policy.train_mode(dropout=False)
        found = gradients(policy, policy.logprobs(make_batch(), temperature=1.0).logprobs.sum())
        assert all(g.isfinite().all() for g in found.values())
        assert all(g.abs().max() > 0 for name, g in found.items() if part in name), part
        if part == "lora_B":
            assert all(g.abs().max() == 0 for name, g in found.items() if other in name)
        with torch.no_grad():
            for name, weight in weights.items():
                weight -= 0.1 * found[name]


def test_recomputation_really_recomputes_all_but_the_last_layer(folder: Path) -> None:
    calls = {}
    for recompute in (False, True):
        policy = load(model_of(folder, gradient_checkpointing=recompute))
        seen: list[int] = []
        for number, layer in enumerate(policy.base.get_decoder().layers):
            layer.mlp.register_forward_pre_hook(lambda *_, seen=seen, number=number: seen.append(number))
        policy.train_mode(dropout=False)
        gradients(policy, policy.logprobs(make_batch(), temperature=1.0).logprobs.sum())
        calls[recompute] = seen
    assert calls == {False: [0, 1], True: [0, 1, 0]}
    with pytest.raises(ModelError, match="gradient_checkpointing=false"):
        recompute_layers(torch.nn.Linear(1, 1), "none")


@pytest.mark.parametrize(("dropout", "family", "keeps"), [(0.0, "llama", 0), (0.5, "llama", 1), (0.0, "unheard of", 1)])
def test_what_is_dropped_is_dropped_again_and_random_states_are_kept_for_what_may_drop(
    dropout: float, family: str, keeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("llama", lora=lora_of("llama", dropout=dropout))
    states: list[int] = []
    read = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: states.append(1) or read())

    def learn() -> dict[str, torch.Tensor]:
        policy.train_mode(dropout=True)
        with torch.random.fork_rng():
            states.clear()
            torch.manual_seed(5)
            loss = policy.logprobs(make_batch(), temperature=1.0).logprobs.sum()
            torch.manual_seed(6)
            return gradients(policy, loss)

    kept = learn()
    assert not states
    policy.base.config.model_type = family
    recompute_layers(policy.base, "tiny")
    assert all(torch.equal(gradient, kept[name]) for name, gradient in learn().items())
    assert bool(states) == keeps


@pytest.mark.parametrize(("kept", "again"), [(0, [2, 1, 0]), (1, [1, 0]), (2, [0]), (9, [0])])
def test_the_last_layers_keep_what_they_made_and_gradients_are_the_same(kept: int, again: list[int]) -> None:
    policy = make_policy("llama", lora=lora_of("llama"), num_hidden_layers=3)
    seen: list[int] = []
    for number, layer in enumerate(policy.base.get_decoder().layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
    whole = gradients(policy, policy.logprobs(make_batch(), temperature=1.0).logprobs.sum())
    for before in (1, 3):  # whatever was set before
        recompute_layers(policy.base, "tiny", kept=before)
        recompute_layers(policy.base, "tiny", kept=kept)
        policy.train_mode(dropout=False)
        seen.clear()
        found = gradients(policy, policy.logprobs(make_batch(), temperature=1.0).logprobs.sum())
        assert seen == [0, 1, 2, *again] and policy.recomputed == len(again)
        assert all(torch.equal(gradient, whole[name]) for name, gradient in found.items())


def test_a_layer_that_is_the_only_one_recomputes() -> None:
    policy = make_policy("llama", lora=lora_of("llama"), num_hidden_layers=1)
    recompute_layers(policy.base, "tiny", offload=True)
    assert policy.recomputed and policy.offloads


@pytest.mark.parametrize("keep", [True, "offload"])
def test_a_model_loaded_so_recomputes_and_its_embedding_gets_no_gradient(
    folder: Path, keep: object, tmp_path: Path
) -> None:
    """peft would have the embedding's output require one, which keeps that on the card. On the CPU, where a run's model
    is exported and measured, `offload` recomputes."""
    model = model_of(folder, gradient_checkpointing=keep)
    loaded = load(model)
    loaded.save(tmp_path, load_tokenizer(model))
    for policy in (loaded, load_saved(tmp_path, model, load_tokenizer(model), device="cpu")):
        assert policy.recomputed and not policy.offloads
        needed: list[bool] = []
        policy.base.get_input_embeddings().register_forward_hook(
            lambda _, __, out, needed=needed: needed.append(out.requires_grad)
        )
        policy.train_mode(dropout=False)
        found = gradients(policy, policy.logprobs(make_batch(), temperature=1.0).logprobs.sum())
        assert needed == [False] and all(g.abs().max() > 0 for name, g in found.items() if "lora_B" in name)


def test_the_adapter_starts_as_nothing_and_its_a_follows_the_seed(folder: Path) -> None:
    first, same, other = (load(model_of(folder), seed=seed) for seed in (0, 0, 1))
    plain = load(model_of(folder, lora=None))
    batch = make_batch()
    logprobs = [policy.logprobs(batch, temperature=1.0).logprobs for policy in (first, plain)]
    torch.testing.assert_close(*logprobs, atol=0, rtol=0)
    a = [next(w for name, w in policy.trainable().items() if "lora_A" in name) for policy in (first, same, other)]
    assert torch.equal(a[0], a[1]) and not torch.equal(a[0], a[2])


def test_d15_a_bf16_base_has_float32_adapters_and_small_steps_arrive(folder: Path) -> None:
    policy = load(model_of(folder, dtype="bfloat16"))
    assert policy.head_weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in policy.trainable().values()} == {torch.float32}
    weight = next(w for name, w in policy.trainable().items() if "lora_A" in name)
    with torch.no_grad():
        weight.fill_(0.02)
        for _ in range(100):
            weight -= 1e-5
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.019), atol=1e-6, rtol=0)
    assert policy.logprobs(make_batch(), temperature=1.0).logprobs.dtype == torch.float32  # C20


def test_d7_head_and_embedding_targets_are_refused_and_the_head_stays_tied(folder: Path) -> None:
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(ModelError, match=target):
            check_model(model_of(folder, lora=config.Lora(targets=("q_proj", target))))
    policy = load(model_of(folder))
    assert policy.head_weight.data_ptr() == policy.base.get_input_embeddings().weight.data_ptr()


def test_an_unknown_target_is_refused_with_those_there() -> None:
    with pytest.raises(ModelError, match=r"no linear layer q_proj, .*it has down_proj, gate_up_proj, o_proj, qkv_proj"):
        make_policy("phi3", lora=config.Lora(r=2))
    policy = make_policy("phi3", lora=lora_of("phi3"))
    assert len(policy.trainable()) == 2 * 4 * 2


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 8.0)])
def test_d6_scale(rslora: bool, scale: float) -> None:
    policy = make_policy("llama", lora=config.Lora(r=16, alpha=32, rslora=rslora, targets=("q_proj",)))
    assert policy.base.get_decoder().layers[0].self_attn.q_proj.scaling == {adapters.ADAPTER: scale}


def test_peft_reads_what_was_saved(folder: Path, tmp_path: Path) -> None:
    model = model_of(folder)
    policy, tokenizer, batch = load(model), load_tokenizer(model), make_batch()
    fill_b(policy.model)
    policy.save(tmp_path / "adapter", tokenizer, stop_ids=(1, 7))
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "generation_config.json"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)  # G7
    assert json.loads((tmp_path / "adapter/generation_config.json").read_text())["eos_token_id"] == [1, 7]
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)

    expected = policy.logprobs(batch, temperature=1.0).logprobs
    with adapters._old_names_allowed():
        theirs = PeftModel.from_pretrained(make_model("qwen3"), str(tmp_path / "adapter"))
    found = Policy(theirs, policy.family, revision=None).logprobs(batch, temperature=1.0).logprobs
    torch.testing.assert_close(found, expected, **NEAR)
    assert (expected - load(model).logprobs(batch, temperature=1.0).logprobs).abs().max() > 0.1

    ours = load_saved(tmp_path / "adapter", model, tokenizer, device="cpu")
    assert torch.equal(ours.logprobs(batch, temperature=1.0).logprobs, expected)
    assert ours.trainable().keys() == policy.trainable().keys()


def test_a_folder_without_an_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    model = model_of(folder)
    with pytest.raises(ModelError, match="holds no adapter"):
        load_saved(tmp_path, model, load_tokenizer(model), device="cpu")
    load(model).save(tmp_path, load_tokenizer(model))
    path = tmp_path / adapters.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ModelError, match="can't be read"):
        load_saved(tmp_path, model, load_tokenizer(model), device="cpu")
