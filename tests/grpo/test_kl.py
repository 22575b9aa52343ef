"""KL estimators: values by hand, gradients by exact expectation over a softmax, and the form inside the reward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reasoner.grpo.batch import pack
from reasoner.grpo.kl import ESTIMATORS, k1, k2, k3, penalized, sequence_kl
from reasoner.types import Completion, Group, Prompt, Score

# C9: the policy p and the reference f for which
#   the gradient of KL(p || f) in p's logits, p_i (d_i - KL), is [.600, -.060, -.066, -.474]
#   and that of KL(f || p), p_i - f_i,                        is [.563, .046, -.325, -.284]
POLICY = torch.tensor([0.63989, 0.10248, 0.01544, 0.24219], dtype=torch.float64)
REFERENCE = torch.tensor([0.07689, 0.05648, 0.34044, 0.52619], dtype=torch.float64)
FORWARD = [0.600, -0.060, -0.066, -0.474]
BACKWARD = [0.563, 0.046, -0.325, -0.284]


def expected_gradient(estimator: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    """Gradient in the logits of the estimate as a loss, averaged exactly over what the policy would sample."""
    logits = POLICY.log().requires_grad_()
    estimates = estimator(logits.log_softmax(0), REFERENCE.log())
    (grad,) = torch.autograd.grad((POLICY * estimates).sum(), logits)
    return grad.tolist()


@pytest.mark.parametrize(("name", "vector"), [("k1", [0.0] * 4), ("k2", FORWARD), ("k3", BACKWARD)])
def test_c9_gradients(name, vector):
    """k1 teaches nothing, k2 is exact, k3 is the other direction's; each fails the others' vector."""
    assert expected_gradient(ESTIMATORS[name]) == pytest.approx(vector, abs=6e-4)
    for other in {"k1", "k2", "k3"} - {name}:
        with pytest.raises(AssertionError):
            assert expected_gradient(ESTIMATORS[other]) == pytest.approx(vector, abs=6e-4)


def test_c9_vectors_are_those_of_the_divergences():
    """The two vectors from their definitions, so that the table above is no number of its own."""
    logits = POLICY.log().requires_grad_()
    logp, logf = logits.log_softmax(0), REFERENCE.log()
    (forward,) = torch.autograd.grad((logp.exp() * (logp - logf)).sum(), logits, retain_graph=True)
    (backward,) = torch.autograd.grad((REFERENCE * (logf - logp)).sum(), logits)
    assert forward.tolist() == pytest.approx(FORWARD, abs=6e-4)
    assert backward.tolist() == pytest.approx(BACKWARD, abs=6e-4)


def test_c9_k1_inside_the_reward_is_exact():
    """-d as a reward, with a baseline, through the policy gradient: minus the gradient of KL(p || f)."""
    logits = POLICY.log().requires_grad_()
    logp = logits.log_softmax(0)
    reward = -k1(logp, REFERENCE.log()).detach()
    advantage = reward - (POLICY * reward).sum()
    (grad,) = torch.autograd.grad((POLICY * advantage * logp).sum(), logits)
    assert grad.tolist() == pytest.approx([-g for g in FORWARD], abs=6e-4)


def values_by_hand(k2: Callable, k3: Callable) -> None:
    """d = 0.5: 0.125, e^-0.5 + 0.5 - 1 = 0.1065307. d = -5: 12.5, e^5 - 5 - 1 = 142.4131591, slope 1 - e^5."""
    logprobs = torch.tensor([-1.0, -6.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    assert k1(logprobs, reference).tolist() == [0.5, -5.0]
    assert k2(logprobs, reference).tolist() == pytest.approx([0.125, 12.5])
    estimates = k3(logprobs, reference)
    assert estimates.tolist() == pytest.approx([0.1065307, 142.4131591], abs=1e-6)
    assert torch.autograd.grad(estimates.sum(), logprobs)[0][1].item() == pytest.approx(-147.4131591)


def test_values_by_hand():
    values_by_hand(k2, k3)
    with pytest.raises(AssertionError):
        values_by_hand(lambda logp, ref: (logp - ref).square(), k3)
    with pytest.raises(AssertionError):
        values_by_hand(k2, lambda logp, ref: (logp - ref).exp() - (logp - ref) - 1)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_c10_equal_policies_have_no_kl(name):
    """Exactly 0, and no gradient but k1's own, at the first step after the reference was frozen."""
    logprobs = torch.tensor([-0.3, -7.1], requires_grad=True)
    estimates = ESTIMATORS[name](logprobs, logprobs.detach())
    assert estimates.tolist() == [0.0, 0.0]
    if name != "k1":
        assert torch.autograd.grad(estimates.sum(), logprobs)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_c16_log_ratios_of_100_in_float32(name):
    """Finite, and without gradient beyond +-20."""
    logprobs = torch.tensor([-0.1, -100.1], requires_grad=True)
    estimates = ESTIMATORS[name](logprobs, torch.tensor([-100.1, -0.1]))
    assert estimates.isfinite().all()
    assert torch.autograd.grad(estimates.sum(), logprobs)[0].tolist() == [0.0, 0.0]


