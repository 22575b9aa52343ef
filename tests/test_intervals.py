"""Intervals, tests and votes against numbers worked out apart from the code."""

import math

import pytest

from reasoner.intervals import (
    Gain,
    majority_at_k,
    mcnemar,
    paired_interval,
    pass_at_k,
    problems_needed,
    score_statistic,
    wilson,
)


def test_wilson_interval():
    """60 of 100: centre (0.6 + 1.9207/100) / 1.038415 = 0.59631, half 1.95996 sqrt(0.0024 + 3.84146/40000) / 1.038415
    = 0.09429."""
    assert wilson(60, 100) == pytest.approx((0.502003, 0.690598), abs=2e-5)
    assert wilson(0, 50) == pytest.approx((0.0, 0.07135), abs=1e-4)
    assert wilson(50, 50)[1] == 1.0


def test_pass_at_k_is_unbiased():
    """One of four right, two drawn: 1 - C(3, 2) / C(4, 2) = 0.5; the biased 1 - (1 - 1/4)^2 would say 0.4375."""
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(8, 0, 8) == 0.0 and pass_at_k(8, 1, 8) == 1.0


def likeliest_lost(gained: int, lost: int, n: int, change: float) -> float:
    """The share of lost answers under which these counts are likeliest, given the change: by search, not by formula."""
    low, high = max(0.0, -change), (1 - change) / 2

    def likelihood(q: float) -> float:
        terms = [(gained, q + change), (lost, q), (n - gained - lost, 1 - 2 * q - change)]
        return sum(count * math.log(max(share, 1e-300)) for count, share in terms if count)

    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (a, high) if likelihood(a) < likelihood(b) else (low, b)
    return (low + high) / 2


@pytest.mark.parametrize(
    ("gained", "lost", "n", "change"), [(12, 2, 50, 0.1), (3, 0, 40, -0.05), (110, 56, 1319, 0.02)]
)
def test_the_score_statistic_takes_the_likeliest_share(gained: int, lost: int, n: int, change: float):
    q = likeliest_lost(gained, lost, n, change)
    expected = (gained - lost - n * change) / math.sqrt(n * (2 * q + change * (1 - change)))
    assert score_statistic(gained, lost, n, change) == pytest.approx(expected, rel=1e-4)


def test_the_paired_interval():
    """At its ends the statistic is 1.96; at no change it is McNemar's (b - c) / sqrt(b + c); it never has no width."""
    for gained, lost, n in [(12, 2, 50), (0, 3, 40), (110, 56, 1319)]:
        low, high = paired_interval(gained, lost, n)
        assert low < (gained - lost) / n < high
        assert [abs(score_statistic(gained, lost, n, end)) for end in (low, high)] == pytest.approx(
            [1.96] * 2, abs=1e-3
        )
        assert paired_interval(lost, gained, n) == pytest.approx((-high, -low))
    assert score_statistic(12, 2, 50, 0.0) == pytest.approx(10 / math.sqrt(14))
    z2 = 1.959964**2  # with nothing changed: n d^2 = z^2 d (1 - d)
    assert paired_interval(0, 0, 90) == pytest.approx((-z2 / (90 + z2), z2 / (90 + z2)), abs=1e-6)
    assert paired_interval(20, 0, 20)[1] == 1.0


def test_mcnemar_is_exact():
    """10 against 2: 2 (1 + 12 + 66) / 4096."""
    assert mcnemar(10, 2) == mcnemar(2, 10) == pytest.approx(158 / 4096)
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0 and mcnemar(0, 5) == pytest.approx(2 / 32)


def test_problems_needed():
    """Connor: 20% of answers change, by 5 points: (1.96 sqrt 0.2 + 0.8416 sqrt(0.2 - 0.0025))^2 / 0.0025 = 625.5."""
    assert problems_needed(0.05, 0.2) == 626
    assert problems_needed(0.05, 0.01) == problems_needed(0.05, 0.05), "fewer can't change than the change itself"


def test_a_gain_in_words():
    assert str(Gain.of(110, 56, 1319)) == "+4.1 points, 95% 2.2 to 6.0, 1,319 problems"
    words = "(can't tell from 0: if it is real, about 790 problems would show it)"
    assert str(Gain.of(30, 20, 200)) == f"+5.0 points, 95% -2.0 to 12.1, 200 problems {words}"
    assert str(Gain.of(5, 0, 5)).endswith(
        "5 problems (can't tell from 0: if it is real, about 6 problems would show it)"
    )
    assert "1 problem (" in str(Gain.of(1, 0, 1)), "in the singular"
    assert "to show 2 points, about 980 problems are needed" in str(Gain.of(0, 0, 90))


def test_interval_and_exact_test_must_agree():
    """5 against 0: the score interval leaves 0 out, but so few changes come by chance once in 16."""
    gain = Gain.of(5, 0, 50)
    assert gain.low > 0 and gain.p_value == pytest.approx(1 / 16) and not gain.is_real


def test_majority_vote():
    def vote(text: str, k: int, gold: str = "4") -> float:
        answers = [None if one == "-" else one for one in text.split()]
        return majority_at_k(answers, [one == gold for one in answers], k)

    assert vote("4 5 4", 3) == 1.0 and vote("5 5 4", 3) == 0.0
    assert vote("4 5", 2) == 0.5, "of two answers that are equally frequent one is drawn"
    assert vote("4 - - -", 4) == 1.0 and vote("- - -", 3) == 0.0, "no answer, no vote"
    assert vote("4 4 5 5 5 5", 2) == pytest.approx(1 / 3)
    assert majority_at_k(["1/2", "0.5", "3", "3", "7"], [True, True, False, False, False], 5) == 0.5
    assert majority_at_k([None, "3"], [True, False], 2) == 0.5, "a right sample votes, whatever its text"
