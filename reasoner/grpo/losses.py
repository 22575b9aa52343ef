"""Every policy loss, and SFT's, as plain torch over [M] vectors: the trained tokens of a micro-batch.

The tokens were selected, never multiplied by a mask (NaN * 0 = NaN). A loss sums and names what the step divides by, so
that cutting a batch changes no gradient. In the formulas l = logprob now, o = at the start of the step, A = advantage,
w = the detached importance weight of the engine mismatch, r = exp(l - o). Left out: the KL term (kl.py) and the entropy
bonus, which the trainer adds with the same `reduce`.

l - o (in Gspo its mean) is held within +-20 before exp, with gradient 0 beyond: e^20 = 4.9e8 and its products are
finite in float32. On the side where a loss clips, 0 is its gradient anyway; on the other such a ratio is numerical
debris, and following it would let one token's gradient erase the batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from reasoner.errors import ConfigError
from reasoner.update import LossOutput, Normalizer

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True, eq=False)
class LossInputs:
    """What a loss sees of a micro-batch of B sequences with M trained tokens, M >= 1; all float32 or all float64.

    >>> LossInputs(logprobs=tensor([-0.2, -1.4, -0.7]), old_logprobs=tensor([-0.3, -1.4, -0.6]),
    ...            sampling_logprobs=tensor([-0.3, -1.4, -0.6]), advantages=tensor([1.5, 1.5, -0.5]),
    ...            weights=tensor([1.0, 1.0, 1.0]), entropy=tensor([0.5, 1.1, 0.9]), sequence=tensor([0, 0, 1]),
    ...            num_sequences=2)
    """

    logprobs: Tensor  # [M] l, with gradient
    old_logprobs: Tensor  # [M] o
    sampling_logprobs: Tensor  # [M] the engine's
    advantages: Tensor  # [M], each sequence's own on all of its tokens
    weights: Tensor  # [M] w; ones where the mismatch is not corrected
    entropy: Tensor  # [M] nats, with gradient
    sequence: Tensor  # [M] int64, 0..B-1: which sequence a token belongs to
    num_sequences: int  # B

    def __post_init__(self) -> None:
        shape, dtype = self.logprobs.shape, self.logprobs.dtype
        vectors = (self.old_logprobs, self.sampling_logprobs, self.advantages, self.weights, self.entropy)
        assert len(shape) == 1 and shape[0] > 0, f"a micro-batch trains at least one token, got {list(shape)}"
        assert dtype in (torch.float32, torch.float64), f"logprobs, ratios and sums need float32, got {dtype}"
        assert all(x.shape == shape and x.dtype == dtype for x in vectors), (
            "every vector has one number a trained token"
        )
        assert self.sequence.shape == shape and self.sequence.dtype == torch.int64

    @classmethod
    def supervised(cls, logprobs: Tensor, entropy: Tensor, sequence: Tensor, num_sequences: int) -> Self:
        """Inputs for Nll. Nothing was sampled: old and sampling logprobs are the current, advantages and weights 1."""
        current, ones = logprobs.detach(), torch.ones_like(logprobs)
        return cls(logprobs, current, current, ones, ones, entropy, sequence, num_sequences)

    @property
    def lengths(self) -> Tensor:
        """Trained tokens of each sequence: int64 [B]."""
        return self.sum_by_sequence(torch.ones_like(self.sequence))  # bincount would wait for the device

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """[M] -> [B], 0 for a sequence without trained tokens."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence, values)

    def mean_by_sequence(self, values: Tensor) -> Tensor:
        """[M] -> [B], 0 for a sequence without trained tokens."""
        return self.sum_by_sequence(values) / self.lengths.clamp(min=1)


Loss = Callable[[LossInputs], LossOutput]


