"""Each loss against numbers worked out by hand, with its gradient; a wrong formula each has to fail the same check."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from reasoner.config import build
from reasoner.errors import ConfigError
from reasoner.grpo import losses
from reasoner.grpo.losses import Bnpo, Cispo, Dapo, DrGrpo, Gmpo, Grpo, Gspo, Loss, LossInputs, Nll, Sapo, reduce
from reasoner.update import LossOutput, StepCounts

CONF = Path(__file__).parents[2] / "conf" / "loss"


def make_inputs(
    ratios: Sequence[float],
    advantages: Sequence[float],
    sequence: Sequence[int],
    *,
    logprobs: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> LossInputs:
    """Inputs with these ratios exp(logprobs - old); the leaf to differentiate is `.logprobs`."""
    current = torch.tensor(logprobs or [-1.0] * len(ratios), dtype=dtype)
    old = current - torch.tensor(ratios, dtype=dtype).log()
    ones = torch.ones_like(current)
    return LossInputs(
        logprobs=current.requires_grad_(),
        old_logprobs=old,
        sampling_logprobs=old,
        advantages=torch.tensor(advantages, dtype=dtype),
        weights=ones if weights is None else torch.tensor(weights, dtype=dtype),
        entropy=ones,
        sequence=torch.tensor(sequence),
        num_sequences=max(sequence) + 1,
    )


def gradient(loss: Loss, inputs: LossInputs) -> tuple[LossOutput, Tensor]:
    output = loss(inputs)
    (grad,) = torch.autograd.grad(output.sum, inputs.logprobs)
    return output, grad


def by_hand() -> LossInputs:
    """Two completions: tokens 0 and 1 with A = 1, token 2 with A = -2."""
    return make_inputs(
        [1.5, 0.9, 1.3], [1.0, 1.0, -2.0], [0, 0, 1], logprobs=[-1.0, -2.0, -0.5], weights=[1.0, 0.5, 2.0]
    )


def check(loss: Loss, normalizer: str, value: float, grads: Sequence[float]) -> None:
    output, grad = gradient(loss, by_hand())
    assert output.normalizer == normalizer
    assert output.sum.item() == pytest.approx(value, abs=1e-6)
    assert grad.tolist() == pytest.approx(grads, abs=1e-6)


def wrong(formula: Callable[[LossInputs, Tensor], Tensor], normalizer: str) -> Loss:
    """A loss from a wrong per-token formula (inputs, ratio) -> terms."""

    def loss(inputs: LossInputs) -> LossOutput:
        terms = formula(inputs, (inputs.logprobs - inputs.old_logprobs).exp()) * inputs.weights
        return LossOutput(reduce(terms, inputs, normalizer), normalizer, {})

    return loss


@dataclass(frozen=True)
class GspoBySum(Gspo):
    def log_ratio(self, inputs: LossInputs) -> Tensor:
        return inputs.sum_by_sequence(inputs.logprobs - inputs.old_logprobs)[inputs.sequence]


def optimistic(inputs: LossInputs, ratio: Tensor) -> Tensor:
    """max where PPO has min."""
    return -torch.maximum(ratio * inputs.advantages, ratio.clamp(0.8, 1.2) * inputs.advantages)


def cispo_that_stops(inputs: LossInputs, ratio: Tensor) -> Tensor:
    """The gradient goes through the clipped ratio in place of the logprob."""
    return -ratio.clamp(max=1.2) * inputs.advantages * inputs.logprobs.detach()


def gmpo_two_sided(inputs: LossInputs, ratio: Tensor) -> Tensor:
    """Clipped on both sides whatever the sign of A, and after the mean."""
    mean = inputs.mean_by_sequence(ratio.log()).clamp(-0.4, 0.4)
    return -inputs.advantages * mean.exp()[inputs.sequence]


# Clipped at 0.8 and 1.2, the terms -min(r A, clip(r) A) w of the three tokens are
#   0:  r A = 1.5 > 1.2, so -1.2 x 1            = -1.20   clipped, gradient 0
#   1:  0.9 lies inside, so -0.9 x 0.5          = -0.45   gradient -r A w = -0.45
#   2:  r A = -2.6 < -2.4, so 2.6 x 2           =  5.20   gradient -r A w =  5.20
# sequences: (-1.20 - 0.45) / 2 + 5.20 = 4.375, gradients of completion 0 halved; tokens, constant: 3.55.
# dapo's 1.28: -1.28 - 0.45 + 5.20 = 3.47.
# gspo: s = sqrt(1.5 x 0.9) = 1.1618950 and 1.3; mean w = 0.75 and 2.
#   clip 0.2: -1.1618950 x 0.75 + 2.6 x 2 = 4.3285787; each token of completion 0: -1.1618950 x 0.75 / 2 = -0.4357106
#   token level: -s w_t / 2 = -0.5809475, -0.2904738
#   the paper's clip: s0 held at 1.0004: -1.0004 x 0.75 + 5.2 = 4.4497, gradient 0
# cispo, weight capped at 1.2: -clip(r) A l w = 1.2, 0.9 x 2 x 0.5 = 0.9, -(1.2 x 2 x 0.5 x 2) = -2.4
#   gradient -clip(r) A w
# sapo: -4 sigmoid(0.5) = -2.4898373; -4 sigmoid(-0.1) x 0.5 = -0.9500416; (4 / 1.05) sigmoid(0.315) x 2 x 2 = 8.8092226
#   (-2.4898373 - 0.9500416) / 2 + 8.8092226 = 7.0892832
#   gradient -4 sigmoid (1 - sigmoid) r A w:
#   -4 x 0.2350037 x 1.5 / 2, -4 x 0.2493760 x 0.9 x 0.5 / 2, 4 x 0.2438996 x 1.3 x 4
# gmpo: mean of (min(ln 1.5, 0.4), ln 0.9) = (0.4 - 0.1053605) / 2 = 0.1473197
#   -e^0.1473197 x 0.75 + 2 x 1.3 x 2 = 4.3309568
#   gradients 0 (clipped), -1.1587242 x 0.75 / 2 = -0.4345216, 5.2
# nll: 1 x 1 + 2 x 0.5 + 0.5 x 2 = 3
CASES = {
    "grpo": (Grpo(), "sequences", 4.375, [0, -0.225, 5.2], wrong(optimistic, "sequences")),
    "dr_grpo": (DrGrpo(), "constant", 3.55, [0, -0.45, 5.2], Grpo()),
    "dapo": (Dapo(), "tokens", 3.47, [0, -0.45, 5.2], Bnpo()),
    "bnpo": (Bnpo(), "tokens", 3.55, [0, -0.45, 5.2], Dapo()),
    "gspo": (Gspo(), "sequences", 4.4497, [0, 0, 5.2], Grpo()),
    "gspo, wide": (Gspo(0.2, 0.2), "sequences", 4.3285787, [-0.4357106, -0.4357106, 5.2], GspoBySum(0.2, 0.2)),
    "gspo, token": (
        Gspo(0.2, 0.2, token_level=True),
        "sequences",
        4.3285787,
        [-0.5809475, -0.2904738, 5.2],
        Gspo(0.2, 0.2),
    ),
    "cispo": (Cispo(clip_high=0.2), "tokens", -0.3, [-1.2, -0.45, 4.8], wrong(cispo_that_stops, "tokens")),
    "sapo": (Sapo(), "sequences", 7.0892832, [-0.7050111, -0.2244384, 5.0731117], Sapo(1.05, 1.0)),
    "gmpo": (Gmpo(), "sequences", 4.3309568, [0, -0.4345216, 5.2], wrong(gmpo_two_sided, "sequences")),
    "nll": (Nll(), "tokens", 3.0, [-1, -0.5, -2], wrong(lambda inputs, _: inputs.logprobs, "tokens")),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_by_hand(name):
    loss, normalizer, value, grads, mutant = CASES[name]
    check(loss, normalizer, value, grads)
    with pytest.raises(AssertionError):
        check(mutant, normalizer, value, grads)


# C12: value of the objective min(...) and the gradient of the loss, clip 0.2
@pytest.mark.parametrize(
    ("advantage", "ratio", "options", "value", "grad"),
    [
        (-1, 0.5, {}, -0.8, 0),
        (-1, 1.3, {}, -1.3, 1.3),
        (-1, 10, {}, -10, 10),
        (-1, 10, {"dual_clip": 3}, -3, 0),
        (-1, 10, {"clip_max": 4}, -4, 0),
        (-1, 2, {"dual_clip": 3, "clip_max": 4}, -2, 2),
        (1, 1.5, {}, 1.2, 0),
        (1, 1.5, {"dual_clip": 3, "clip_max": 4}, 1.2, 0),
        (1, 0.5, {"dual_clip": 3, "clip_max": 4}, 0.5, -0.5),
        (1, 10, {"dual_clip": 3}, 1.2, 0),
    ],
)
@pytest.mark.parametrize("kind", [Grpo, Bnpo, DrGrpo, Gspo])
def test_c12_clip_by_sign_of_the_advantage(kind, advantage, ratio, options, value, grad):
    loss = kind(clip_low=0.2, clip_high=0.2, **options)
    output, grads = gradient(loss, make_inputs([ratio], [advantage], [0]))
    assert output.sum.item() == pytest.approx(-value)
    assert grads.item() == pytest.approx(grad, abs=1e-12)


def test_c12_dual_clip_bounds_the_loss_and_clip_max_the_ratio():
    """With A = -2 the two differ from each other only in the number they are given: 3 |A| = 6 and 4 |A| = 8."""
    inputs = make_inputs([10], [-2], [0])
    assert Grpo(dual_clip=3)(inputs).sum.item() == pytest.approx(6)
    assert Grpo(clip_max=4)(inputs).sum.item() == pytest.approx(8)
    assert Grpo(clip_max=4, dual_clip=3)(inputs).sum.item() == pytest.approx(6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "grad"),
    [(1, 2, math.exp(0.4), 0), (1, 0.3, 0.3, -0.3), (-1, 0.3, -math.exp(-0.4), 0), (-1, 2, -2, 2)],
)
def test_c12_gmpo_clips_on_the_pessimistic_side_only(advantage, ratio, value, grad):
    output, grads = gradient(Gmpo(), make_inputs([ratio], [advantage], [0]))
    assert output.sum.item() == pytest.approx(-value)
    assert grads.item() == pytest.approx(grad, abs=1e-12)


def test_c8_length_bias():
    """Equal A, 10 and 100 tokens: a token weighs 1/10 and 1/100 in grpo, the same in dr_grpo and dapo."""
    inputs = make_inputs([1.0] * 110, [1.0] * 110, [0] * 10 + [1] * 100)
    _, grpo = gradient(Grpo(), inputs)
    assert grpo[0].item() == pytest.approx(-1 / 10) and grpo[10].item() == pytest.approx(-1 / 100)
    for loss in (DrGrpo(), Dapo()):
        assert gradient(loss, inputs)[1].tolist() == pytest.approx([-1.0] * 110)


def test_c11_sequence_ratio_is_the_mean():
    """512 tokens x 0.01: 1.0101 by mean, 167.3 by sum; every token's gradient carries 1/512."""
    inputs = make_inputs([math.exp(0.01)] * 512, [1.0] * 512, [0] * 512)
    output, grads = gradient(Gspo(0.2, 0.2), inputs)
    assert output.sum.item() == pytest.approx(-1.01005, abs=1e-5)
    assert grads.tolist() == pytest.approx([-1.01005 / 512] * 512, rel=1e-5)
    assert GspoBySum(0.2, 1e3)(inputs).sum.item() == pytest.approx(-167.3, abs=0.1)


