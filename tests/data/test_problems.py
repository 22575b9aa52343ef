"""Rows as problems: F2, F4, and which columns go where."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasoner.config import Data
from reasoner.data.codec import Codec
from reasoner.data.files import read_file
from reasoner.data.problems import Problem, make_problems
from reasoner.data.rows import Row, Rows, read_rows
from reasoner.errors import ConfigError, DataError

NAN = float("nan")


def plain(text: str) -> str:
    return text


def problems_of(rows: list[dict[str, Any]], *, worked: bool = False, **settings: Any) -> list[Problem]:
    return make_problems(read_rows(Data(), rows), Data(**settings), plain, worked=worked)[0]


def test_a_problem_has_every_column_and_the_kind_of_answer() -> None:
    row = {"question": "2+2?", "answer": "4", "level": "easy", "n": 1}
    (problem,) = problems_of([row], prompt="Q: {question}", answer_kind="choice")
    assert problem == Problem(
        number=1,
        where="row 1",
        question="Q: 2+2?",
        wording="2+2?",
        answer="4",
        completion="",
        columns={"answer_kind": "choice", **row},
    )
    assert problems_of([{**row, "answer_kind": "mine"}])[0].columns["answer_kind"] == "mine"


@pytest.mark.parametrize("blank", ["", "  \n", None, NAN])
@pytest.mark.parametrize("column", ["question", "answer", "solution"])
def test_f4_blank_cells_are_dropped_and_counted(blank: Any, column: str) -> None:
    good = {"question": "q", "answer": "1", "solution": "s"}
    rows = read_rows(Data(), [good, {**good, column: blank}])
    problems, counts = make_problems(rows, Data(completion="{solution}"), plain, worked=True)
    assert [problem.number for problem in problems] == [1]
    assert counts == {"rows": 2, "dropped_by_map": 0, "empty": 1}


def test_f4_three_blank_rows_make_no_prompt() -> None:
    problems, counts = make_problems(
        read_rows(Data(), [{"question": q, "answer": "1"} for q in ("", None, NAN)]), Data(), plain, worked=False
    )
    assert (len(problems), counts["empty"]) == (0, 3)


def test_a_task_without_answers_says_so_with_an_empty_template() -> None:
    (problem,) = problems_of([{"question": "Write a poem."}], answer="")
    assert problem.answer == ""


@pytest.mark.parametrize("name", ["prompt", "completion", "completions", "completion_ids", "prompts", "num_tokens"])
def test_f4_columns_that_shadow_a_rewards_arguments(name: str) -> None:
    with pytest.raises(DataError, match=rf"row 1: the column '{name}' has the name of an argument.*data\.map"):
        problems_of([{"question": "q", "answer": "1", name: "x"}])


def test_f4_prompt_and_completion_may_be_the_source() -> None:
    rows = [{"prompt": "2+2?", "completion": "It is 4.", "answer": "4"}]
    (problem,) = problems_of(rows, prompt="{prompt}", completion="{completion}", worked=True)
    assert (problem.question, problem.completion) == ("2+2?", "It is 4.")
    assert problem.columns == {"answer_kind": "number", "answer": "4"}
    chat = [{"prompt": [{"role": "user", "content": "2+2?"}], "reward_model": {"ground_truth": "4"}}]
    (problem,) = problems_of(chat, prompt="{prompt[0][content]}", answer="{reward_model[ground_truth]}")
    assert (problem.question, problem.answer) == ("2+2?", "4")


def test_f2_calculator_marks_leave_the_worked_answer() -> None:
    row = {"question": "q << 3 >>", "answer": "He has 48/2 = <<48/2=24>>24.\n#### 24"}
    settings: dict[str, Any] = {"completion": "{answer}", "answer_pattern": r"####\s*(.+)"}
    (problem,) = problems_of([row], worked=True, **settings)
    assert problem.completion == "He has 48/2 = 24.\n#### 24"
    assert problem.question == "q << 3 >>"
    (problem,) = problems_of([row], worked=True, strip_calculator_marks=False, **settings)
    assert problem.completion == row["answer"]


def test_f2_no_mark_is_left_in_gsm8k(shared: Path) -> None:
    rows = [Row(row, where, i) for i, (row, where) in enumerate(read_file(shared / "gsm8k/train.jsonl"), start=1)]
    data = Data(completion="{answer}", answer_pattern=r"####\s*(.+)")
    problems, counts = make_problems(Rows(rows, 0), data, plain, worked=True)
    assert len(problems) == 7473 and counts["empty"] == 0
    assert sum("<<" in row.columns["answer"] for row in rows) == 7378
    assert not any("<<" in problem.completion or ">>" in problem.completion for problem in problems)
    assert all(
        problem.completion.endswith(f"#### {problem.answer}") or "," in problem.completion for problem in problems
    )


def test_the_answer_is_the_worked_answer_where_nothing_else_is_said() -> None:
    (problem,) = problems_of([{"question": "q", "answer": 4.0}], worked=True)
    assert problem.completion == "4"


def test_a13_row_text_is_guarded_and_conf_text_is_not(tokenizer: Any) -> None:
    codec = Codec(tokenizer)
    rows = Rows([Row({"question": "a<|im_end|>", "answer": "1", "s": "b<|im_end|>"}, "f:1", 1)], 0)
    data = Data(prompt="<|im_end|>{question}", completion="{s}<|im_end|>")
    ((problem,), _) = make_problems(rows, data, codec.guard, worked=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert codec.encode(problem.question).count(end) == codec.encode(problem.completion).count(end) == 1
    assert problem.wording == "a<|im_end|>"  # what is compared is the row's text as it is


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"prompt": "{problem}"},
            "f:7: no column 'problem', which data.prompt='{problem}' asks for; there are: question",
        ),
        ({"answer_pattern": "#(.)"}, "f:7: data.answer_pattern=#(.) finds no answer in '1'"),
        ({"completion": "{solution}"}, "f:7: no column 'solution', which data.completion="),
    ],
)
def test_errors_name_the_place_of_the_row(settings: dict[str, Any], said: str) -> None:
    rows = Rows([Row({"question": "q", "answer": "1"}, "f:7", 7)], 0)
    with pytest.raises(DataError) as caught:
        make_problems(rows, Data(**settings), plain, worked=True)
    assert said in str(caught.value)


def test_a_prompt_without_columns_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.prompt='question' names no column"):
        problems_of([{"question": "q"}], prompt="question")


REAL: dict[str, dict[str, Any]] = {
    "gsm8k/test.jsonl": {"answer_pattern": r"####\s*(.+)", "completion": "{answer}"},
    "math/train.jsonl": {"prompt": "{problem}", "answer": "{solution}", "answer_pattern": "boxed"},
    "math/math500.jsonl": {"prompt": "{problem}"},
    "math/dsr_sub.parquet": {"prompt": "{prompt[0][content]}", "answer": "{reward_model[ground_truth]}"},
    "logic/3ppl_train.parquet": {"prompt": "{prompt[0][content]}", "answer": "{solution_text}"},
    "word_problems/mawps_asdiv-a_train.csv": {"map": "reasoner.data.word_problems:fill_numbers"},
    "word_problems/svamp_test.jsonl": {"prompt": "{Body} {Question}", "answer": "{Answer}"},
    "word_problems/SVAMP.json": {"map": "reasoner.data.word_problems:svamp"},
    "word_problems/mawps_test.jsonl": {"prompt": "{input}", "answer": "{target}"},
    "word_problems/asdiv_test.jsonl": {"prompt": "{body} {question}", "answer_pattern": r"(.+?)(?: \(.*)?$"},
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_load_by_a_data_section_alone(shared: Path, name: str) -> None:
    kind = "latex" if name.startswith("math") else "text" if "asdiv_test" in name or "logic" in name else "number"
    data = Data(path=str(shared / name), answer_kind=kind, **REAL[name])
    problems, counts = make_problems(read_rows(data), data, plain, worked=True)
    assert len(problems) == counts["rows"] - counts["dropped_by_map"] - counts["empty"]
    assert (counts["dropped_by_map"], counts["empty"]) == {
        "word_problems/mawps_asdiv-a_train.csv": (9, 0),
        "math/train.jsonl": (0, 2),
        "math/dsr_sub.parquet": (0, 1),
    }.get(name, (0, 0))
    assert all(problem.answer.strip() and problem.question.strip() for problem in problems)


def test_problems_need_no_tokenizer() -> None:
    make: Callable[[str], str] = str.upper
    (problem,) = make_problems(read_rows(Data(), [{"question": "q", "answer": "a"}]), Data(), make, worked=True)[0]
    assert (problem.question, problem.completion, problem.answer) == ("Q", "A", "a")


def test_a_column_of_an_optional_part_that_no_row_has_is_a_slip() -> None:
    rows = [{"question": "q", "answer": "1"}, {"question": "r", "answer": "2", "hint": "h"}]
    assert [one.question for one in problems_of(rows, prompt="{question}[[ {hint}]]")] == ["q", "r h"]
    with pytest.raises(
        DataError, match=r"no row has the column 'hnit', which an optional part \[\[\.\.\.\]\] asks for"
    ):
        problems_of(rows, prompt="{question}[[ {hnit}]]")
    assert problems_of(rows, prompt="{question}", completion="{question}[[ {hnit}]]")  # no SFT, so nobody asks for it
