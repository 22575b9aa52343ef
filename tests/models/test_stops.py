"""A10: the ids that end a completion, from the four places that disagree."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from reasoner import config
from reasoner.data.templates import make_template
from reasoner.models.adapters import attach
from reasoner.models.loading import load_tokenizer
from reasoner.models.stops import stop_ids
from tests.models.tiny_models import lora_of, make_model

TOKENIZERS = Path(__file__).parents[2] / "../shared/data/tokenizers"
needs_tokenizers = pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="the real tokenizers folder is not there")


@needs_tokenizers
def test_a10_llama_names_the_end_of_text_and_closes_turns_with_another() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / "llama-3.2-instruct-hf")
    configs = TOKENIZERS / "llama-3.2-1b-configs"
    model = SimpleNamespace(
        config=AutoConfig.from_pretrained(configs), generation_config=GenerationConfig.from_pretrained(configs)
    )
    found = stop_ids(tokenizer, make_template(tokenizer, config.Data()), model)
    assert {128001, 128009} <= set(found) and list(found) == sorted(found)


@needs_tokenizers
def test_a10_qwen_stops_at_the_turn_s_end_and_at_the_text_s() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / "qwen2.5-instruct")
    model = SimpleNamespace(
        config=SimpleNamespace(eos_token_id=151645), generation_config=GenerationConfig(eos_token_id=[151645, 151643])
    )
    assert stop_ids(tokenizer, make_template(tokenizer, config.Data(template="chatml")), model) == (151643, 151645)


def test_a10_each_place_alone_is_enough() -> None:
    letters = config.Scratch(characters="".join(chr(code) for code in range(40, 100)))
    tokenizer = load_tokenizer(config.Model(name="letters", scratch=letters))
    template = make_template(tokenizer, config.Data(template="plain"))
    model = attach(make_model("llama").requires_grad_(False), lora_of("llama"), name="tiny", revision=None)
    model.config.eos_token_id, model.generation_config.eos_token_id = 7, [8, 9]
    template.turn_end_id = 5
    assert stop_ids(tokenizer, template, model) == (1, 5, 7, 8, 9)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    assert stop_ids(tokenizer, template, model) == (1, 5)