def test_b1_b2_normalizers():
    """One token with nll 2, nine with nll 1: 11/10 by tokens, (2 + 1)/2 by sequences, 11/(2 x 10) by the constant."""
    inputs = make_inputs([1.0] * 10, [0.0] * 10, [0] + [1] * 9)
    values = torch.tensor([2.0] + [1.0] * 9, dtype=torch.float64)
    counts = StepCounts(tokens=10, sequences=2, groups=1, constant=2 * 10)
    means = {n: reduce(values, inputs, n).item() / counts.of(n) for n in ("tokens", "sequences", "constant")}
    assert means == pytest.approx({"tokens": 1.1, "sequences": 1.5, "constant": 0.55})
    # B1: cut between the sequences, each piece divided by the whole step's count
    pieces = (make_inputs([1.0], [0.0], [0], logprobs=[-2.0]), make_inputs([1.0] * 9, [0.0] * 9, [0] * 9))
    assert sum(Nll()(piece).sum.item() / counts.of("tokens") for piece in pieces) == pytest.approx(1.1)


def test_c15_as_many_sequences_as_tokens():
    """B == M == 3, distinct numbers: -(1 x 0.9 + 2 x 1.0 - 3 x 1.1) = 0.4; a [B, M] broadcast would give 0."""
    output, grads = gradient(Grpo(), make_inputs([0.9, 1.0, 1.1], [1.0, 2.0, -3.0], [0, 1, 2]))
    assert output.sum.shape == () and output.sum.item() == pytest.approx(0.4)
    assert grads.tolist() == pytest.approx([-0.9, -2.0, 3.3])


