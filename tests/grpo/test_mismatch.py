"""Importance weights of the engine mismatch, by hand, and what is always measured."""

import math
from dataclasses import replace

import pytest
import torch

from reasoner.errors import ConfigError
from reasoner.grpo.losses import Grpo, LossInputs
from reasoner.grpo.mismatch import Mismatch

RATIOS = [1.0, 1.05, 3.0, 0.25, 1.2]  # exp(old - sampling); tokens 0-2 are one completion, 3-4 another


def make_inputs(ratios=RATIOS, sequence=(0, 0, 0, 1, 1), dtype=torch.float64) -> LossInputs:
    sampling = torch.full((len(ratios),), -1.0, dtype=dtype)
    old = sampling + torch.tensor(ratios, dtype=dtype).log()
    ones = torch.ones_like(old)
    current = old.clone().requires_grad_()
    return LossInputs(current, old, sampling, ones, ones, ones, torch.tensor(sequence), max(sequence) + 1)


@pytest.mark.parametrize(
    ("mode", "level", "weights", "capped"),
    [
        ("off", "token", [1, 1, 1, 1, 1], 0),
        ("off", "sequence", [1, 1, 1, 1, 1], 0),
        ("truncate", "token", [1, 1.05, 2, 0.25, 1.2], 1),
        ("mask", "token", [1, 1.05, 0, 0, 1.2], 2),
        # products: 1 x 1.05 x 3 = 3.15 and 0.25 x 1.2 = 0.3
        ("truncate", "sequence", [2, 2, 2, 0.3, 0.3], 3),
        ("mask", "sequence", [0, 0, 0, 0, 0], 5),
    ],
)
def test_weights_by_hand(mode, level, weights, capped):
    inputs, metrics = Mismatch(mode, level, cap=2.0)(make_inputs())
    assert inputs.weights.tolist() == pytest.approx(weights)
    assert metrics["mismatch_capped_share"].item() == capped


def test_mask_keeps_its_bounds():
    """w inside [1/cap, cap]: 0.3 and 3.15 stay with cap 4, unclipped."""
    inputs, metrics = Mismatch("mask", "sequence", cap=4.0)(make_inputs())
    assert inputs.weights.tolist() == pytest.approx([3.15, 3.15, 3.15, 0.3, 0.3])
    assert metrics["mismatch_capped_share"].item() == 0


@pytest.mark.parametrize("mode", ["off", "truncate", "mask"])
def test_d10_the_gap_is_measured_in_every_mode(mode):
    """Sums over tokens: |ln w|, w, and how many of [1, 1.05, 3, 0.25, 1.2] are outside [0.9, 1.1]."""
    _, metrics = Mismatch(mode)(make_inputs())
    gaps = [abs(math.log(ratio)) for ratio in RATIOS]
    assert metrics["logprob_gap_mean"].item() == pytest.approx(sum(gaps))
    assert metrics["logprob_gap_max"].item() == pytest.approx(math.log(4))
    assert metrics["mismatch_ratio_mean"].item() == pytest.approx(sum(RATIOS))
    assert metrics["mismatch_outside_share"].item() == 3
    assert not any(value.requires_grad for value in metrics.values())


def test_c2_the_ratio_and_the_weight_are_apart():
    """old = sampling + 0.1 and the policy unmoved: r is 1, w is e^0.1; taken together they would meet the clip."""
    base = make_inputs([math.exp(0.1)] * 3, (0, 0, 0))
    inputs, _ = Mismatch("truncate")(base)
    output = Grpo(clip_low=0.05, clip_high=0.05)(inputs)
    assert output.metrics["ratio_max"].item() == pytest.approx(1.0)
    assert inputs.weights.tolist() == pytest.approx([math.exp(0.1)] * 3)
    (grad,) = torch.autograd.grad(output.sum, base.logprobs)
    assert grad.tolist() == pytest.approx([-math.exp(0.1) / 3] * 3)
    confused = replace(base, old_logprobs=base.sampling_logprobs)
    assert Grpo(clip_low=0.05, clip_high=0.05)(confused).metrics["clipped_high_share"].item() == 3


def test_the_weight_is_detached():
    """Even where old is the current logprob itself, as in a step with one update."""
    base = make_inputs()
    inputs, _ = Mismatch("truncate", cap=100.0)(replace(base, old_logprobs=base.logprobs))
    assert not inputs.weights.requires_grad


@pytest.mark.parametrize("mode", ["off", "truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_c16_gaps_of_100_in_float32(mode, level):
    current = torch.tensor([-0.1, -100.1, -0.1], requires_grad=True)
    sampling = torch.tensor([-100.1, -0.1, -0.1])
    ones = torch.ones(3)
    inputs = LossInputs(current, current.detach(), sampling, ones, ones, ones, torch.tensor([0, 1, 2]), 3)
    weighted, metrics = Mismatch(mode, level)(inputs)
    (grad,) = torch.autograd.grad(Grpo()(weighted).sum, current)
    assert grad.isfinite().all() and all(value.isfinite() for value in metrics.values())
    assert grad.tolist() == pytest.approx(
        {"off": [-1, -1, -1], "truncate": [-2, 0, -1], "mask": [0, 0, -1]}[mode], abs=1e-6
    )


def test_a_cap_below_one_is_refused():
    with pytest.raises(ConfigError, match=r"grpo\.mismatch_cap=0\.5"):
        Mismatch(cap=0.5)
