"""The built-in rewards other than math (PITFALLS A5, A9, E10, F7)."""

import pytest

from reasoner.errors import RewardError
from reasoner.rewards.exact import exact, numeric
from reasoner.rewards.format import think_format
from reasoner.rewards.length import length


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("12", "12", 1.0),
        (" 12.\n", "12", 1.0),
        ("-3", "-3", 1.0),
        ("3", "-3", 0.0),
        ("12 13", "12", 0.0),
        ("the answer is 12", "12", 0.0),
        ("<think>13</think>12", "12", 1.0),
        ("<think>12", "12", 0.0),
        ("", "12", 0.0),
        ("Paris", "paris", 1.0),
    ],
)
def test_exact(completion: str, answer: str, score: float):
    assert exact(completion, answer) == score


def test_exact_refuses_an_empty_gold():
    with pytest.raises(ValueError, match="empty"):
        exact("", " ")


@pytest.mark.parametrize(
    ("completion", "answer", "tolerance", "score"),
    [
        ("so 5 and then 12.", "12", 0, 1.0),
        ("12 eggs, not 13", "12", 0, 0.0),
        ("it costs $1,450", "1450", 0, 1.0),
        ("16, 17,18", "18", 0, 1.0),
        ("15-3", "3", 0, 1.0),
        ("15 - 3 = -3", "-3", 0, 1.0),
        ("about 3.14", "3.14159", 0.01, 1.0),
        ("about 3.14", "3.14159", 0.001, 0.0),
        ("0.4", "0.1", 0.3, 1.0),  # exactly at the limit, which floats miss
        ("about 3.14", "3.14159", 0, 0.0),
        ("<think>12</think>none", "12", 0, 0.0),
        ("<think>12", "12", 0, 0.0),
        ("", "12", 0, 0.0),
        ("7" * 500, "12", 0, 0.0),
    ],
)
def test_numeric_takes_the_last_number_said(completion: str, answer: str, tolerance: float, score: float):
    assert numeric(completion, answer, tolerance) == score


def test_numeric_refuses_what_is_no_number():
    with pytest.raises(ValueError, match="no number"):
        numeric("12", "twelve")
    for tolerance in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="tolerance"):
            numeric("12", "12", tolerance)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>a</think>4", 1.0),
        ("<think>\na\n</think>\n\\boxed{4}", 1.0),
        ("  <think>a</think> 4 ", 1.0),
        ("<think></think>4", 0.0),
        ("<think> \n</think>4", 0.0),
        ("<think>a</think>", 0.0),
        ("<think>a</think> \n", 0.0),
        ("<think>a", 0.0),
        ("a</think>4", 0.0),
        ("4", 0.0),
        ("", 0.0),
        ("4 <think>a</think>4", 0.0),
        ("</think>a<think>4", 0.0),
        ("<think>a</think>4<think>b</think>5", 0.0),
        ("<think><think>a</think></think>4", 0.0),
        ("<think><think>a</think>4", 0.0),
        ("<think>a</think>4<think>", 0.0),
        ("<think>a</think></think>4", 0.0),
        ("<think></think>" * 50 + "4", 0.0),
        ("<think>a</think>" * 50 + "4", 0.0),
        ("a4", 0.0),  # A9: what is left when special tokens are dropped
    ],
)
def test_e10_one_think_block_in_order_then_an_answer(completion: str, score: float):
    assert think_format(completion) == score


def test_a5_a_template_that_opens_the_think_block_is_allowed_for(load, make_prompt, make_completion):
    rewards = load({"format": "think_format"}, workers=1)
    prompts = [make_prompt("4", prefill="<think>\n"), make_prompt("4")]
    scores = rewards.score(prompts, [make_completion("a</think>\n\\boxed{4}")] * 2)
    assert [score.total for score in scores] == [1.0, 0.0]


def test_length_falls_linearly_inside_the_buffer():
    """DAPO eq. 13 with L_max 100 and L_cache 20, by hand."""
    assert [length(n, 100, 20) for n in (0, 79, 80, 81, 90, 99, 100, 101, 1000)] == pytest.approx(
        [0, 0, 0, -0.05, -0.5, -0.95, -1, -1, -1]
    )


@pytest.mark.parametrize("buffer_tokens", [0, -1, 101])
def test_length_refuses_a_buffer_that_does_not_fit(buffer_tokens: int):
    with pytest.raises(ValueError, match="buffer_tokens"):
        length(10, 100, buffer_tokens)


def test_f7_gym_answers_are_right_or_wrong(load, make_prompt, make_completion):
    reasoning_gym = pytest.importorskip("reasoning_gym")
    rewards = load({"accuracy": "gym_answer"}, workers=1, columns={"task", "metadata", "question"})

    def scores(task: str, entry: dict, answer: str, texts: list[str]) -> list[float]:
        prompt = make_prompt(answer, task=task, metadata=entry["metadata"], question=entry["question"])
        return [
            score.total for score in rewards.score([prompt] * len(texts), [make_completion(text) for text in texts])
        ]

    (entry,) = reasoning_gym.create_dataset("chain_sum", size=1, seed=4)
    gold = entry["answer"]
    partial = f"1 2 {gold}"
    assert 0 < reasoning_gym.get_score_answer_fn("chain_sum")(partial, entry) < 1  # what the task itself would pay
    texts = [gold, f"#### {gold}", f"<think>7</think>\\boxed{{{gold}}}", partial, "", f"<think>{gold}"]
    assert scores("chain_sum", entry, gold, texts) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]

    (entry,) = reasoning_gym.create_dataset("countdown", size=1, seed=4)
    number = str(entry["metadata"]["numbers"][0])
    assert scores("countdown", entry, "one of many", [entry["answer"], number]) == [1.0, 0.0]

    unknown = make_prompt("4", task="chain_summ", metadata={}, question="")
    assert "'chain_summ' not registered" in rewards.score([unknown], [make_completion("4")])[0].failures["accuracy"]


def test_length_and_gym_say_what_they_lack(load):
    with pytest.raises(RewardError, match="asks for 'max_tokens'"):
        load({"length": "length"})
    with pytest.raises(RewardError, match="asks for 'task'"):
        load({"accuracy": "gym_answer"}, columns={"question"})
