"""Advantages against numbers worked out by hand; a wrong formula each has to differ."""

import math
import statistics
from collections.abc import Callable, Sequence

import pytest

from reasoner.grpo.advantages import judge
from reasoner.types import Completion, Group, Prompt, Score

FAILED = None


def make_group(rewards: Sequence[float | None], lengths: Sequence[int] | None = None, name: str = "p") -> Group:
    """A group with these rewards; completion i has `lengths[i]` tokens and the text `name`:i."""
    prompt = Prompt(id=name, text="", answer="", columns={}, token_ids=(1, 2))
    scores = tuple(Score(0.0, {}, {"accuracy": "hung"}) if r is FAILED else Score(r, {}) for r in rewards)
    completions = tuple(
        Completion((3,) * n, (True,) * n, (-1.0,) * n, f"{name}:{i}", "stop", 0, 0)
        for i, n in enumerate(lengths or [1] * len(rewards))
    )
    return Group(prompt, completions, scores)


def advantages(rewards: Sequence[float | None], lengths=None, *, advantage="group", scale="group") -> list[float]:
    (judged,) = judge([make_group(rewards, lengths)], advantage=advantage, scale=scale)
    return list(judged.advantages)


def by_group_mean(rewards: Sequence[float], std: Callable = statistics.stdev, epsilon: float = 1e-6) -> list[float]:
    mean = statistics.fmean(rewards)
    return [(r - mean) / (std(rewards) + epsilon) for r in rewards]


def test_c7_group_by_hand():
    """[1, 0, 0, 0]: mean 0.25, std sqrt((0.75^2 + 3 x 0.25^2) / 3) = 0.5 -> 1.5, -0.5; with ddof 0 1.732, -0.577."""
    expected = [0.75 / (0.5 + 1e-6)] + [-0.25 / (0.5 + 1e-6)] * 3
    assert advantages([1, 0, 0, 0]) == pytest.approx(expected, rel=1e-12)
    assert by_group_mean([1, 0, 0, 0], statistics.pstdev) == pytest.approx([1.732, -0.577, -0.577, -0.577], abs=1e-3)
    assert by_group_mean([1, 0, 0, 0], epsilon=1e-4) != pytest.approx(expected, rel=1e-6)


def test_leave_one_out_by_hand():
    """[1, 0.5, 0]: against the others' means 0.25, 0.5, 0.75; a mean that includes oneself gives 0.5, 0, -0.5."""
    assert advantages([1, 0.5, 0], advantage="leave_one_out", scale="none") == pytest.approx([0.75, 0, -0.75])
    assert advantages([1, 0.5, 0], advantage="group", scale="none") == pytest.approx([0.5, 0, -0.5])
    # std 0.5
    assert advantages([1, 0.5, 0], advantage="leave_one_out") == pytest.approx([1.5, 0, -1.5], abs=1e-5)


def test_opo_by_hand():
    """Rewards 1 and 0 with 1 and 3 sampled tokens: baseline (1 x 1 + 3 x 0) / 4 = 0.25; unweighted it is 0.5."""
    assert advantages([1, 0], [1, 3], advantage="opo", scale="none") == pytest.approx([0.75, -0.25])
    assert advantages([1, 0], [1, 3], advantage="group", scale="none") == pytest.approx([0.5, -0.5])
    assert advantages([1, 0], [3, 1], advantage="opo", scale="none") == pytest.approx([0.25, -0.75])


def test_opo_counts_sampled_tokens_only():
    """Tokens that a tool wrote are no length: 1 sampled of 3, and 3 of 3 -> baseline 0.25 again."""
    group = make_group([1, 0], [3, 3])
    tool = Completion((3, 4, 5), (True, False, False), (-1.0, 0.0, 0.0), "", "stop", 0, 0)
    (judged,) = judge([Group(group.prompt, (tool, group.completions[1]), group.scores)], advantage="opo", scale="none")
    assert judged.advantages == pytest.approx((0.75, -0.25))


