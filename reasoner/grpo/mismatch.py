"""Engine and trainer disagree a little about every logprob: measured at every step, and corrected by a weight.

w = exp(o - s), detached: o the trainer's logprob at the start of the step, s the engine's. It multiplies a token's loss
beside the ratio exp(l - o), which keeps its own clip (PITFALLS C2). o - s is held within +-20 before exp. Left out: the
geometric mean of a sequence as its weight, and bounds that are not each other's inverse.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from reasoner.errors import ConfigError
from reasoner.grpo.losses import LossInputs, bounded_exp


def _off(ratio: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    return torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.bool)


def _truncate(ratio: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    return ratio.clamp(max=cap), ratio > cap


def _mask(ratio: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    outside = (ratio < 1 / cap) | (ratio > cap)
    return ratio.masked_fill(outside, 0), outside


WEIGHTS: Mapping[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "off": _off,
    "truncate": _truncate,
    "mask": _mask,
}


@dataclass(frozen=True)
class Mismatch:
    """Gives loss inputs their weights, and says how far engine and trainer are apart.

    `mode`: "truncate" min(w, cap), as in arXiv:1802.01561 section 4.1; "mask" w inside [1/cap, cap] and 0 outside, so
    such tokens teach nothing while the step's counts stay; "off" 1. `level`: "token", or "sequence", where w is the
    product over a sequence's trained tokens.

    Raises ConfigError where `cap` is below 1.
    """

    mode: Literal["truncate", "mask", "off"] = "truncate"
    level: Literal["token", "sequence"] = "token"
    cap: float = 2.0

    def __post_init__(self) -> None:
        if not self.cap >= 1:
            raise ConfigError(
                f"grpo.mismatch_cap={self.cap}: give at least 1, the weight where engine and trainer agree"
            )

    def __call__(self, inputs: LossInputs) -> tuple[LossInputs, dict[str, Tensor]]:
        """The inputs with their weights, and metrics as sums over trained tokens (the same ones in every mode).

        `logprob_gap_mean` and `logprob_gap_max`: |o - s|, nats. `mismatch_ratio_mean`: exp(o - s) a token, 1 in
        expectation. `mismatch_outside_share`: tokens whose exp(o - s) is outside [0.9, 1.1]. `mismatch_capped_share`:
        tokens whose weight was truncated or set to 0.
        """
        gap = (inputs.old_logprobs - inputs.sampling_logprobs).detach()
        token_ratio = bounded_exp(gap)
        ratio = token_ratio if self.level == "token" else bounded_exp(inputs.sum_by_sequence(gap))[inputs.sequence]
        weights, capped = WEIGHTS[self.mode](ratio, self.cap)
        metrics = {
            "logprob_gap_mean": gap.abs().sum(),
            "logprob_gap_max": gap.abs().max(),
            "mismatch_ratio_mean": token_ratio.sum(),
            "mismatch_outside_share": ((token_ratio < 0.9) | (token_ratio > 1.1)).sum(),
            "mismatch_capped_share": capped.sum(),
        }
        return replace(inputs, weights=weights), metrics
