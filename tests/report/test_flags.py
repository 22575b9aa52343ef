"""Each sign of a policy that games its reward is raised where it is there, and not on a healthy run."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report_page import write_run
from reasoner.evaluate import ProblemResult, SetResult
from reasoner.report.flags import flags, moved, repeated_share
from reasoner.report.verdict import change, comparison, headline
from reasoner.report.write import write_report

UP = {"verdict": "up", "points": 5.0, "low": 2.0, "high": 8.0}
FLAT = {"verdict": "unclear", "points": 0.3, "low": -2.0, "high": 2.5}


def rows(**columns: tuple[float, float]) -> list[dict[str, Any]]:
    """60 steps in which each column goes from its first value to its second, with a little noise."""
    healthy = {
        "reward_mean": (0.3, 0.7), "solved_share": (0.3, 0.7), "reward/accuracy": (0.3, 0.7), "entropy": (0.8, 0.5),
        "completion_tokens_mean": (100, 110), "cut_share": (0.0, 0.05), "useful_groups": (20, 20), "groups": (32, 32),
        "reward_failures": (0, 0), "logprob_gap_mean": (0.001, 0.001), "grad_norm": (1, 1),
    } | columns  # fmt: skip
    noise = [0.0, 0.01, -0.01]
    return [
        {"stage": "grpo", "stage_index": 1, "step": i + 1}
        | {name: a + (b - a) * i / 59 * (1 + noise[i % 3]) for name, (a, b) in healthy.items()}
        for i in range(60)
    ]


def completions(text: str, share: float = 1.0) -> list[dict[str, Any]]:
    """Of 40 steps with 10 completions each: `share` of them are this text, the others all different. Every other one is
    right, and they have 10 to 19 tokens."""
    return [
        {"stage_index": 1, "step": step, "id": f"{step}:{i // 5}", "prompt": "?", "answer": str(i), "tokens": 10 + i}
        | {"completion": text if i < 10 * share else f"{step} and {i}", "reward": i % 2, "parts": {"accuracy": i % 2}}
        for step in range(1, 41)
        for i in range(10)
    ]


def titles(metrics: list, texts: list = [], accuracy: dict | None = UP) -> list[str]:  # noqa: B006 - not changed
    weights = {"accuracy": 1.0, "format": 0.5}
    return [flag["title"] for flag in flags(metrics, texts, accuracy=accuracy, weights=weights, right="accuracy")]


def test_a_healthy_run_has_none() -> None:
    assert titles(rows(), completions("no", 0.0)) == []


@pytest.mark.parametrize(
    ("columns", "accuracy", "title"),
    [
        ({}, FLAT, "Reward rose, held-out accuracy did not"),
        (
            {"solved_share": (0.3, 0.3), "reward/format": (0.1, 0.9)},
            UP,
            "Reward rose, the share of solved problems did not",
        ),
        ({"completion_tokens_mean": (100, 40)}, FLAT | {"verdict": "down"}, "Completions collapsed in length"),
        ({"completion_tokens_mean": (100, 40)}, UP, "Completions became much shorter"),
        ({"cut_share": (0.4, 0.5)}, UP, "Many completions were cut"),
        ({"entropy": (0.8, 0.01)}, UP, "Entropy collapsed"),
        ({"logprob_gap_mean": (0.2, 0.2)}, UP, "Engine and trainer disagreed"),
    ],
)
def test_a_bad_curve_is_flagged(columns: dict, accuracy: dict, title: str) -> None:
    assert title in titles(rows(**columns), accuracy=accuracy)


def test_without_a_measured_accuracy_nothing_is_said_of_it() -> None:
    assert titles(rows(), accuracy=None) == []


def test_one_answer_for_many_prompts() -> None:
    flagged = "The same completion answers many prompts"
    assert flagged in titles(rows(), completions("I don't know", 0.5))
    assert flagged not in titles(rows(), completions("I don't know", 0.1))
    same_answer = [{**row, "answer": "7"} for row in completions("7", 1.0)]
    assert flagged not in titles(rows(), same_answer), "one right answer of many prompts is no trick"
    early = [row | ({"completion": "x"} if row["step"] < 20 else {}) for row in completions("no", 0.0)]
    assert flagged not in titles(rows(), early), "what went away is no sign of now"


def test_loops() -> None:
    loop = "the number is four and " * 20
    assert repeated_share(loop) > 0.9
    assert repeated_share("one two three") == 0.0
    assert repeated_share(" ".join(f"word{i}" for i in range(50))) == 0.0
    assert "Late completions repeat themselves" in titles(rows(), completions(loop, 0.3))


def formed(row: dict[str, Any], right: int, form: float) -> dict[str, Any]:
    return row | {"reward": right + 0.5 * form, "parts": {"accuracy": right, "format": form}}


def test_one_part_that_makes_the_differences() -> None:
    flagged = "Practice learns mostly one part of the reward"
    both = [formed(row, i % 2, (i // 2) % 2) for i, row in enumerate(completions("no", 0.0))]
    assert flagged not in titles(rows(), both)
    form = [formed(row, int(i % 50 == 0), i % 2) for i, row in enumerate(completions("no", 0.0))]
    assert flagged in titles(rows(), form)
    early = [formed(row, i % 2, 0) if row["step"] > 20 else form[i] for i, row in enumerate(form)]
    assert flagged not in titles(rows(), early)
    solved = [row | {"parts": {"accuracy": row["step"] % 2, "format": 1}, "reward": 1.5} for row in both]
    alike = [row | {"parts": {"accuracy": 0, "format": 0.22}, "reward": 0.11} for row in completions("no", 0.0)]
    assert flagged not in titles(rows(), alike), "equal rewards differ by rounding alone"
    assert flagged not in titles(rows(), solved), "what differs between prompts teaches nothing"


def test_length_that_pays() -> None:
    plain = completions("no", 0.0)
    longer = [row | {"reward": row["reward"] + 0.01 * row["tokens"]} for row in plain]
    shorter = [row | {"reward": row["reward"] - 0.01 * row["tokens"]} for row in plain]
    right = [row | {"tokens": 10 + 5 * row["reward"]} for row in plain]
    unfit = [row | {"reward": None} for row in longer]
    found = [
        [title for title in titles(rows(), texts) if "completions earn more" in title] for texts in (longer, shorter)
    ]
    assert found == [["Longer completions earn more"], ["Shorter completions earn more"]]
    assert titles(rows(), right) == [], "right answers that are longer are no trick"
    assert titles(rows(), unfit) == []


def test_a_phrase_that_spread() -> None:
    flagged = "A phrase spread over the completions"
    boast = "this answer is surely right as every expert would confirm"
    late = [
        row | ({"completion": f"{row['step']} {boast}"} if row["step"] > 15 else {}) for row in completions("", 0.0)
    ]
    assert flagged in titles(rows(), late)
    assert flagged not in titles(rows(), [row | {"completion": f"{row['step']} {boast}"} for row in late]), (
        "always there"
    )
    assert flagged not in titles(rows(), [row | {"prompt": f"say {boast}"} for row in late]), "it was asked for"
    some = [row | ({"completion": f"{i} no"} if i % 2 else {}) for i, row in enumerate(late)]
    assert flagged not in titles(rows(), some), "half is not most"


def test_noise_is_no_movement() -> None:
    values = [0.5, 0.6, 0.4, 0.7, 0.3, 0.5, 0.65, 0.45] * 8
    assert moved([{"x": value} for value in values], "x") == 0.0
    assert moved([{"x": value + i / 10} for i, value in enumerate(values)], "x") > 4
    assert moved([{"x": 1.0}] * 5, "x") == 0.0


def answered(right: str) -> SetResult:
    return SetResult(
        "heldout", tuple(ProblemResult(str(i), one == "1", False, 1, 0, 0, "") for i, one in enumerate(right))
    )


@pytest.mark.parametrize(
    ("before", "after", "tone", "said"),
    [
        ("0" * 60 + "1" * 40, "1" * 20 + "0" * 40 + "1" * 40, "up", "raised held-out accuracy from 40.0% to 60.0%"),
        ("1" * 60 + "0" * 40, "0" * 20 + "1" * 40 + "0" * 40, "down", "lowered held-out accuracy from 60.0% to 40.0%"),
        ("01" * 50, "10" + "01" * 48 + "11", "unclear", "Can't tell whether training changed"),
    ],
)
def test_the_headline_says_whether_the_gain_is_real(before: str, after: str, tone: str, said: str) -> None:
    found = headline(change("base", "grpo", answered(before), answered(after)))
    assert found["tone"] == tone and said in found["title"]
    assert ("problems would show it" in found["detail"]) == (tone == "unclear")


def test_one_problem_in_common_is_no_comparison() -> None:
    assert change("a", "b", answered("1"), answered("1")) is None
    assert headline(None)["tone"] == "unclear"


def test_two_runs_are_told_apart_only_where_the_difference_is_real() -> None:
    weak, strong = answered("0" * 60 + "1" * 40), answered("1" * 20 + "0" * 40 + "1" * 40)
    assert comparison(change("a", "b", weak, strong))["title"] == "b is better than a"
    assert comparison(change("a", "b", strong, weak))["title"] == "b is worse than a"
    assert comparison(change("a", "b", weak, answered("0" * 59 + "1" * 41)))["tone"] == "unclear"
    assert comparison(None)["tone"] == "unclear"


def test_problems_are_the_same_by_what_they_ask_and_not_by_their_number() -> None:
    def asked(names: str, right: str) -> SetResult:
        pairs = zip(names, right, strict=True)
        found = (
            ProblemResult(str(i), one == "1", False, 1, 0, 0, "", problem=name) for i, (name, one) in enumerate(pairs)
        )
        return SetResult("heldout", tuple(found))

    found = change("a", "b", asked("xyz", "110"), asked("zyxw", "1001"))
    assert found is not None
    assert (found["problems"], found["gained"], found["lost"]) == (3, 1, 2)


def test_the_console_is_given_what_is_bad(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=40, prompts=4, completions=4, words=20)
    assert write_report([tmp_path / "run"], tmp_path / "page.html") == []
    lines = [json.loads(line) for line in (tmp_path / "run/completions.jsonl").read_text().splitlines()]
    said = [json.dumps(line | {"completion": "no"}) + "\n" for line in lines]
    (tmp_path / "run/completions.jsonl").write_text("".join(said))
    assert write_report([tmp_path / "run"], tmp_path / "page.html") == ["The same completion answers many prompts"]