def reduce(values: Tensor, inputs: LossInputs, normalizer: Normalizer) -> Tensor:
    """The scalar sum of per-token values [M] that the step divides by its count of `normalizer`.

    "sequences": each sequence's mean, summed. "tokens" and "constant": the plain sum. KL and entropy terms take the
    loss's own normalizer.
    """
    if normalizer == "sequences":
        values = values / inputs.lengths[inputs.sequence]
    return values.sum()


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp with its argument held within +-MAX_LOG_RATIO; the gradient is 0 beyond."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@dataclass(frozen=True)
class ClippedLoss:
    """The clipped surrogate that Grpo, DrGrpo, Dapo, Bnpo and Gspo share; they differ in r and in the normalizer.

    A token's term is -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) w: PPO, arXiv:1707.06347 eq. 7. For A < 0 it
    grows with r without bound, unless one of these is set (both are off by default):

    - `clip_max`: min(r, clip_max) A in place of r A; two-sided clipping, arXiv:2505.07291. Changes nothing for A > 0.
    - `dual_clip`: the term is at most dual_clip |A|; arXiv:1912.09729.

    Metrics: `clipped_low_share` and `clipped_high_share` count the tokens whose loss a clip changed, r too low or too
    high; `ratio_max`. Raises ConfigError on a value out of its range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_max: float | None = None
    dual_clip: float | None = None
    normalizer: ClassVar[Normalizer]

    def __post_init__(self) -> None:
        _check_range("clip_low", self.clip_low, 0, 1)
        _check_range("clip_high", self.clip_high, 0)
        if self.clip_max is not None:
            _check_range("clip_max", self.clip_max, 1 + self.clip_high)
        if self.dual_clip is not None:
            _check_range("dual_clip", self.dual_clip, 1)

    def log_ratio(self, inputs: LossInputs) -> Tensor:
        """log r of each token: [M]."""
        return inputs.logprobs - inputs.old_logprobs

    def __call__(self, inputs: LossInputs) -> LossOutput:
        advantages = inputs.advantages
        ratio = bounded_exp(self.log_ratio(inputs))
        free = (ratio if self.clip_max is None else ratio.clamp(max=self.clip_max)) * advantages
        held = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages
        gain = torch.minimum(free, held)
        if self.dual_clip is not None:
            gain = torch.where(advantages < 0, torch.maximum(gain, self.dual_clip * advantages), gain)
        ceiling = min(x for x in (self.clip_max, self.dual_clip, math.inf) if x is not None)
        metrics = _clip_metrics(
            ratio,
            low=(advantages < 0) & (ratio < 1 - self.clip_low),
            high=((advantages > 0) & (ratio > 1 + self.clip_high)) | ((advantages < 0) & (ratio > ceiling)),
        )
        return LossOutput(reduce(-gain * inputs.weights, inputs, self.normalizer), self.normalizer, metrics)


@dataclass(frozen=True)
class Grpo(ClippedLoss):
    """The clipped term averaged over its sequence, then over the step's sequences: GRPO, arXiv:2402.03300 eq. 3.

    A token of a long completion weighs less than one of a short completion.
    """

    normalizer: ClassVar[Normalizer] = "sequences"


@dataclass(frozen=True)
class DrGrpo(ClippedLoss):
    """The clipped term summed, divided by sequences x max_completion_tokens: Dr. GRPO, arXiv:2503.20783.

    The paper's advantage is R - mean: set grpo.advantage_scale=none beside it.
    """

    normalizer: ClassVar[Normalizer] = "constant"


@dataclass(frozen=True)
class Dapo(ClippedLoss):
    """The clipped term averaged over the step's tokens, with a higher upper clip: DAPO, arXiv:2503.14476 eq. 8."""

    clip_high: float = 0.28
    normalizer: ClassVar[Normalizer] = "tokens"


@dataclass(frozen=True)
class Bnpo(ClippedLoss):
    """The clipped term averaged over the step's tokens: Dapo with a symmetric clip.

    TRL's `bnpo` averages over the tokens of a micro-batch, so a split changes its gradient; here it can't.
    """

    normalizer: ClassVar[Normalizer] = "tokens"


