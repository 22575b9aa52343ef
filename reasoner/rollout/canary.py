"""Notices an engine that samples from old weights: with every call to it both sides score the same tokens.

One step moves logprobs by less than 16-bit noise does (0.03 nats), so the gap between the two sides alone tells
nothing. But the trainer's own movement since the last proof has a direction, and an engine that followed moved along
it: with d = trainer now - trainer then and e = engine now - trainer then, the share that arrived is d.e / d.d, near 1
if it followed and near 0 if it did not. The question is put once |d| stands out of the noise; until then movement adds
up, so an engine that stopped following is found as soon as it matters.
"""

from dataclasses import dataclass

from torch import Tensor

from reasoner.errors import GuardTripped

SPEAKS = 0.06  # nats, root mean square of d over the probe: twice the noise of 16-bit sampling
ARRIVED = 0.5  # of the movement
MAX_GAP = 0.5  # nats, mean |engine - trainer| of one probe: other weights, whatever moved


@dataclass(frozen=True, slots=True)
class Reading:
    """What one look found: mean |engine - trainer| in nats, and the share of the movement that arrived (None: too
    little has moved to tell)."""

    gap: float
    arrived: float | None


class Canary:
    """Compares engine and trainer on a few tokens that stay the same."""

    def __init__(self, now: Tensor):
        """`now`: the trainer's logprobs of the probe, with the weights that the engine has: float32 [T]."""
        self.then = now  # the trainer's at the last proof

    def look(self, now: Tensor, sampled: Tensor) -> Reading:
        """Compare the trainer's and the engine's logprobs of the probe: float32 [T] each.

        Raises GuardTripped where the engine has other weights than the trainer.
        """
        gap = float((sampled - now).abs().mean())
        arrived = None
        moved = now - self.then
        if float(moved.square().mean().sqrt()) > SPEAKS:
            arrived = float(moved.dot(sampled - self.then) / moved.dot(moved))
            self.then = now
        if not gap <= MAX_GAP or (arrived is not None and not arrived >= ARRIVED):
            raise GuardTripped(
                f"the engine samples from other weights than the trainer's: {gap:.3f} nats apart on a probe"
                + (f", and {arrived:.0%} of the last movement arrived" if arrived is not None else "")
                + ". This is a bug of ours or of vLLM; go on from the last checkpoint with rollout=hf"
            )
        return Reading(gap, arrived)
