"""From scores to advantages: how much better a completion did than the others of its prompt. Python float64.

Left out: critics, whitening over the batch (reinforce++) and normalizing each reward by itself (gdpo).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reasoner import world
from reasoner.types import Completion, Group

EPSILON = 1e-6  # rewards this close are equal; also added to every std

Advantage = Literal["group", "leave_one_out", "opo"]
Scale = Literal["group", "batch", "none"]


@dataclass(frozen=True, slots=True)
class JudgedGroup:
    """A group with an advantage for each of its completions, in the same order.

    >>> JudgedGroup(group=group_of_four_scored_1_0_0_0, advantages=(1.5, -0.5, -0.5, -0.5), dead=False)

    `dead`: it teaches nothing, because all rewards are equal or fewer than two are valid; every advantage is 0.0.
    """

    group: Group
    advantages: tuple[float, ...]
    dead: bool


def judge(groups: Sequence[Group], *, advantage: Advantage, scale: Scale) -> list[JudgedGroup]:
    """The groups with their advantages A = (R - baseline) / divisor, in the same order; groups may differ in size.

    baseline: "group" the mean reward of the group (GRPO, arXiv:2402.03300); "leave_one_out" the mean of the others
    (RLOO, arXiv:2402.14740); "opo" the mean weighted by completion length in sampled tokens (OPO, arXiv:2505.23585).
    divisor: "group" the group's std + 1e-6; "batch" the std + 1e-6 over all valid rewards of the step, dead groups' and
    other ranks' included, so two ranks give what one would (every rank has to call); "none" 1. Every std has ddof 1.

    A failed score is in no baseline and no std, and its completion has A = 0. A group whose rewards span at most 1e-6
    is dead (float noise must not be divided by float noise), and so is one with fewer than two valid scores.
    """
    batch_std = _std_over_ranks(groups) if scale == "batch" else None
    return [_judge(group, advantage, scale, batch_std) for group in groups]


def has_signal(group: Group) -> bool:
    """Whether at least two of its rewards are valid and they differ."""
    rewards = _valid_rewards(group)
    return len(rewards) > 1 and max(rewards) - min(rewards) > EPSILON


def judged_dead(group: Group) -> JudgedGroup:
    """The group as one that teaches nothing."""
    return JudgedGroup(group, (0.0,) * len(group.scores), dead=True)


def _judge(group: Group, advantage: Advantage, scale: Scale, batch_std: float | None) -> JudgedGroup:
    if not has_signal(group):
        return judged_dead(group)
    rewards = _valid_rewards(group)
    divisor = 1.0
    if scale != "none":
        divisor = EPSILON + (_std(rewards) if batch_std is None else batch_std)
    centred = iter(_centred(rewards, _valid_completions(group), advantage))
    advantages = tuple(0.0 if score.failed else next(centred) / divisor for score in group.scores)
    return JudgedGroup(group, advantages, dead=False)


def _centred(rewards: Sequence[float], completions: Sequence[Completion], advantage: Advantage) -> list[float]:
    if advantage == "leave_one_out":
        total, others = math.fsum(rewards), len(rewards) - 1
        return [reward - (total - reward) / others for reward in rewards]
    lengths = [sum(completion.sampled) if advantage == "opo" else 1 for completion in completions]
    baseline = math.fsum(n * reward for n, reward in zip(lengths, rewards, strict=True)) / max(sum(lengths), 1)
    return [reward - baseline for reward in rewards]


def _std(rewards: Sequence[float]) -> float:
    mean = math.fsum(rewards) / len(rewards)
    return math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))


def _std_over_ranks(groups: Sequence[Group]) -> float:
    own = [reward for group in groups for reward in _valid_rewards(group)]
    rewards = [reward for of_rank in world.gather_over_ranks(own) for reward in of_rank]
    return _std(rewards) if len(rewards) > 1 else 0.0


def _valid_rewards(group: Group) -> list[float]:
    return [score.total for score in group.scores if not score.failed]


def _valid_completions(group: Group) -> list[Completion]:
    return [completion for completion, score in zip(group.completions, group.scores, strict=True) if not score.failed]
