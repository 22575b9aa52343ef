"""KL to the reference policy, in the loss or in the reward.

d = l - f: the policy's logprob less the reference's, held within +-20 (no gradient beyond). In the loss: a per-token
estimate, summed by `losses.reduce` like the loss it is added to. In the reward: `sequence_kl` and `penalized`, before
the advantages. Left out: a full sum over the vocabulary (no logits leave the kernel) and importance-weighted estimates.

Which estimator (arXiv:2506.09477; http://joschu.net/blog/kl-approx.html). In expectation over the policy's own samples,
as a loss: k2's gradient is that of KL(policy || reference), k3's is that of KL(reference || policy), k1's is 0. As a
number to look at, k1 and k3 are unbiased and k3 is never negative. k1 in the reward gives the true gradient again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from reasoner.grpo.batch import PackedBatch
from reasoner.grpo.losses import MAX_LOG_RATIO
from reasoner.types import Group, Score

PENALTY = "kl_penalty"


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d a token: [M], [M] -> [M]."""
    return (logprobs - ref_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2 a token: [M], [M] -> [M]."""
    return k1(logprobs, ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) + d - 1 a token: [M], [M] -> [M]."""
    d = k1(logprobs, ref_logprobs)
    return torch.expm1(-d) + d


ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def sequence_kl(batch: PackedBatch, logprobs: Tensor, ref_logprobs: Tensor) -> list[float]:
    """k1 summed over the trained tokens of each sequence: logprobs [N], ref_logprobs [N] -> B numbers, nats.

    Take `logprobs` from the trainer, as the step begins, and not from the engine: then what the two disagree about is
    no penalty, and a policy equal to its reference is charged exactly 0. Of `pack(groups)` it is the KL of all
    completions, in order.
    """
    d = k1(batch.trained(logprobs), batch.trained(ref_logprobs)).detach().cpu().double()
    sequence = batch.trained(batch.layout.sequence_ids).cpu()
    return d.new_zeros(batch.layout.num_sequences).index_add(0, sequence, d).tolist()


def penalized(groups: Sequence[Group], kl: Sequence[float], coef: float) -> list[Group]:
    """The groups with total - coef x KL as each completion's score; `kl` goes through all completions in order.

    The score says it as the part `kl_penalty`, negative. A failed score stays failed. Judge these groups, and report
    rewards from the ones before.
    """
    assert len(kl) == sum(len(group.completions) for group in groups)
    left = iter(kl)
    return [
        replace(group, scores=tuple(_charged(score, next(left), coef) for score in group.scores)) for group in groups
    ]


def _charged(score: Score, kl: float, coef: float) -> Score:
    return replace(score, total=score.total - coef * kl, parts={**score.parts, PENALTY: -kl})
