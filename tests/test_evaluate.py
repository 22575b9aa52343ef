"""Intervals, pass@k and paired gains against numbers worked out apart from the code."""

from dataclasses import replace
from pathlib import Path

import pytest

from reasoner.compose import compose_conf
from reasoner.config import Reward, RewardPart, validate
from reasoner.errors import GuardTripped
from reasoner.evaluate import Evaluator, ProblemResult, SetResult, answer_of, paired_gain, problem_hash, short_cells
from reasoner.rewards.base import load_rewards
from reasoner.types import Completion, Prompt


def problem(number: int, right: bool, sampled_right: int = 0, samples: int = 8) -> ProblemResult:
    return ProblemResult(
        f"p{number}", right, cut=False, tokens=3, sampled_right=sampled_right, samples=samples, text=""
    )


def test_e13_two_equal_rows_show_no_gain():
    rows = [problem(i, i % 3 == 0) for i in range(90)]
    gain = paired_gain(rows, rows)
    assert gain.points == 0.0 and gain.low < 0 < gain.high and not gain.is_real and "can't tell" in str(gain)


def test_the_gain_is_paired_by_problem():
    """100 problems, given in another order: 10 gained, 2 lost, and one that only the second row has."""
    before = [problem(i, i < 50) for i in range(100)]
    after = [problem(i, (i < 50 and i >= 2) or 50 <= i < 60) for i in range(101)]
    gain = paired_gain(before, list(reversed(after)))
    assert (gain.gained, gain.lost, gain.problems) == (10, 2, 100)
    assert str(gain) == "+8.0 points, 95% 1.4 to 15.8, 100 problems"


def test_the_row_holds_what_eval_json_promises():
    problems = (problem(0, True, 8), problem(1, False, 0), replace(problem(2, True, 4), cut=True, tokens=9))
    row = SetResult("heldout", problems).row("sft", 2, overlap_removed=5, artefact=None)
    assert row["greedy_accuracy"] == pytest.approx(2 / 3) and row["greedy_low"] < 2 / 3 < row["greedy_high"]
    assert row["sampled_accuracy"] == pytest.approx(0.5) and row["pass_at_8"] == pytest.approx(2 / 3)
    assert (row["mean_tokens"], row["cut_share"], row["overlap_removed"]) == (5.0, pytest.approx(1 / 3), 5)
    assert row["maj_at_8"] is None, "these problems keep no answers"
    few = SetResult("heldout", (problem(0, True, 1, samples=2),)).row("sft", 2, overlap_removed=0, artefact=None)
    assert few["pass_at_8"] is None and few["sampled_accuracy"] == 0.5


def sampled(*said: str, gold: str) -> ProblemResult:
    right = tuple(one == gold for one in said)
    return replace(problem(0, True, sum(right), len(said)), answers=said, verdicts=right)


def test_majority_and_pass_at_k_of_a_row():
    problems = (sampled("4", "5", "4", "6", gold="4"), sampled("1", "2", "2", "2", gold="1"))
    row = SetResult("heldout", problems).row("sft", 2, at=(2, 4))
    assert row["maj_at_4"] == 0.5 and row["pass_at_4"] == 1.0
    assert row["maj_at_2"] == 0.375, "blocks of two: 4 5 | 4 6 draw twice, 1 2 | 2 2 draws and loses"
    assert "pass_at_8" not in row and "step" not in row
    assert SetResult("heldout", problems).row("x", 3, step=50)["step"] == 50


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        ("so #### 1,450", "number", "1450"),
        ("<think>3 + 4</think>The answer is \\boxed{7.50}", "number", "15/2"),
        ("<think>3 + 4 = 7, #### 7", "number", None),
        ("12", "number", "12"),
        ("I think that it could be this. " * 9, "text", None),
        ("\\boxed{ \\text{Paris} }", "text", "Paris"),
        ("", "number", None),
    ],
)
def test_what_a_completion_votes_for(text: str, kind: str, answer: str | None):
    assert answer_of(text, kind) == answer


def test_a_problem_is_the_same_in_runs_that_ask_it_in_other_words():
    columns = {"question": "2+2?", "answer_kind": "number", "level": 3}
    one = Prompt("heldout:1", "Q: 2+2?", "4", columns, (1,))
    two = Prompt("test:1", "<s>2+2? Reason step by step.", "4", {**columns, "answer_kind": "latex"}, (5, 6))
    assert problem_hash(one) == problem_hash(two)
    assert problem_hash(replace(one, answer="5")) != problem_hash(one)
    assert problem_hash(replace(one, columns={**columns, "level": 4})) != problem_hash(one)


def test_cells_that_can_group_are_kept():
    row = {"question": "x" * 200, "level": 5, "hard": True, "metadata": {"terms": 3, "deep": {"a": 1}, "list": [1]}}
    assert short_cells(row) == {"level": 5, "hard": True, "metadata": {"terms": 3}}


class Parrot:
    """An engine whose every completion is the same."""

    def generate(self, prompts, sampling, *, policy_step):
        one = Completion((1,), (True,), (0.0,), "18", "stop", policy_step, policy_step)
        return [[one] * sampling.num_completions for _ in prompts]


def test_failed_verdicts_are_no_wrong_answers_beyond_the_share_that_is_let_pass():
    config = validate(compose_conf("tiny", ["evaluate.samples=1", "reward.max_failed_share=0.2"]).values)

    def unsure(completion: str, answer: str) -> float:
        if answer == "19":
            raise ValueError("no verdict")
        return float(completion == answer)

    def measured(*golds: str):
        prompts = [Prompt(f"heldout:{i}", "?", gold, {}, (1,)) for i, gold in enumerate(golds)]
        return Evaluator(config, rewards, ()).run(
            Parrot(), {"heldout": prompts}, policy_step=0, progress=lambda _: None
        )

    reward = Reward({"accuracy": RewardPart(fn="unsure")}, workers=1)
    with load_rewards(reward, functions={"unsure": unsure}, base_dir=Path.cwd(), columns=set()) as rewards:
        assert [one.right for one in measured(*["18"] * 4, "19")["heldout"].problems] == [True] * 4 + [False]
        with pytest.raises(
            GuardTripped, match=r"^40% of the verdicts of 'accuracy' on the set heldout failed, more than"
        ):
            measured("18", "18", "18", "19", "19")
