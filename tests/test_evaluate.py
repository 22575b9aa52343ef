"""Intervals, pass@k and paired gains against numbers worked out apart from the code."""

from dataclasses import replace

import pytest

from reasoner.evaluate import ProblemResult, SetResult, paired_gain, pass_at_k, wilson


def problem(number: int, right: bool, sampled_right: int = 0, samples: int = 8) -> ProblemResult:
    return ProblemResult(
        f"p{number}", right, cut=False, tokens=3, sampled_right=sampled_right, samples=samples, text=""
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


def test_e13_two_equal_rows_show_no_gain():
    rows = [problem(i, i % 3 == 0) for i in range(90)]
    gain = paired_gain(rows, rows)
    assert (gain.points, gain.low, gain.high) == (0.0, 0.0, 0.0) and "can't tell" in str(gain)


def test_the_gain_is_paired_by_problem():
    """100 problems: 10 gained, 2 lost. mean 0.08; variance (0.12 - 0.0064) x 100/99 = 0.114747; half 1.96 x 0.033874
    = 0.066393."""
    before = [problem(i, i < 50) for i in range(100)]
    after = [problem(i, (i < 50 and i >= 2) or 50 <= i < 60) for i in range(100)]
    gain = paired_gain(before, list(reversed(after)))
    assert gain.points == pytest.approx(8.0) and gain.low == pytest.approx(1.361, abs=1e-3)
    assert str(gain) == "+8.0 points, 95% 1.4 to 14.6, 100 problems"


def test_the_row_holds_what_eval_json_promises():
    problems = (problem(0, True, 8), problem(1, False, 0), replace(problem(2, True, 4), cut=True, tokens=9))
    row = SetResult("heldout", problems).row("sft", 2, overlap_removed=5, artefact=None)
    assert row["greedy_accuracy"] == pytest.approx(2 / 3) and row["greedy_low"] < 2 / 3 < row["greedy_high"]
    assert row["sampled_accuracy"] == pytest.approx(0.5) and row["pass_at_8"] == pytest.approx(2 / 3)
    assert (row["mean_tokens"], row["cut_share"], row["overlap_removed"]) == (5.0, pytest.approx(1 / 3), 5)
    few = SetResult("heldout", (problem(0, True, 1, samples=2),)).row("sft", 2, overlap_removed=0, artefact=None)
    assert few["pass_at_8"] is None and few["sampled_accuracy"] == 0.5
