"""That every trainer in benchmarks/update.py is given the same work on the same weights, and what that work costs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_model import random_policy
from benchmarks.update import turns, work_of
from benchmarks.update_ours import Ours
from benchmarks.update_rivals import Plain, fastest
from benchmarks.update_work import Work
from reasoner.config import Lora
from reasoner.models.loading import layers_of
from tests.models.tiny_models import make_batch


def test_the_lengths_add_up_and_stay_within_their_limits() -> None:
    work = Work("1.5b")
    assert sum(work.lengths) == 16_384 and len(work.lengths) == 24
    assert all(256 <= length <= 1024 for length in work.lengths) and len(set(work.lengths)) > 10
    assert work.lengths == tuple(sorted(Work("7b").lengths))


def test_useful_work_is_three_passes_of_the_projections_and_two_of_the_head() -> None:
    work = work_of("trial")  # 2 layers of 64 wide, 4 heads and 2 of keys and values, 16 each; 128 inside; 515 tokens
    a_layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    trained = sum(length - length // 10 for length in work.lengths)
    assert work.useful_flop == 3 * 2 * 320 * 2 * a_layer + 2 * 2 * trained * 515 * 64


def test_layers_of_a_random_policy_recompute_as_those_of_a_run() -> None:
    """No gradient of the embedding's output, which nobody reads; the random state kept for an adapter that drops."""
    policy = random_policy("trial", nf4=False, lora=Lora(r=2, alpha=4, dropout=0.5), recompute=True)
    needed: list[bool] = []
    policy.base.get_input_embeddings().register_forward_hook(lambda _, __, out: needed.append(out.requires_grad))
    policy.train_mode(dropout=True)
    policy.logprobs(make_batch(), temperature=1.0)
    first, last = layers_of(policy.base)
    recomputing: Any = first._gradient_checkpointing_func
    assert needed == [False] and first.gradient_checkpointing and not last.gradient_checkpointing
    assert recomputing.keywords["preserve_rng_state"]


def test_the_row_of_a_card_runs_a_runs_rehearsal(tmp_path: Path) -> None:
    ours = Ours(work_of("trial"), tmp_path)
    assert ours.policy.recomputed == 1
    ours._fit(16)  # on a CPU everything fits
    assert ours.policy.recomputed == 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft 0.21 asks transformers 5.24 so
def test_all_trainers_have_the_same_loss_before_they_learn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    work = work_of("trial")
    (ours, keeping), plain = Ours(work, tmp_path).rows(), Plain(work, tmp_path)
    padded, packed = plain.rows()[0], plain.variants()[0]
    ours.run(0, 1)
    first = plain._update(plain._padded(4))
    plain.optimizer = torch.optim.AdamW(plain.parameters, lr=0.0)
    assert ours.facts["loss"] == pytest.approx(first, abs=3e-3)
    keeping.run(0, 1)
    assert keeping.name.endswith("nothing recomputed, 320 tokens a micro-batch")
    assert keeping.facts["micro_batch"] == "320 tokens" and keeping.facts["loss"] < ours.facts["loss"]  # a step later
    padded.run(0, 1)
    packed.run(0, 1)
    assert padded.facts["loss"] == pytest.approx(packed.facts["loss"], abs=3e-3)
    assert padded.facts["micro_batch"] in ("8 sequences", "4 sequences") and packed.facts["micro_batch"] == "320 tokens"


def test_a_smaller_micro_batch_is_taken_where_it_costs_hardly_more() -> None:
    assert fastest({24: 1.00, 8: 1.02, 4: 1.2}) == 8
    assert fastest({24: None, 8: 1.2, 4: 1.0}) == 4
    with pytest.raises(torch.OutOfMemoryError):
        fastest({24: None})


def test_turns_go_there_and_back() -> None:
    found = list(turns(["a"], ["reasoner", "trl"]))
    there, back = [("a", "first", "reasoner"), ("a", "first", "trl")], [("a", "second", "trl")]
    assert found == [*there, *back, ("a", "second", "reasoner"), ("a", "variants", "reasoner")]
