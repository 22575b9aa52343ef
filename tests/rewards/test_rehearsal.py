"""The rehearsal before a model loads: what it refuses and what it warns of (PITFALLS E3, E8, E10, E12)."""

import pytest

from reasoner.config import RewardPart
from reasoner.errors import RewardError
from reasoner.rewards.rehearsal import rehearse


@pytest.fixture
def golds(make_prompt):
    return [(make_prompt(str(i), row=f"train:{i}"), f"So it is {i}.\n#### {i}") for i in (17, 18, 19)]


def refused(rewards, golds, accuracy="accuracy") -> str:
    with pytest.raises(RewardError) as caught:
        rehearse(rewards, golds, accuracy=accuracy)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_reward_passes_without_a_word(load, golds):
    parts = {
        "accuracy": "math",
        "length": RewardPart(fn="length", weight=0.1, options={"max_tokens": 99, "buffer_tokens": 9}),
    }
    assert rehearse(load(parts), golds, accuracy="accuracy") == []
    assert rehearse(load(parts), golds) == []
    assert rehearse(load(parts), []) == []


def test_e3_a_gold_below_full_marks_names_the_row(load, golds):
    message = refused(load({"accuracy": "math"}), [golds[0], (golds[1][0], "so it is 18"), (golds[2][0], "#### 18")])
    assert "'accuracy' gives 2 of 3 gold completions less than 1.0" in message
    assert "row train:18: gold answer '18', completion ending in 'so it is 18', score 0" in message
    assert "data.answer" in message


def test_a_part_that_is_not_the_accuracy_may_give_a_gold_less(load, golds):
    assert rehearse(load({"accuracy": "math", "format": "think_format"}), golds, accuracy="accuracy") == []


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda completion: 1 / len(completion), "ZeroDivisionError: division by zero (test_rehearsal.py:"),
        (lambda completion: float("nan"), "returned nan"),
        (lambda completion: "1.0", "returned str"),
        (lambda completion: [1.0] * 8, "returned list of 8"),
        (lambda completion: None, "returned None (does not apply) for all 4 completions"),
        (lambda completion: exec("while True: pass"), "timed out after 2 s"),
    ],
)
def test_e8_a_reward_that_breaks_is_refused(load, golds, function, reason):
    message = refused(load({"part": RewardPart(fn="f", timeout_s=2.0)}, f=function), golds[:1], accuracy=None)
    assert "'part'" in message
    assert reason in message


def test_a_failure_names_completion_and_row(load, golds):
    message = refused(load({"part": "f"}, f=lambda completion: completion.index("####")), golds, accuracy=None)
    assert (
        "failed on an empty completion for row train:17 (gold answer '17'): ValueError: substring not found" in message
    )


def test_a_part_that_applies_sometimes_is_fine(load, golds):
    parts = {"accuracy": "math", "part": "f"}
    assert rehearse(load(parts, f=lambda answer: 1 if answer == "18" else None), golds, accuracy="accuracy") == []


def test_an_accuracy_that_is_no_part(load, golds):
    assert "did you mean 'accuracy'?" in refused(load({"accuracy": "math"}), golds, accuracy="accurracy")


def test_e10_a_wrong_completion_that_earns_as_much_is_a_warning(load, golds):
    parts = {"accuracy": "math", "anything": RewardPart(fn="f", weight=2.0)}
    (warning,) = rehearse(load(parts, f=lambda completion: completion == ""), golds, accuracy="accuracy")
    assert "an empty completion for row train:17 earns 2, no less than the gold completion of that row (1)" in warning
    (warning,) = rehearse(load({"accuracy": "f"}, f=lambda completion: 1.0), golds, accuracy="accuracy")
    assert "weigh accuracy" in warning


def test_a_swapped_gold_is_a_wrong_completion(load, golds):
    (warning,) = rehearse(load({"accuracy": "f"}, f=lambda completion: completion.startswith("So it is")), golds)
    assert warning.startswith("the gold completion of row train:18 for row train:17 earns 1")
    alike = [golds[0], (golds[0][0], golds[0][1])]
    assert rehearse(load({"accuracy": "math"}), alike, accuracy="accuracy") == []


def count(completion, seen=[]):  # noqa: B006
    seen.append(completion)
    return 1.0 + 0.01 * len(seen)


def new_texts_only(completion, seen=set()):  # noqa: B006
    new = completion not in seen
    seen.add(completion)
    return 1.0 if new else 0.0


def longer_than_the_last(completion, last=[""]):  # noqa: B006
    longer = len(completion) > len(last[0])
    last[0] = completion
    return float(longer)


def by_process(completion):
    return hash(completion) % 1000 / 1000  # seeded anew in every process


def by_chance(completion):
    import random

    return random.random()


@pytest.mark.parametrize("function", [count, new_texts_only, longer_than_the_last, by_process, by_chance])
def test_e12_a_reward_that_depends_on_more_than_its_arguments_is_a_warning(load, golds, function):
    warnings = rehearse(load({"part": "f"}, f=function), golds)
    assert "got different scores: a reward should depend on its arguments alone" in warnings[-1]
