"""The canary sings while the engine follows, stops a run that samples from old weights, and is not fooled by noise."""

import pytest
import torch

from reasoner.errors import GuardTripped
from reasoner.rollout.canary import SPEAKS, Canary

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
    for _ in range(300):
        reading = canary.look(sides.now, sides.engine())
        spoke += reading.arrived is not None
        sides.walk()
    assert (spoke > 0) == (step > 0.0)  # small steps add up


@pytest.mark.parametrize(("step", "within"), [(0.5, 2), (0.05, 4), (0.01, 60)])
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
    assert (sides.now - sides.kept).square().mean().sqrt() < max(2 * SPEAKS, 1.5 * step)


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