@dataclass(frozen=True)
class Gspo(ClippedLoss):
    """The clipped term of a whole sequence, r = exp(mean over its tokens of l - o): GSPO, arXiv:2507.18071 eq. 5.

    `token_level`: GSPO-token, section 4.3: r_t has the sequence's value and the gradient of its own l_t. The two have
    equal gradients unless w differs between the tokens of a sequence: then the first weighs the sequence by the mean of
    its w, the second each token by its own. The shares count every token of a clipped sequence.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    token_level: bool = False
    normalizer: ClassVar[Normalizer] = "sequences"

    def log_ratio(self, inputs: LossInputs) -> Tensor:
        mean = inputs.mean_by_sequence(inputs.logprobs - inputs.old_logprobs)[inputs.sequence]
        if self.token_level:
            return mean.detach() + (inputs.logprobs - inputs.logprobs.detach())
        return mean


@dataclass(frozen=True)
class Cispo:
    """-stopgrad(clip(r, 1 - clip_low, 1 + clip_high)) A l w, averaged over tokens: CISPO, arXiv:2506.13585 eq. 4-5.

    The clip bounds a token's weight and never stops its gradient. `clip_low` None: no lower bound, as in the paper. The
    ceiling is 1 + clip_high: 4 here is what TRL calls epsilon_high=5. The shares count the tokens with A != 0 whose
    weight was clipped.
    """

    clip_low: float | None = None
    clip_high: float = 4.0
    normalizer: ClassVar[Normalizer] = "tokens"

    def __post_init__(self) -> None:
        if self.clip_low is not None:
            _check_range("clip_low", self.clip_low, 0, 1)
        _check_range("clip_high", self.clip_high, 0)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio = bounded_exp(inputs.logprobs.detach() - inputs.old_logprobs)
        low, high = 0.0 if self.clip_low is None else 1 - self.clip_low, 1 + self.clip_high
        terms = -ratio.clamp(low, high) * inputs.advantages * inputs.logprobs
        live = inputs.advantages != 0
        metrics = _clip_metrics(ratio, low=live & (ratio < low), high=live & (ratio > high))
        return LossOutput(reduce(terms * inputs.weights, inputs, self.normalizer), self.normalizer, metrics)


@dataclass(frozen=True)
class Sapo:
    """-(4 / tau) sigmoid(tau (r - 1)) A w, averaged over its sequence, then over sequences: SAPO, arXiv:2511.20347.

    A soft clip: at r = 1 the gradient is the surrogate's, and it fades on both sides. tau is `tau_positive` for A > 0,
    else `tau_negative`.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    normalizer: ClassVar[Normalizer] = "sequences"

    def __post_init__(self) -> None:
        for name in ("tau_positive", "tau_negative"):
            _check_range(name, getattr(self, name), 1e-6)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio = bounded_exp(inputs.logprobs - inputs.old_logprobs)
        tau = torch.full_like(ratio, self.tau_negative).masked_fill(inputs.advantages > 0, self.tau_positive)
        terms = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * inputs.advantages
        metrics = {"ratio_max": ratio.detach().max()}
        return LossOutput(reduce(terms * inputs.weights, inputs, self.normalizer), self.normalizer, metrics)


@dataclass(frozen=True)
class Gmpo:
    """-A exp(mean over its tokens of the clipped l - o) w a sequence, averaged over sequences: GMPO, arXiv:2507.20673.

    The clip is pessimistic and works on l - o itself: at most clip_high for A > 0, at least -clip_low for A < 0, so 0.4
    is the paper's ratio range (e^-0.4, e^0.4). A sequence is weighed by the mean of its w.
    """

    clip_low: float = 0.4
    clip_high: float = 0.4
    normalizer: ClassVar[Normalizer] = "sequences"

    def __post_init__(self) -> None:
        _check_range("clip_low", self.clip_low, 0)
        _check_range("clip_high", self.clip_high, 0)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        advantages = inputs.advantages
        log_ratio = (inputs.logprobs - inputs.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        held = torch.where(advantages > 0, log_ratio.clamp(max=self.clip_high), log_ratio.clamp(min=-self.clip_low))
        terms = -advantages * inputs.mean_by_sequence(held).exp()[inputs.sequence]
        metrics = _clip_metrics(
            log_ratio.exp(),
            low=(advantages < 0) & (log_ratio < -self.clip_low),
            high=(advantages > 0) & (log_ratio > self.clip_high),
        )
        return LossOutput(reduce(terms * inputs.weights, inputs, self.normalizer), self.normalizer, metrics)


@dataclass(frozen=True)
class Nll:
    """-l w, averaged over the step's tokens: SFT. It reads neither advantages nor ratios. Metric: `nll`, nats."""

    normalizer: ClassVar[Normalizer] = "tokens"

    def __call__(self, inputs: LossInputs) -> LossOutput:
        total = reduce(-inputs.logprobs * inputs.weights, inputs, self.normalizer)
        return LossOutput(total, self.normalizer, {"nll": -inputs.logprobs.detach().sum()})


def _clip_metrics(ratio: Tensor, *, low: Tensor, high: Tensor) -> dict[str, Tensor]:
    return {"clipped_low_share": low.sum(), "clipped_high_share": high.sum(), "ratio_max": ratio.detach().max()}


def _check_range(key: str, value: object, minimum: float, below: float = math.inf) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not minimum <= number < below:
        upper = "" if below == math.inf else f" and below {below:g}"
        raise ConfigError(f"grpo.loss.{key}={value!r}: give a number of at least {minimum:g}{upper}")
