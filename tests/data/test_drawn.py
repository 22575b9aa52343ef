"""Rows of a big source, made when they are drawn: the same as made at the start, less what only the tokens tell."""

from collections.abc import Callable
from typing import Any

import pytest

from reasoner.config import Config
from reasoner.data import drawn, task
from reasoner.data.drawn import Drawn
from reasoner.data.order import Draw, Order
from reasoner.data.shown import plain, shown
from reasoner.data.task import Task, load_task
from reasoner.errors import DataError, ModelError
from reasoner.types import Example, Prompt

Conf = Callable[..., Config]


def row(number: int) -> dict[str, str]:
    long = "very " * 20 if number % 5 == 0 else ""
    return {
        "question": f"What is {long}{number} + {number}?",
        "answer": "9" * 30 if number % 7 == 0 else str(2 * number),
    }


ROWS = [row(number) for number in range(60)] + [row(3), row(4)]
SETTINGS: dict[str, Any] = {"heldout": 5, "max_prompt_tokens": 60}


@pytest.fixture
def at_start(conf: Conf, tokenizer: Any) -> Task:
    return load_task(conf(SETTINGS, sft={"max_completion_tokens": 20}), tokenizer, ROWS)


@pytest.fixture
def on_demand(conf: Conf, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setattr(task, "AT_ONCE", 0)
    return load_task(conf(SETTINGS, sft={"max_completion_tokens": 20}), tokenizer, ROWS)


def an_epoch(rows: Drawn[Any]) -> tuple[list[Any], Draw]:
    draw = Draw(Order(len(rows), seed=0), 0, rows.why_not)
    there = len(list(rows))
    return [rows[i] for i in draw.take(there)], draw


def test_what_is_drawn_is_what_is_made_at_the_start(at_start: Task, on_demand: Task) -> None:
    assert isinstance(on_demand.prompts, Drawn) and isinstance(on_demand.examples, Drawn)
    assert tuple(on_demand.prompts) == at_start.prompts and tuple(on_demand.examples) == at_start.examples
    assert on_demand.sets == at_start.sets and on_demand.columns() == at_start.columns()
    assert on_demand.first_prompts(8) == at_start.first_prompts(8)
    prompts, _ = an_epoch(on_demand.prompts)
    assert sorted(p.id for p in prompts) == sorted(p.id for p in at_start.prompts)


def test_every_row_that_is_left_out_is_counted_as_it_is_drawn(at_start: Task, on_demand: Task) -> None:
    for rows, name in ((on_demand.prompts, "grpo"), (on_demand.examples, "sft")):
        assert isinstance(rows, Drawn)
        draw = Draw(Order(len(rows), seed=0), 0, rows.why_not)
        while draw.cursor < len(rows):
            draw.take(1)
        known = {why: count for why, count in at_start.report[name].items() if why in task.AS_DRAWN and count}
        assert known and sum(draw.left_out.values()) >= sum(known.values()) - 1
        assert all(abs(draw.left_out[why] - count) <= 1 for why, count in known.items())
        counts = on_demand.report[name]
        assert not counts.keys() & set(task.AS_DRAWN)  # not known, so not said
        assert counts["kept"] == at_start.report[name]["kept"] + sum(known.values())
        assert {k: v for k, v in counts.items() if k != "kept"} == {
            k: v for k, v in at_start.report[name].items() if k in counts and k != "kept"
        }
    assert "counted as they are drawn" in on_demand.lines()[0]


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_g6_a_draw_goes_on_from_its_cursor(on_demand: Task, cut: int) -> None:
    rows = on_demand.prompts
    assert isinstance(rows, Drawn)
    whole, first = (Draw(Order(len(rows), seed=1), 0, rows.why_not) for _ in range(2))
    taken = first.take(cut)
    second = Draw(Order(len(rows), seed=1), first.cursor, rows.why_not, dict(first.left_out))
    assert taken + second.take(80 - cut) == whole.take(80)
    assert (second.cursor, second.left_out) == (whole.cursor, whole.left_out)


def test_batch_size_does_not_change_the_order(on_demand: Task) -> None:
    rows = on_demand.prompts
    assert isinstance(rows, Drawn)
    one, other = (Draw(Order(len(rows), seed=1), 0, rows.why_not) for _ in range(2))
    assert [i for _ in range(20) for i in one.take(4)] == [i for _ in range(8) for i in other.take(10)]


def test_a_row_without_a_use_is_left_out_but_all_rows_without_one_stop_the_run(on_demand: Task) -> None:
    draw = Draw(Order(3, seed=0), 0, lambda row: "long_prompts")
    with pytest.raises(DataError, match=r"none of the 3 rows can be trained on: \{'long_prompts'"):
        draw.take(1)


def test_what_is_wrong_with_a_late_row_leaves_it_out_and_with_an_early_one_stops_the_run(
    conf: Conf, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "AT_ONCE", 0)
    rows = [{"question": f"q{i} " if i == 5 else f"q{i}.", "answer": "1"} for i in range(8)]  # plain: ends in a space
    with pytest.raises(DataError, match="row 6: this plain prompt ends in a space"):
        load_task(conf({"heldout": 0}, ("grpo",)), tokenizer, rows)
    monkeypatch.setattr(drawn, "TRIED", 3)
    late = load_task(conf({"heldout": 0}, ("grpo",)), tokenizer, rows).prompts
    assert isinstance(late, Drawn) and late.first_unfit is None
    assert [late.why_not(i) for i in range(8)] == [None] * 5 + [drawn.UNFIT] + [None] * 2
    assert late.first_unfit is not None and late.first_unfit.startswith("row 6: this plain prompt")
    with pytest.raises(DataError, match="left out"):
        late[5]


def test_a12_lost_characters_leave_out_every_row_that_holds_them(
    conf: Conf, real: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "AT_ONCE", 0)
    rows = [{"question": f"is {i}{' = x' if i > 4 else ''} so", "answer": "1"} for i in range(8)]
    with pytest.raises(ModelError, match="loses the characters ="):
        load_task(conf({"heldout": 0}, ("grpo",)), real("models/TinyStories-656K"), rows)
    monkeypatch.setattr(drawn, "TRIED", 3)
    late = load_task(conf({"heldout": 0}, ("grpo",)), real("models/TinyStories-656K"), rows).prompts
    assert len(list(late)) == 5


def test_the_data_command_says_of_how_many_rows_it_speaks(on_demand: Task, conf: Conf) -> None:
    lines = [plain(pieces) for pieces in shown(on_demand, conf(SETTINGS, sft={"max_completion_tokens": 20}))]
    assert any(line.startswith("grpo: tokens a prompt of the first ") for line in lines)
    assert isinstance(on_demand.prompts[1], Prompt) and isinstance(on_demand.examples[:9][0], Example)


def test_a_big_source_of_which_nothing_fits_is_refused_at_the_start(
    conf: Conf, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "AT_ONCE", 0)
    with pytest.raises(DataError, match=r"grpo: the first 60 of 60 rows are too long: raise data\.max_prompt_tokens"):
        load_task(conf({"heldout": 0, "max_prompt_tokens": 2}, ("grpo",)), tokenizer, ROWS)