def test_k3_keeps_its_digits_near_zero():
    """d = 1e-4 in float32: d^2 / 2 = 5e-9, of which exp(-d) + d - 1 leaves nothing."""
    d = torch.tensor([1e-4])
    assert k3(d, torch.zeros(1)).item() == pytest.approx(5e-9, rel=1e-2)
    assert (torch.exp(-d) + d - 1).item() != pytest.approx(5e-9, rel=1e-2)


def make_groups() -> list[Group]:
    """Two prompts; the first has two completions, one with a token that a tool wrote."""
    one, two = (Prompt(id=i, text="", answer="", columns={}, token_ids=(1, 2)) for i in "ab")
    tool = Completion((3, 4, 5), (True, False, True), (-1.0, 0.0, -1.0), "", "stop", 0, 0)
    cut = Completion((6,), (True,), (-1.0,), "", "length", 0, 0)
    short = Completion((7, 8), (True, True), (-1.0, -1.0), "", "stop", 0, 0)
    failed = Score(0.0, {}, {"accuracy": "hung"})
    return [
        Group(one, (tool, cut), (Score(1.0, {"accuracy": 1.0}), failed)),
        Group(two, (short,), (Score(0.5, {"format": 0.5}),)),
    ]


def test_sequence_kl_by_hand():
    """Sums over sampled tokens only, one number a completion, in order; prompt and tool tokens hold NaN."""
    batch = pack(make_groups())
    nan = float("nan")
    policy = torch.tensor([nan, nan, -1.0, nan, -2.0, nan, nan, -0.5, nan, nan, -1.0, -1.0], requires_grad=True)
    reference = torch.tensor([nan, nan, -1.5, nan, -1.0, nan, nan, -0.75, nan, nan, -1.0, -1.0])
    assert sequence_kl(batch, policy, reference) == [0.5 - 1.0, 0.25, 0.0]


def test_penalized_by_hand():
    """1 - 0.1 x 2 and 0.5 - 0.1 x (-3); the failed one stays failed and carries its own part, not its neighbour's."""
    first, second = penalized(make_groups(), [2.0, 7.0, -3.0], coef=0.1)
    assert first.scores[0].total == pytest.approx(0.8)
    assert first.scores[0].parts == {"accuracy": 1.0, "kl_penalty": -2.0}
    assert first.scores[1].failed and first.scores[1].parts == {"kl_penalty": -7.0}
    assert second.scores[0].total == pytest.approx(0.8)
    assert [group.completions for group in (first, second)] == [group.completions for group in make_groups()]
    with pytest.raises(AssertionError):
        penalized(make_groups(), [2.0, -3.0], coef=0.1)
