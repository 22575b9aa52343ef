"""A model from scratch: its tokenizer says what it is given and shows what it can't, its weights follow the seed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from reasoner import config
from reasoner.errors import ModelError
from reasoner.models.loading import load_model, load_tokenizer
from reasoner.models.sources import check_model, context_limit

SCRATCH = config.Scratch(
    characters="0123456789+-=() \nab", hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2
)
MODEL = config.Model(name="tiny", scratch=SCRATCH, max_context=96)


def test_one_token_a_character_and_back() -> None:
    tokenizer = load_tokenizer(MODEL)
    text = "12 + (a-b)\n= 4  "
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, len(tokenizer)) == (0, 1, 2, 22)
    assert tokenizer.encode("4<eos>", add_special_tokens=False)[-1] == 1
    assert tokenizer.decode([*ids, 1]) == text + "<eos>"


def test_a12_a_character_it_can_not_say_is_seen_and_never_vanishes() -> None:
    tokenizer = load_tokenizer(MODEL)
    ids = tokenizer.encode("1*2#", add_special_tokens=False)
    assert ids.count(2) == 2 and tokenizer.decode(ids) == "1<unk>2<unk>"


def test_the_tokenizer_survives_its_folder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(MODEL)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "12 + (a-b)\n= 4*  "
    assert again.encode(text) == tokenizer.encode(text) and again.decode(again.encode(text)) == "12 + (a-b)\n= 4<unk>  "
    assert (again.pad_token_id, again.eos_token_id, again.unk_token_id) == (0, 1, 2)


def test_weights_follow_the_seed_and_leave_the_random_state_alone() -> None:
    tokenizer = load_tokenizer(MODEL)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, same, other = (load_model(MODEL, tokenizer, seed=seed, device="cpu") for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [policy.base.get_input_embeddings().weight for policy in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_it_is_a_small_tied_llama_in_float32_trained_whole() -> None:
    policy = load_model(MODEL, load_tokenizer(MODEL), seed=0, device="cpu")
    assert policy.family.name == "llama" and policy.family.packs and not policy.notes and policy.revision is None
    assert policy.head_weight.data_ptr() == policy.base.get_input_embeddings().weight.data_ptr()
    assert policy.head_weight.shape == (22, 32) and policy.head_weight.dtype == torch.float32
    assert len(policy.trainable()) == 2 * 9 + 2
    assert context_limit(MODEL) == 96 and policy.base.config.max_position_embeddings == 96


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"characters": "012a0"}, "twice there: .'0'"),
        ({"characters": ""}, "at least one"),
        ({"characters": "01", "hidden_size": 30, "heads": 4}, "hidden_size=30"),
        ({"characters": "01", "heads": 4, "kv_heads": 3}, "kv_heads=3"),
    ],
)
def test_sizes_and_characters_that_can_not_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_model(config.Model(name="tiny", scratch=config.Scratch(**changes)))
