"""Fresh prompts in place of groups without signal: DAPO's dynamic sampling, arXiv:2503.14476 section 3.2.

A step then learns from as many groups as it was meant to, at the price of sampling more. Off by default
(`grpo.resample`). Groups that stay without signal when the rounds are spent fill the batch up, so that its size does
not depend on luck. Left out: keeping what a round sampled beyond the batch for a later step, which would be off-policy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reasoner import world
from reasoner.grpo.advantages import has_signal
from reasoner.types import Group, Prompt

Practise = Callable[[Sequence[Prompt]], list[Group]]  # samples and scores
More = Callable[[int], Sequence[Prompt]]  # the next so many prompts; every rank calls it, with its own number


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step sampled on this rank.

    >>> Sampled(kept=(useful, fresh), dropped=(all_wrong,), first=(useful, all_wrong))
    """

    kept: tuple[Group, ...]  # to learn from: as many as prompts were given
    dropped: tuple[Group, ...]  # without signal, and replaced
    first: tuple[Group, ...]  # of the first round: prompts that nobody chose by their rewards


def sample(prompts: Sequence[Prompt], practise: Practise, more: More, *, rounds: int) -> Sampled:
    """Groups of these prompts; for at most `rounds` times, those without signal are tried again with fresh prompts.

    Every rank makes as many rounds as the one that needs most, with no prompts where it needs none.
    """
    first = practise(prompts)
    useful, useless = _parted(first)
    for _ in range(rounds):
        missing = len(prompts) - len(useful)
        if not any(world.gather_over_ranks(missing)):
            break
        fresh_useful, fresh_useless = _parted(practise(more(missing)))
        useful, useless = useful + fresh_useful, useless + fresh_useless
    if not rounds:
        return Sampled(tuple(first), (), tuple(first))
    everything = useful + useless
    return Sampled(tuple(everything[: len(prompts)]), tuple(everything[len(prompts) :]), tuple(first))


def _parted(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    return [g for g in groups if has_signal(g)], [g for g in groups if not has_signal(g)]
