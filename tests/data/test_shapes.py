"""Rows in the shapes of verl, TRL, ShareGPT and Alpaca: recognised, said, and read as question, answer and system."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasoner.config import Config, Data
from reasoner.data.shapes import shape_of, turns
from reasoner.data.task import load_task
from reasoner.errors import DataError

Conf = Callable[..., Config]
USER, SAID = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4"}
SYSTEM = {"role": "system", "content": "Be short."}
VERL = {"data_source": "sums", "prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "4"}}
VERL_REST = {name: cell for name, cell in VERL.items() if name != "prompt"}
TOLD = {
    "verl": ({**VERL, "extra_info": {"index": 0}}, "4", "", ""),
    "verl, with a system turn": ({**VERL, "prompt": [SYSTEM, USER]}, "4", "", "Be short."),
    "TRL (messages)": ({"messages": [SYSTEM, USER, SAID]}, "It is 4", "It is 4", "Be short."),
    "TRL (messages) with answer": ({"messages": [USER, SAID], "answer": "4"}, "4", "It is 4", ""),
    "TRL (prompt, completion)": ({"prompt": "2+2?", "completion": "It is 4"}, "It is 4", "It is 4", ""),
    "TRL (prompt, completion) in turns": (
        {"prompt": [SYSTEM, USER], "completion": [SAID]},
        "It is 4",
        "It is 4",
        "Be short.",
    ),
    "TRL (prompt, completion) for GRPO": ({"prompt": [USER], "solution": "4"}, "4", "", ""),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "It is 4"}],
            "system": "Be short.",
        },
        "It is 4",
        "It is 4",
        "Be short.",
    ),
    "Alpaca": ({"instruction": "2+2?", "input": "", "output": "It is 4"}, "It is 4", "It is 4", ""),
}


@pytest.mark.parametrize("name", TOLD)
def test_shapes_become_questions_answers_and_worked_examples(conf: Conf, tokenizer: Any, name: str) -> None:
    row, answer, worked, system = TOLD[name]
    data = {"heldout": 0, "template": "chatml", "answer_kind": "text"}
    task = load_task(conf(data, ("sft", "grpo")), tokenizer, [row])
    assert task.notes[0].startswith(f"sft: rows in the shape of {name.split(' ')[0].strip(',')}")
    assert task.notes == tuple(task.lines()[: len(task.notes)])
    (prompt,), (example,) = task.prompts, task.examples
    assert [turn["content"] for turn in prompt.messages] == ([system] if system else []) + ["2+2?"]
    assert prompt.answer == answer
    assert task.template.decode(example.completion_ids) == f"{worked or answer}<|im_end|>"
    assert not {"prompt", "completion", "messages", "conversations"} & prompt.columns.keys()
    assert prompt.columns.get("data_source") == row.get("data_source")
    assert prompt.columns.get("reward_model") == row.get("reward_model")


def test_alpaca_input_is_an_optional_part(conf: Conf, tokenizer: Any) -> None:
    rows = [{"instruction": "Add.", "input": text, "output": "4"} for text in ("2+2", "")]
    task = load_task(conf({"heldout": 0}, ("grpo",)), tokenizer, rows)
    assert [prompt.text for prompt in task.prompts] == ["Add.\n\n2+2", "Add."]
    assert "data.prompt='{instruction}[[\\n\\n{input}]]'" in task.notes[0]


def test_the_conf_comes_before_what_is_recognised(conf: Conf, tokenizer: Any) -> None:
    row = {**VERL, "prompt": [SYSTEM, USER], "hard": "7"}
    data = {"heldout": 0, "template": "chatml", "system": "Think.", "answer": "{hard}", "completion": "x {hard}"}
    task = load_task(conf(data, ("sft", "grpo")), tokenizer, [row])
    assert [turn["content"] for turn in task.prompts[0].messages] == ["Think.", "2+2?"]
    assert task.prompts[0].answer == "7"
    assert task.template.decode(task.examples[0].completion_ids) == "x 7<|im_end|>"
    own = load_task(
        conf({"heldout": 0, "prompt": "{prompt[1][content]}", "answer": "{hard}"}, ("grpo",)), tokenizer, [row]
    )
    assert (own.prompts[0].text, own.notes) == ("2+2?", ())


def test_conversations_of_several_turns_are_dropped_and_counted(conf: Conf, tokenizer: Any) -> None:
    rows = [{"messages": [USER, SAID]}, {"messages": [USER, SAID, USER, SAID]}]
    task = load_task(conf({"heldout": 0, "answer_kind": "text"}, ("sft",)), tokenizer, rows)
    assert (task.report["sft"]["several_turns"], task.report["sft"]["kept"]) == (1, 1)
    assert task.lines()[1] == "sft: 1 examples of 2 rows (1 conversations of several turns)"


def test_control_tokens_in_a_rows_system_text_stay_text(conf: Conf, tokenizer: Any) -> None:
    row = {"messages": [{"role": "system", "content": "a<|im_end|>b"}, USER, SAID]}
    (prompt,) = load_task(conf({"heldout": 0, "template": "chatml"}, ("grpo",)), tokenizer, [row]).prompts
    assert list(prompt.token_ids).count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert prompt.messages[0]["content"] == "a<|im_end|>b"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([SAID], "no question of the user's"),
        ([USER, {"role": "tool", "content": "4"}], "role 'tool': only system, user and assistant"),
        ([{"content": "x"}], "a message without 'role'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "more than text"),
    ],
)
def test_messages_that_are_no_question_name_the_row(conf: Conf, tokenizer: Any, messages: Any, said: str) -> None:
    rows = [{"messages": [USER, SAID]}, {"messages": messages}]
    with pytest.raises(DataError, match=f"row 2: .*{said}"):
        load_task(conf({"heldout": 0}, ("sft",)), tokenizer, rows)


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    found = turns([{"role": "user", "content": parts}])
    assert found is not None and (found.system, found.asked, found.said) == ("", "2+2?", "")


def test_rows_with_a_question_are_left_alone() -> None:
    beside = shape_of({"question": "q", **VERL}, Data())
    assert beside is not None and beside.settings(Data(), VERL) == Data()
    assert beside.columns({"question": "q", **VERL}) == {"question": "q", **VERL_REST}
    assert shape_of({"text": "q"}, Data()) is None


def test_real_rows_of_verl(conf: Conf, tokenizer: Any, shared: Path) -> None:
    data = {
        "path": str(shared / "math/dsr_sub.parquet"),
        "heldout": 0,
        "answer_kind": "latex",
        "max_prompt_tokens": 2048,
    }
    task = load_task(conf(data, ("grpo",)), tokenizer)
    counts = task.report["grpo"]
    assert sum(counts.values()) == 2 * counts["rows"] == 2 * 1209 and counts["kept"] > 1200
    assert task.prompts[0].answer == "\\frac{3}{7}" and task.prompts[0].text.startswith("Find the probability")


def test_verl_rows_with_columns_of_their_own_are_read_by_the_confs_templates(conf: Conf, tokenizer: Any) -> None:
    row = {**VERL, "quiz": "Who lies?", "who": "Zoe", "system": "not a turn"}
    data = {"heldout": 0, "template": "chatml", "answer_kind": "text", "prompt": "{quiz}", "answer": "{who}"}
    task = load_task(conf(data, ("grpo",)), tokenizer, [row])
    (prompt,) = task.prompts
    assert [turn["content"] for turn in prompt.messages] == ["Who lies?"] and prompt.answer == "Zoe"
    assert "prompt" not in prompt.columns and prompt.columns["reward_model"] == row["reward_model"]
    assert task.notes[0].startswith(
        "grpo: rows in the shape of verl, whose column prompt is not read: data.prompt='{quiz}'"
    )
    asked = load_task(conf({**data, "prompt": "{prompt[0][content]}"}, ("grpo",)), tokenizer, [row])
    assert asked.notes == () and asked.prompts[0].messages[0]["content"] == "2+2?"
    with pytest.raises(DataError, match="the column 'prompt' has the name of an argument"):
        load_task(conf(data, ("grpo",)), tokenizer, [{"prompt": "p", "quiz": "q", "who": "w"}])
