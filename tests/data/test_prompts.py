"""Prompts and worked examples in token ids: A1, A4, A8, B4, F6."""

from collections.abc import Sequence
from typing import Any

import pytest

from reasoner.config import Data
from reasoner.data.examples import make_examples
from reasoner.data.problems import Problem
from reasoner.data.prompts import make_prompts
from reasoner.data.templates import Template, make_template
from reasoner.errors import DataError
from reasoner.types import Prompt


def problem(question: str, completion: str = "", number: int = 1) -> Problem:
    return Problem(number, f"train.jsonl:{number}", question, question, "4", completion, {"level": "easy"})


@pytest.fixture
def plain(tokenizer: Any) -> Template:
    return make_template(tokenizer, Data(template="plain"))


@pytest.fixture
def chatml(tokenizer: Any) -> Template:
    return make_template(tokenizer, Data(template="chatml"))


def test_a_prompt_is_the_rendered_row(chatml: Template) -> None:
    ((source, prompt),), num_long = make_prompts(
        [problem("2+2?", number=17)], Data(system="Be brief."), chatml, "gsm8k"
    )
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert (source.number, num_long) == (17, 0)
    assert prompt == Prompt(
        id="gsm8k:17",
        text=text,
        answer="4",
        columns={"level": "easy"},
        token_ids=chatml.codec.encode(text),
        messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}),
    )


def test_f6_long_prompts_are_dropped_and_counted_never_cut(plain: Template) -> None:
    asked = [problem("x" * 10, number=1), problem("x" * 8, number=2), problem("x" * 9, number=3)]
    made, num_long = make_prompts(asked, Data(max_prompt_tokens=8), plain, "grpo")
    assert [(prompt.id, len(prompt.token_ids)) for _, prompt in made] == [("grpo:2", 8)]
    assert num_long == 2


def test_a_row_is_made_a_problem_once(plain: Template) -> None:
    """Which costs a call of the user's `data.map`, and its columns' templates."""
    made: list[int] = []

    class Lazy(Sequence[Problem]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, place: Any) -> Any:
            if place >= 3:
                raise IndexError
            made.append(place)
            return problem("q", number=place)

    prompts, _ = make_prompts(Lazy(), Data(), plain, "sft")
    assert [prompt.id for _, prompt in prompts] == ["sft:0", "sft:1", "sft:2"] and made == [0, 1, 2]


def test_b4_long_worked_answers_are_dropped_and_counted_never_cut(plain: Template) -> None:
    problems = [problem("q", "x" * length, number=length) for length in (10, 8, 7)]
    prompts, _ = make_prompts(problems, Data(), plain, "sft")
    made, num_long = make_examples(prompts, plain, max_completion_tokens=8)
    assert [(source.number, len(example.completion_ids)) for source, example in made] == [(7, 8)]  # the stop id counts
    assert num_long == 2


def test_a1_the_stop_id_is_learnt_though_it_is_the_pad_too(plain: Template) -> None:
    tokenizer = plain.codec.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == plain.turn_end_id
    prompts, _ = make_prompts([problem("q", "a")], Data(), plain, "sft")
    ((_, example),), _ = make_examples(prompts, plain, 8)
    assert example.completion_ids == (*plain.codec.encode("a"), tokenizer.eos_token_id)


def test_a8_an_example_is_prompt_ids_and_completion_ids_made_apart(plain: Template) -> None:
    prompts, _ = make_prompts([problem("4", "2")], Data(), plain, "sft")
    ((_, example),), _ = make_examples(prompts, plain, 8)
    assert example.prompt.token_ids == plain.codec.encode("4")
    assert example.completion_ids[:-1] == plain.codec.encode("2")
    assert len(plain.codec.encode("42")) == 1


def test_a5_examples_leave_out_what_the_template_wrote(tokenizer: Any, tmp_path: Any) -> None:
    path = tmp_path / "think.jinja"
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    template = make_template(tokenizer, Data(template=str(path)))
    prompts, _ = make_prompts(
        [problem("q", "<think>\na</think>4"), problem("q", "a</think>4")], Data(), template, "sft"
    )
    made, _ = make_examples(prompts, template, 100)
    assert [template.decode(example.completion_ids) for _, example in made] == ["a</think>4<|im_end|>"] * 2
    assert made[0][1].prompt.prefill == "<think>\n"
    with pytest.raises(DataError, match=r"train\.jsonl:1: the chat template begins every answer with"):
        make_examples(make_prompts([problem("q", "4")], Data(), template, "sft")[0], template, 100)


def test_a8_a_row_that_makes_a_plain_prompt_end_in_a_space_is_named(plain: Template) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:3: this plain prompt ends in a space"):
        make_prompts([problem("q", number=2), problem("r ", number=3)], Data(), plain, "sft")
