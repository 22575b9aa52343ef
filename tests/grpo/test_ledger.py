"""The ledger of pass rates: who rests and for how long, its file, and runs that are drawn by it. G6."""

import json
from pathlib import Path

import pytest

from reasoner import train
from reasoner.data.order import Draw, Order
from reasoner.errors import ConfigError, RunFolderError
from reasoner.grpo.advantages import judge
from reasoner.grpo.ledger import RESTING, Ledger, Visit, visits
from reasoner.types import Completion, Group, Prompt, Score
from tests.test_pipeline import SMALL, metrics, weights
from tests.tiny_rewards import close_enough

ABOUT = {"model": "m", "reward": "accuracy: math"}
SAID = Completion((1,), (True,), (0.0,), "x", "stop", 0, 0)


def prompt(number: int) -> Prompt:
    return Prompt(f"grpo:{number}", f"{number}+1=", str(number + 1), {}, (1, 2))


def group(number: int, *scores: Score) -> Group:
    return Group(prompt(number), (SAID,) * len(scores), scores)


RIGHT, WRONG, NEAR = (Score(total, {"accuracy": float(total == 1)}) for total in (1.0, 0.0, 0.4))
FAILED = Score(0.0, {}, {"accuracy": "timed out"})


def told(*groups: Group) -> list[Visit]:
    return visits(judge(groups, advantage="group", scale="none"), "accuracy")


def test_a_visit_tells_what_the_rewards_say_of_its_group() -> None:
    found = told(
        group(1, RIGHT, WRONG), group(2, RIGHT, RIGHT), group(3, WRONG, NEAR), group(4, FAILED, RIGHT), group(5, FAILED)
    )
    assert [(v.prompt.id[-1], v.solved, v.total, v.signal) for v in found] == [
        ("1", 1, 2, True),
        ("2", 2, 2, False),
        ("3", 0, 2, True),  # never right, and yet there is something to learn
        ("4", 1, 1, False),
    ]


def test_prompts_without_signal_rest_longer_each_time_and_come_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.jsonl", ABOUT)
    rests = []
    for seen in [(WRONG, WRONG)] * 5 + [(RIGHT, WRONG), (RIGHT, RIGHT)]:
        ledger.note(told(group(1, *seen)))
        rests.append(0)
        while ledger.turn(prompt(1)) == RESTING:
            rests[-1] += 1
    assert rests == [1, 3, 7, 7, 7, 0, 1]
    assert ledger.turn(prompt(2)) is None


def test_the_order_stays_the_seeds_own_less_those_who_rest(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.jsonl", ABOUT)
    draw = Draw(Order(4, seed=0), 0, lambda row: ledger.turn(prompt(row)))
    drawn = []
    for _ in range(32):  # 0 is always solved, 1 hopeless, 2 and 3 have signal
        (row,) = draw.take(1)
        drawn.append(row)
        ledger.note(told(group(row, *((RIGHT, RIGHT), (WRONG, WRONG), (RIGHT, WRONG), (NEAR, WRONG))[row])))
    counts = [drawn.count(row) for row in range(4)]
    assert counts[0] == counts[1] == 3 and counts[2] + counts[3] == 26
    assert draw.cursor == 32 + draw.left_out[RESTING]
    seeded = [row for row in Order(4, seed=0).take(0, draw.cursor) if row > 1]
    assert [row for row in drawn if row > 1] == seeded


def test_nobody_is_lost_where_all_rest(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.jsonl", ABOUT)
    for _ in range(4):
        ledger.note(told(group(0, WRONG, WRONG), group(1, RIGHT, RIGHT)))
    draw = Draw(Order(2, seed=0), 0, lambda row: ledger.turn(prompt(row)))
    assert sorted(draw.take(2)) == [0, 1] and draw.left_out[RESTING] == 14


def test_the_file_lists_the_hopeless_first_with_their_texts_and_is_read_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "l.jsonl", ABOUT)
    ledger.note(told(group(1, RIGHT, RIGHT), group(2, WRONG, WRONG), group(3, RIGHT, WRONG)))
    ledger.note(told(group(2, WRONG, WRONG)))
    ledger.write()
    head, *rows = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert head == {"ledger": ABOUT}
    assert [(row["text"], row["answer"], row["solved"], row["total"]) for row in rows] == [
        ("2+1=", "3", 0, 4),
        ("3+1=", "4", 1, 2),
        ("1+1=", "2", 2, 2),
    ]
    again = Ledger(ledger.path, ABOUT)
    again.read()
    assert again.entries == ledger.entries
    assert again.lines()[0].startswith("ledger: 3 prompts tried, 1 always solved, 1 never; they are in ")
    assert again.lines()[1:] == ["never solved in 4: '2+1=', answer '3'"]
    with pytest.raises(ConfigError, match=r"grpo\.ledger=.* is of \{'model': 'm'.*this run of"):
        Ledger(ledger.path, {"model": "other", "reward": "accuracy: math"}).read()


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c", "\n", "\r"])
def test_a_prompt_may_hold_any_line_end(tmp_path: Path, mark: str) -> None:
    ledger = Ledger(tmp_path / "l.jsonl", ABOUT)
    ledger.note([Visit(Prompt("grpo:1", f"a{mark}b", f"1{mark}", {}, (1,)), 0, 2, False)])
    ledger.write()
    again = Ledger(ledger.path, ABOUT)
    again.read()
    assert again.entries == ledger.entries


@pytest.mark.parametrize("text", ["", "[]\n", "{}\n", '{"ledger": {}}\n{"key": "a", "solved": 1, "odd": 2}\n', "\x00"])
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "l.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"grpo\.ledger=.*l\.jsonl is no ledger of ours"):
        Ledger(tmp_path / "l.jsonl", ABOUT).read()


def test_a_place_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"can't write grpo\.ledger=.*file/l\.jsonl"):
        Ledger(tmp_path / "file" / "l.jsonl", ABOUT).write()


RUN = ["stages=[sft,grpo]", "sft.steps=2", "data.size=60", "data.heldout=20", "grpo.prompts_per_step=16"]


def run(out: Path, ledger: Path, *overrides: str) -> None:
    given = [*SMALL, *RUN, f"out={out}", f"grpo.ledger={ledger}", *overrides]
    train("tiny", overrides=given, reward=close_enough)


def test_g6_a_run_with_a_ledger_goes_on_bit_by_bit_and_hands_it_to_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "whole", tmp_path / "whole.jsonl", "grpo.steps=6")
    said = capsys.readouterr().out
    assert "resting)" in said and "ledger: " in said
    run(tmp_path / "run", tmp_path / "run.jsonl", "grpo.steps=3")
    (tmp_path / "run.jsonl").write_text(json.dumps({"ledger": json.loads(head(tmp_path / "run.jsonl"))["ledger"]}))
    run(tmp_path / "run", tmp_path / "run.jsonl", "grpo.steps=6", f"resume={tmp_path / 'run'}")  # not from the file
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert all(weights(tmp_path / "run")[name].equal(one) for name, one in weights(tmp_path / "whole").items())
    assert (tmp_path / "run.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    capsys.readouterr()
    run(tmp_path / "next", tmp_path / "whole.jsonl", "grpo.steps=1")  # from the first step on
    first = [
        [json.loads(line)["id"] for line in (tmp_path / name / "completions.jsonl").read_text().splitlines()][:64]
        for name in ("whole", "next")
    ]
    assert first[0] != first[1]


def head(path: Path) -> str:
    return path.read_text().splitlines()[0]
