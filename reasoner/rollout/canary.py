"""Notices an engine that samples from old weights: with every call to it both sides score the same tokens.

One step moves logprobs by less than 16-bit noise does (0.03 nats), so the gap between the two sides alone tells
nothing. But the trainer's own movement since the last proof has a direction, and an engine that followed moved along
it: with d = trainer now - trainer then and e = engine now - trainer then, the share that arrived is d.e / d.d, near 1
if it followed and near 0 if it did not. Noise n shifts that share by n.d / d.d, which is at most |n| / |d| however the
two lie to each other (both sit on the same few unlikely tokens). So the question is put once |d| is four times the
noise last seen; until then movement adds up. A no counts when the trainer's next weights get it too: noise that one
token carries is another then.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reasoner.errors import GuardTripped

SPEAKS = 0.06  # nats, root mean square over the probe: less movement is never asked about
OVER_NOISE = 4.0  # times the noise
MOST_NOISE = 0.1  # nats, root mean square: more is not taken for noise
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
        self.noise: float | None = None  # root mean square of engine - trainer there
        self._doubted: Tensor | None = None  # the trainer's scores that the engine had not followed to

    def look(self, now: Tensor, sampled: Tensor) -> Reading:
        """Compare the trainer's and the engine's logprobs of the probe: float32 [T] each.

        Raises GuardTripped where the engine has other weights than the trainer.
        """
        gap = float((sampled - now).abs().mean())
        noise = min(_rms(sampled - now), MOST_NOISE)
        if self.noise is None:
            self.noise = noise
        arrived = None
        moved = now - self.then
        if _rms(moved) > max(SPEAKS, OVER_NOISE * self.noise):
            arrived = float(moved.dot(sampled - self.then) / moved.dot(moved))
        follows = arrived is None or arrived >= ARRIVED
        if not gap <= MAX_GAP or not (follows or self._doubted is None or torch.equal(self._doubted, now)):
            raise GuardTripped(
                f"the engine samples from other weights than the trainer's: {gap:.3f} nats apart on a probe"
                + (f", and {arrived:.0%} of the last movement arrived" if arrived is not None else "")
                + ". This is a bug of ours or of vLLM; go on from the last checkpoint with rollout=hf"
            )
        self._doubted = None if follows else now
        if arrived is not None and follows:
            self.then, self.noise = now, noise
        return Reading(gap, arrived)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