@pytest.mark.parametrize("field", ["old_logprobs", "advantages", "weights", "entropy", "sampling_logprobs"])
@pytest.mark.parametrize("change", [lambda x: x[:, None], lambda x: x[:2], lambda x: x.float()])
def test_c15_c20_shapes_and_dtypes_are_asserted(field, change):
    """Nothing that would broadcast, and no mixture of dtypes, gets into a loss."""
    inputs = by_hand()
    values = {f.name: getattr(inputs, f.name) for f in fields(LossInputs)}
    with pytest.raises(AssertionError):
        LossInputs(**{**values, field: change(values[field])})


def test_c20_half_precision_is_refused():
    inputs = by_hand()
    values = {f.name: getattr(inputs, f.name) for f in fields(LossInputs)}
    half = {k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}
    with pytest.raises(AssertionError, match="float32"):
        LossInputs(**half)


EXTREMES = {  # gradients at log-ratio +100 with A = 1, +100 with A = -1, -100 with A = 1, -100 with A = -1
    Grpo(): [0, 0, 0, 0],
    DrGrpo(): [0, 0, 0, 0],
    Dapo(): [0, 0, 0, 0],
    Bnpo(dual_clip=3): [0, 0, 0, 0],
    Bnpo(clip_max=4): [0, 0, 0, 0],
    Gspo(): [0, 0, 0, 0],
    Gspo(token_level=True): [0, 0, 0, 0],
    Cispo(): [-5, 5, -math.exp(-20), math.exp(-20)],
    Cispo(clip_low=0.5): [-5, 5, -0.5, 0.5],
    Sapo(): [0, 0, 0, 0],
    Gmpo(): [0, 0, 0, 0],
    Nll(): [-1, -1, -1, -1],
}


