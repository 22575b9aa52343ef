"""Fresh prompts for groups without signal: which are asked for, what is learnt from, and that a run with it goes on
bit by bit."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from reasoner import train
from reasoner.grpo.resample import Sampled, sample
from reasoner.types import Completion, Group, Prompt, Score
from tests.test_pipeline import SMALL, metrics, small
from tests.tiny_rewards import half
from tests.two_ranks import on_two_ranks

COMPLETION = Completion((7,), (True,), (-1.0,), "", "stop", 0, 0)


def prompt(number: int) -> Prompt:
    return Prompt(str(number), "", "", {}, (1,))


def practise(prompts: Sequence[Prompt]) -> list[Group]:
    """Prompts of an even number have signal."""
    return [Group(p, (COMPLETION,) * 2, (Score(1.0, {}), Score(float(int(p.id) % 2), {}))) for p in prompts]


class Source:
    """Prompts one after another, and what was asked for."""

    def __init__(self, *numbers: int):
        self.left, self.asked = list(numbers), []

    def more(self, count: int) -> list[Prompt]:
        self.asked.append(count)
        taken, self.left = self.left[:count], self.left[count:]
        return [prompt(number) for number in taken]


def ids(groups: Sequence[Group]) -> list[int]:
    return [int(group.prompt.id) for group in groups]


def run(first: Sequence[int], source: Source, rounds: int) -> Sampled:
    return sample([prompt(number) for number in first], practise, source.more, rounds=rounds)


def test_without_rounds_nothing_changes() -> None:
    source = Source(2, 4)
    found = run([1, 2, 3], source, rounds=0)
    assert (ids(found.kept), ids(found.dropped), ids(found.first)) == ([1, 2, 3], [], [1, 2, 3])
    assert source.asked == []


def test_groups_without_signal_are_replaced_and_no_more_is_asked_for_than_is_missing() -> None:
    source = Source(5, 6, 7, 8, 10, 12)
    found = run([1, 2, 3, 4], source, rounds=5)
    assert source.asked == [2, 1, 1]  # 5 and 6; 7; 8
    assert ids(found.kept) == [2, 4, 6, 8]
    assert ids(found.dropped) == [1, 3, 5, 7] and ids(found.first) == [1, 2, 3, 4]


def test_when_the_rounds_are_spent_the_batch_is_filled_up_with_what_is_there() -> None:
    source = Source(5, 7, 9, 6)
    found = run([1, 2, 3], source, rounds=1)
    assert source.asked == [2]
    assert ids(found.kept) == [2, 1, 3] and ids(found.dropped) == [5, 7]


def test_a_step_full_of_signal_costs_nothing_more() -> None:
    source = Source(6)
    assert ids(run([2, 4], source, rounds=3).kept) == [2, 4] and source.asked == []


TWO_RANKS = """
from reasoner import world
from tests.grpo.test_resample import Source, ids, run
world.start()
source = Source(6, 8, 10)
found = run([[1, 3], [2, 4]][world.rank()], source, rounds=4)
print(source.asked, ids(found.kept))
world.stop()
"""


def test_ranks_make_the_same_rounds() -> None:
    assert on_two_ranks(TWO_RANKS) == ["[2] [6, 8]\n", "[0] [2, 4]\n"]


def test_a_run_fills_its_batches_counts_the_price_and_goes_on_bit_by_bit(tmp_path: Path) -> None:
    shared = ["stages=[sft,grpo]", "grpo.resample=3", "checkpoint.every=1"]
    small(tmp_path / "whole", *shared, "grpo.steps=4", reward=half)
    rows = [row for row in metrics(tmp_path / "whole") if row["stage"] == "grpo"]
    assert sum(row["resampled_groups"] for row in rows) > 4
    small(tmp_path / "plain", "stages=[sft,grpo]", "grpo.steps=1", reward=half)
    plain = next(row for row in metrics(tmp_path / "plain") if row["stage"] == "grpo")
    assert rows[0]["useful_groups"] > plain["useful_groups"]
    for name in ("reward_mean", "solved_share", "completion_tokens_mean", "cut_share"):
        assert rows[0][name] == pytest.approx(plain[name])  # of prompts that nobody chose by their rewards
    said = [json.loads(line) for line in (tmp_path / "whole" / "completions.jsonl").read_text().splitlines()]
    of_first = [line for line in said if line["step"] == 1]
    assert len(of_first) == 4 * (4 + rows[0]["resampled_groups"])  # dropped ones too
    small(tmp_path / "cut", *shared, "grpo.steps=2", reward=half)
    again = [*SMALL, *shared, "grpo.steps=4", f"out={tmp_path / 'cut'}", f"resume={tmp_path / 'cut'}"]
    train("tiny", overrides=again, reward=half)
    assert [row for row in metrics(tmp_path / "cut") if row["stage"] == "grpo"] == rows
