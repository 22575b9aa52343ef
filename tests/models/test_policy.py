"""What learns, what is frozen, and what a checkpoint holds of a policy."""

import pytest
import torch

from reasoner.errors import ModelError
from reasoner.models.policy import Policy
from tests.models.tiny_models import gradients, lora_of, make_batch, make_policy


def step(policy: Policy, lr: float = 0.1) -> dict[str, torch.Tensor]:
    """One plain gradient step on the sum of logprobs; its gradients."""
    found = gradients(policy, policy.logprobs(make_batch(), temperature=1.0).logprobs.sum())
    with torch.no_grad():
        for name, weight in policy.trainable().items():
            weight -= lr * found[name]
    return found


@pytest.mark.parametrize("whole", [False, True])
def test_c10_right_after_the_freeze_the_kl_is_exactly_zero_and_later_it_is_not(whole: bool) -> None:
    policy = make_policy("llama", lora=None if whole else lora_of("llama"))
    batch = make_batch()
    step(policy)  # the warm-up: a reference made by switching the adapter off would be another model
    before = policy.logprobs(batch, temperature=1.0).logprobs
    policy.freeze_reference()
    with policy.reference():
        reference = policy.logprobs(batch, temperature=1.0).logprobs
    assert torch.equal(reference, before) and not reference.requires_grad
    step(policy)
    with policy.reference():
        assert torch.equal(policy.logprobs(batch, temperature=1.0).logprobs, reference)
    after = policy.logprobs(batch, temperature=1.0).logprobs
    assert after.requires_grad and (after - reference).abs().max() > 1e-3


def test_the_reference_gives_the_weights_back_even_if_the_inside_raises() -> None:
    policy = make_policy("llama", lora=lora_of("llama"))
    policy.freeze_reference()
    step(policy)
    weights = policy.trainable()
    kept, places = {n: w.detach().clone() for n, w in weights.items()}, {n: w.data_ptr() for n, w in weights.items()}
    with pytest.raises(KeyError), policy.reference():
        assert not torch.equal(next(iter(policy.trainable().values())), next(iter(kept.values())))
        raise KeyError
    assert torch.is_grad_enabled()
    for name, weight in policy.trainable().items():
        assert torch.equal(weight, kept[name]) and weight.data_ptr() == places[name]
    with pytest.raises(AssertionError, match="freeze_reference"), make_policy("llama").reference():
        pass


@pytest.mark.parametrize("whole", [False, True])
def test_state_takes_the_policy_and_its_reference_into_another_one(whole: bool) -> None:
    lora = None if whole else lora_of("llama")
    policy, other = (make_policy("llama", lora=lora, seed=seed) for seed in (0, 0))
    batch = make_batch()
    policy.freeze_reference()
    step(policy)
    state = {name: tensor.clone() for name, tensor in policy.state().items()}
    assert sum(name.startswith("reference.") for name in state) == len(policy.trainable()) == len(state) / 2
    places = [weight.data_ptr() for weight in other.trainable().values()]
    other.load_state(state)
    assert places == [weight.data_ptr() for weight in other.trainable().values()]
    assert torch.equal(*(p.logprobs(batch, temperature=1.0).logprobs for p in (policy, other)))
    with policy.reference(), other.reference():
        assert torch.equal(*(p.logprobs(batch, temperature=1.0).logprobs for p in (policy, other)))
    state["reference." + next(iter(policy.trainable()))].fill_(9.0)
    with other.reference():
        assert torch.equal(*(p.logprobs(batch, temperature=1.0).logprobs for p in (other, other)))
        assert next(iter(other.trainable().values())).max() < 9.0


@pytest.mark.parametrize("damage", ["lost", "extra", "shape", "reference"])
def test_a_state_of_another_model_is_refused_with_nothing_changed(damage: str) -> None:
    policy = make_policy("llama", lora=lora_of("llama"))
    policy.freeze_reference()
    state = {name: torch.zeros_like(tensor) for name, tensor in policy.state().items()}
    first = next(iter(state))
    if damage == "lost":
        del state[first]
    elif damage == "extra":
        state[first + ".more"] = torch.zeros(1)
    elif damage == "shape":
        state[first] = state[first][:1]
    else:
        del state["reference." + first]
    before = {name: tensor.clone() for name, tensor in policy.state().items()}
    with pytest.raises(ModelError, match="not of this model"):
        policy.load_state(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state().items())


def test_a_state_without_a_reference_has_none() -> None:
    policy = make_policy("llama", lora=lora_of("llama"))
    state = {name: tensor.clone() for name, tensor in policy.state().items()}
    policy.freeze_reference()
    policy.load_state(state)
    assert policy.state().keys() == state.keys()


def test_whole_training_reaches_every_weight_once_the_tied_head_with_its_embedding() -> None:
    policy = make_policy("qwen3")
    assert policy.head_weight is policy.base.get_input_embeddings().weight
    found = gradients(policy, policy.logprobs(make_batch(), temperature=1.0).logprobs.sum())
    assert found.keys() == policy.trainable().keys() == dict(policy.model.named_parameters()).keys()
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in found.values())
