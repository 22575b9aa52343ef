"""The canary sings while the engine follows, stops a run that samples from old weights, and is not fooled by noise."""

import pytest
import torch

from reasoner.errors import GuardTripped
from reasoner.rollout.canary import MOST_NOISE, OVER_NOISE, Canary

T = 200
NOISE = 0.03  # nats, of 16-bit sampling


class Sides:
    """A trainer that walks, and an engine that follows it with noise, or stays where it stopped."""

    def __init__(self, step: float, seed: int = 0):
        self.draws = torch.Generator().manual_seed(seed)
        self.size, self.now, self.kept, self.follows = step, -torch.rand(T) * 3, None, True

    def walk(self) -> None:
        self.now = self.now + self.size * torch.randn(T, generator=self.draws)

    def engine(self) -> torch.Tensor:
        if self.follows or self.kept is None:
            self.kept = self.now
        return self.kept + NOISE * torch.randn(T, generator=self.draws)


def make(step: float, seed: int = 0) -> tuple[Sides, Canary]:
    sides = Sides(step, seed)
    return sides, Canary(sides.now)


@pytest.mark.parametrize("step", [0.0, 0.005, 0.05, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_an_engine_that_follows_is_let_through(step: float, seed: int) -> None:
    sides, canary = make(step, seed)
    spoke = 0
    for _ in range(900):
        reading = canary.look(sides.now, sides.engine())
        spoke += reading.arrived is not None
        sides.walk()
    assert (spoke > 0) == (step > 0.0)  # small steps add up


@pytest.mark.parametrize("seed", range(40))
def test_noise_that_lies_where_the_movement_is_does_not_fool_it(seed: int) -> None:
    """Both are largest on a few unlikely tokens, so that one of them may outweigh the rest."""
    draws = torch.Generator().manual_seed(seed)
    weight = (1.2 * torch.randn(T, generator=draws)).exp()
    weight *= T**0.5 / weight.norm()
    now = -torch.rand(T) * 3
    canary, spoke = Canary(now), 0
    for _ in range(200):
        sampled = now + 0.05 * weight * torch.randn(T, generator=draws)
        spoke += canary.look(now, sampled).arrived is not None
        now = now + 0.04 * weight * torch.randn(T, generator=draws)
    assert spoke


@pytest.mark.parametrize(("step", "within"), [(0.5, 2), (0.05, 40), (0.01, 300)])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lost_at_once", [False, True])
def test_an_engine_that_stopped_following_is_found_once_it_matters(
    step: float, within: int, seed: int, lost_at_once: bool
) -> None:
    sides, canary = make(step, seed)
    if not lost_at_once:
        canary.look(sides.now, sides.engine())
    sides.kept, sides.follows = sides.now, False
    with pytest.raises(GuardTripped, match="samples from other weights than the trainer's"):
        for _ in range(within):
            sides.walk()
            canary.look(sides.now, sides.engine())
    # By then it is four times the noise off; one lost before the first look, four times the most that counts as noise.
    noise = MOST_NOISE if lost_at_once else NOISE
    assert (sides.now - sides.kept).square().mean().sqrt() < max(1.3 * OVER_NOISE * noise, 2 * step)


def test_one_no_is_not_enough_nor_the_same_one_again() -> None:
    sides, canary = make(0.25)
    canary.look(sides.now, sides.engine())
    for _ in range(2):
        sides.follows = False
        sides.walk()
        for _ in range(3):
            assert canary.look(sides.now, sides.engine()).arrived < 0.3
        sides.follows = True  # it was noise: all is forgotten
        sides.walk()
        assert canary.look(sides.now, sides.engine()).arrived > 0.7
    sides.follows = False
    sides.walk()
    canary.look(sides.now, sides.engine())
    sides.walk()
    with pytest.raises(GuardTripped, match="of the last movement arrived"):
        canary.look(sides.now, sides.engine())


def test_other_weights_altogether_are_found_at_the_first_look() -> None:
    sides, canary = make(0.0)
    sides.follows, sides.kept = False, sides.now - 1.0
    with pytest.raises(GuardTripped, match=r"1\.0\d\d nats apart"):
        canary.look(sides.now, sides.engine())


def test_scores_that_are_not_finite_are_other_weights() -> None:
    sides, canary = make(0.0)
    sides.follows, sides.kept = False, sides.now * float("nan")
    with pytest.raises(GuardTripped):
        canary.look(sides.now, sides.engine())
