"""Tokenizers for these tests: a small one made here, and the real ones of ../shared/data where that folder is."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from reasoner.config import Config, validate

SHARED = Path(__file__).parents[2] / "../shared/data"
MADE_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and tokenizers."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    return SHARED


@cache
def _load(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SHARED / name)


@pytest.fixture(scope="session")
def real(shared: Path) -> Callable[[str], PreTrainedTokenizerBase]:
    """A real tokenizer by its folder; shared between tests, so leave it as it is."""
    return _load


def make_tokenizer(*, add_bos: bool = False, think: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with two merges ("42" and "\\n\\n"), control tokens, eos </s>, and pad = eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("4", "2"), ("Ċ", "Ċ")]
    vocabulary = {token: number for number, token in enumerate([*MADE_TOKENS, *alphabet, "42", "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=MADE_TOKENS[2:],
    )
    if think:
        tokenizer.add_special_tokens({"extra_special_tokens": [*MADE_TOKENS[2:], "<think>", "</think>"]})
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """The small tokenizer, which adds no BOS."""
    return make_tokenizer()


@pytest.fixture
def making() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes a small tokenizer of another habit."""
    return make_tokenizer


@pytest.fixture
def conf() -> Callable[..., Config]:
    """A checked Config over the given `data`, stages and sections."""

    def make(data: Mapping[str, Any], stages: tuple[str, ...] = ("sft", "grpo", "evaluate"), **sections: Any) -> Config:
        grpo = {"loss": {}, **sections.pop("grpo", {})}
        reward = {"parts": {"accuracy": {"fn": "math"}}}
        values = {"name": "test", "out": "out", "stages": stages, "model": {"name": "none"}, "reward": reward}
        return validate({**values, "data": {"template": "plain", **data}, "grpo": grpo, **sections})

    return make
