"""A2: tokens that a model never learned lie in a crowd of equal rows."""

from pathlib import Path

import pytest
import torch

from reasoner import config
from reasoner.models.loading import load_model, load_tokenizer
from reasoner.models.untrained import untrained_tokens
from tests.models.tiny_models import make_policy

STORIES = Path(__file__).parents[2] / "../shared/data/models/stories260K-hf"
BOS, EOS, THE = 1, 2, 265  # <s>, </s>, ▁the in its tokenizer.model


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real models folder is not there")
def test_a2_the_stories_model_never_learned_its_eos_and_did_learn_the() -> None:
    small = load_tokenizer(config.Model(name="letters", scratch=config.Scratch(characters="ab")))
    policy = load_model(config.Model(name=str(STORIES.resolve())), small, seed=0, device="cpu")
    assert untrained_tokens(policy, [THE, EOS, BOS, EOS]) == [EOS]
    norms = policy.head_weight.detach().norm(dim=1)
    assert norms[EOS] > norms[THE]  # why no test of norms would do


def test_a2_in_a_head_of_its_own() -> None:
    policy = make_policy("llama", vocab_size=128)
    assert untrained_tokens(policy, range(128)) == []
    with torch.no_grad():
        policy.head_weight[50:70] = policy.head_weight[50] + 1e-4 * torch.randn(20, 32)
    assert untrained_tokens(policy, [70, 69, 3, 50]) == [69, 50]


def test_a_few_equal_rows_are_no_crowd() -> None:
    policy = make_policy("llama", vocab_size=128)
    with torch.no_grad():
        policy.head_weight[50:53] = policy.head_weight[50]
    assert untrained_tokens(policy, [50, 51]) == []
    assert untrained_tokens(policy, []) == []