def test_batch_scale_by_hand():
    """[1, 0], [3, 1] and the dead [1, 1]: mean 7/6, squared deviations (1 + 49 + 121 + 1 + 1 + 1) / 36, over 5."""
    judged = judge([make_group([1, 0]), make_group([3, 1]), make_group([1, 1])], advantage="group", scale="batch")
    divisor = math.sqrt(174 / 36 / 5) + 1e-6
    assert [a for group in judged for a in group.advantages] == pytest.approx(
        [0.5 / divisor, -0.5 / divisor, 1 / divisor, -1 / divisor, 0, 0], rel=1e-12
    )
    without_dead = judge([make_group([1, 0]), make_group([3, 1])], advantage="group", scale="batch")
    assert without_dead[0].advantages != pytest.approx(judged[0].advantages, rel=1e-3)


@pytest.mark.parametrize("advantage", ["group", "leave_one_out", "opo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "rewards", [[0.1 + 0.2, 0.3], [0.7] * 8, [1.0, 1.0 + 9e-7], [0.0], [], [1.0, FAILED], [FAILED, FAILED]]
)
def test_c6_dead_groups(rewards, advantage, scale):
    """Rewards within 1e-6, or fewer than two valid ones: dead, every A exactly 0."""
    (judged,) = judge([make_group(rewards)], advantage=advantage, scale=scale)
    assert judged.dead and judged.advantages == (0.0,) * len(rewards)


def test_c6_dividing_rounding_noise_makes_it_live():
    assert max(map(abs, by_group_mean([0.1 + 0.2, 0.3], epsilon=1e-17))) > 0.1
    (judged,) = judge([make_group([1.0, 1.0 + 2e-6])], advantage="group", scale="group")
    assert not judged.dead and judged.advantages[1] > 0.4


@pytest.mark.parametrize("advantage", ["group", "leave_one_out", "opo"])
def test_e8_failed_rewards_leave_the_statistics(advantage):
    """[1, failed, 0]: the same as [1, 0], with 0 between; as a reward of 0 it would move the mean to 1/3."""
    with_failure = advantages([1, FAILED, 0], [2, 9, 3], advantage=advantage)
    first, last = advantages([1, 0], [2, 3], advantage=advantage)
    assert with_failure == [first, 0.0, last]
    assert advantages([1, 0, 0], [2, 9, 3], advantage=advantage) != pytest.approx(with_failure, abs=1e-3)


def test_e8_failed_rewards_leave_the_batch_std():
    with_failure = judge([make_group([1, FAILED, 0]), make_group([FAILED, FAILED])], advantage="group", scale="batch")
    assert with_failure[0].advantages[0] == advantages([1, 0], scale="batch")[0]


@pytest.mark.parametrize("advantage", ["group", "leave_one_out", "opo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_c14_advantages_follow_their_completions(advantage, scale):
    """Groups of unequal size, reordered inside and among each other: each completion keeps its A, bit for bit."""
    groups = [
        make_group([1, 0.3, 0], [2, 5, 7], "a"),
        make_group([0, 1], [4, 1], "b"),
        make_group([3, 1, 1, 0.1], name="c"),
    ]

    def by_text(groups: Sequence[Group]) -> dict[str, float]:
        judged = judge(groups, advantage=advantage, scale=scale)
        assert [j.group for j in judged] == list(groups)
        return {c.text: a for j in judged for c, a in zip(j.group.completions, j.advantages, strict=True)}

    permuted = [Group(g.prompt, g.completions[::-1], g.scores[::-1]) for g in reversed(groups)]
    assert by_text(permuted) == by_text(groups)
    assert len(set(by_text(groups).values())) > 5


def test_c20_float64_all_the_way():
    """Rewards 1e-5 apart on a base of 1e4, which float32 could not tell: the centred rewards keep eleven digits."""
    assert advantages([10000.00001, 10000], scale="none") == pytest.approx([5e-6, -5e-6], rel=1e-5)