@pytest.mark.parametrize("loss", EXTREMES, ids=repr)
def test_c16_log_ratios_of_100_in_float32(loss):
    """A clipped token has gradient exactly 0, cispo keeps its capped weight, and nothing is NaN or infinite."""
    inputs = extreme_inputs()
    output, grads = gradient(loss, inputs)
    assert output.sum.isfinite() and all(value.isfinite() for value in output.metrics.values())
    exact = EXTREMES[loss]
    assert [g == 0 for g in grads.tolist()] == [g == 0 for g in exact]
    assert grads.tolist() == pytest.approx(exact, rel=1e-6)


def extreme_inputs() -> LossInputs:
    current = torch.tensor([-0.1, -0.1, -100.1, -100.1], requires_grad=True)
    old = torch.tensor([-100.1, -100.1, -0.1, -0.1])
    ones = torch.ones(4)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    return LossInputs(current, old, old, advantages, ones, ones, torch.arange(4), 4)


def test_c16_the_unbounded_formula_gives_nan():
    """0 x inf in the backward pass: what the bound on the exponent is there for."""

    def unbounded(inputs: LossInputs) -> LossOutput:
        ratio = (inputs.logprobs - inputs.old_logprobs).exp()
        gain = torch.minimum(ratio * inputs.advantages, ratio.clamp(0.8, 1.2) * inputs.advantages)
        return LossOutput(-gain.sum(), "tokens", {})

    assert gradient(unbounded, extreme_inputs())[1].isnan().any()


def test_a_ratio_in_debris_does_not_outweigh_its_sequence():
    """Gmpo: of ten tokens one is 100 nats off; at most e^(20/10) reaches the other nine, not e^(100/10)."""
    inputs = make_inputs([math.exp(100)] + [1.0] * 9, [-1.0] * 10, [0] * 10)
    _, grads = gradient(Gmpo(), inputs)
    assert grads[0].item() == 0
    assert grads[1].item() == pytest.approx(math.exp(2) / 10)


def test_c21_clip_share_counts_only_where_the_clip_changed_the_loss():
    """Ratios 1.5 and 0.5, each with A = 1, -1 and 0: one of three is clipped on either side."""
    inputs = make_inputs([1.5] * 3 + [0.5] * 3, [1, -1, 0, 1, -1, 0], [0, 1, 2, 3, 4, 5])
    for loss in (Grpo(), Gspo(), Gmpo()):
        metrics = loss(inputs).metrics
        assert (metrics["clipped_high_share"].item(), metrics["clipped_low_share"].item()) == (1, 1)
        assert metrics["ratio_max"].item() == pytest.approx(1.5)
    # clip_max and dual_clip change the loss of token 1 as well; cispo's weight is clipped for either sign of A
    assert Grpo(clip_max=1.4)(inputs).metrics["clipped_high_share"].item() == 2
    assert Grpo(dual_clip=1.4)(inputs).metrics["clipped_high_share"].item() == 2
    cispo = Cispo(clip_low=0.2, clip_high=0.2)(inputs).metrics
    assert (cispo["clipped_high_share"].item(), cispo["clipped_low_share"].item()) == (2, 2)
    # a clipped completion counts with all its tokens
    assert Gspo()(make_inputs([1.5] * 3, [1] * 3, [0] * 3)).metrics["clipped_high_share"].item() == 3


def test_metrics_carry_no_graph():
    for loss in (Grpo(), Gspo(), Cispo(), Sapo(), Gmpo(), Nll()):
        assert not any(value.requires_grad for value in loss(by_hand()).metrics.values())


def test_gspo_variants_agree_where_weights_do():
    inputs = make_inputs([1.1, 0.8, 1.3, 0.7, 1.2], [1, 1, 1, -2, -2], [0, 0, 0, 1, 1])
    sequence, token = (gradient(Gspo(0.5, 0.5, token_level=level), inputs)[1] for level in (False, True))
    assert token.tolist() == pytest.approx(sequence.tolist())


def test_supervised_inputs_are_neutral():
    """SFT: Nll over the trained tokens; the same inputs in any policy loss have ratio 1 and w 1."""
    logprobs = torch.tensor([-2.0, -1.0], requires_grad=True)
    inputs = LossInputs.supervised(logprobs, torch.zeros(2), torch.tensor([0, 1]), 2)
    output, grads = gradient(Nll(), inputs)
    assert output.sum.item() == 3.0 and output.metrics["nll"].item() == 3.0 and grads.tolist() == [-1.0, -1.0]
    assert gradient(Grpo(), inputs)[1].tolist() == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Grpo, {"clip_low": 1.0}, "grpo.loss.clip_low=1.0: give a number of at least 0 and below 1"),
        (Dapo, {"clip_high": -0.1}, "grpo.loss.clip_high=-0.1"),
        (Gspo, {"clip_high": math.nan}, "grpo.loss.clip_high=nan"),
        (Grpo, {"clip_max": 1.1}, "grpo.loss.clip_max=1.1: give a number of at least 1.2"),
        (Grpo, {"dual_clip": 0.5}, "grpo.loss.dual_clip=0.5"),
        (Cispo, {"clip_low": 2}, "grpo.loss.clip_low=2"),
        (Cispo, {"clip_high": "4"}, "grpo.loss.clip_high='4'"),
        (Sapo, {"tau_negative": 0}, "grpo.loss.tau_negative=0"),
        (Gmpo, {"clip_low": True}, "grpo.loss.clip_low=True"),
    ],
)
def test_values_out_of_range_are_named(kind, options, message):
    with pytest.raises(ConfigError) as error:
        kind(**options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo", "gmpo"])
def test_conf_builds_the_loss_with_its_defaults(name):
    """A conf says every field, with the class's own default, and lands in grpo.loss."""
    path = CONF / f"{name}.yaml"
    assert path.read_text().splitlines()[0] == "# @package grpo.loss"
    node = OmegaConf.to_container(OmegaConf.load(path))
    kind = getattr(losses, {"dr_grpo": "DrGrpo"}.get(name, name.capitalize()))
    assert node.keys() == {"_target_", *(f.name for f in fields(kind))}
    assert build(node) == kind()


def test_conf_with_a_wrong_value_is_refused_in_one_line():
    with pytest.raises(ConfigError) as error:
        build({"_target_": "reasoner.grpo.losses.Dapo", "clip_low": 2})
    assert "grpo.loss.clip_low=2" in str(error.value) and "\n" not in str(error.value)
