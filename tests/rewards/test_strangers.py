"""Reward functions of TRL, verl, verifiers and reasoning-gym themselves, from those packages.

TRL and reasoning-gym come with the extra `dev`. verl and verifiers ask for other versions of what we use or for much
that a reward doesn't need, so their tests skip unless both are put beside the others by hand:
`pip install --no-deps verl==0.9.1 verifiers==0.1.9` and then what their imports miss.
"""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from reasoner.config import RewardPart


@pytest.fixture
def scores(load, make_prompt, make_completion):
    """Scores of these texts by one function, in a chat, with a row of columns."""

    def run(fn, texts, *, answer="18", options=None, num_tokens=3, row=None, **functions):
        row = row or {}
        part = RewardPart(fn=fn, options=options or {}, timeout_s=60.0)
        rewards = load({"p": part}, workers=1, columns=set(row), **functions)
        prompt = replace(make_prompt(answer, **row), messages=({"role": "user", "content": "?"},))
        found = rewards.score([prompt] * len(texts), [make_completion(text, num_tokens) for text in texts])
        assert [score.failures for score in found] == [{}] * len(texts)
        return [score.parts.get("p") for score in found]

    return run


def importable(module: str) -> None:
    """Skip where it isn't; asked of a process of its own, since some of these change the one that imports them."""
    if subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{module} can't be imported here")


def test_trl_think_format(scores):
    texts = ["<think>a</think>4", "<think>a", "4"]
    assert scores("trl.rewards:think_format_reward", texts) == [1.0, 0.0, 0.0]


def test_trl_accuracy(scores):
    texts = [r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}", "none"]
    assert scores("trl.rewards:accuracy_reward", texts, row={"solution": r"$\frac{1}{3}$"}) == [1.0, 0.0, 0.0]
    assert scores("trl.rewards:accuracy_reward", texts[:1], row={"solution": "nothing to read"}) == [None]
    texts = [rf"<think>a</think>{texts[0]}", texts[0]]
    assert scores("trl.rewards:reasoning_accuracy_reward", texts, row={"solution": "$1/3$"}) == [1.0, 0.0]


def test_trl_functions_that_a_function_makes(scores):
    from trl.rewards import get_cosine_scaled_reward, get_repetition_penalty_reward, get_soft_overlong_punishment

    assert scores("f", ["x"], num_tokens=90, f=get_soft_overlong_punishment(100, 20)) == [-0.5]
    assert scores("f", ["x"], num_tokens=5, f=get_repetition_penalty_reward(ngram_size=2)) == [-0.75]
    texts, row = [r"\boxed{4}", r"\boxed{5}"], {"solution": "$4$"}
    made = get_cosine_scaled_reward(max_len=100)
    assert scores("f", texts, num_tokens=50, row=row, f=made) == pytest.approx([0.75, -0.75])


def test_reasoning_gym_score_answer(scores):
    import reasoning_gym

    (entry,) = reasoning_gym.create_dataset("countdown", size=1, seed=4)
    score_answer = reasoning_gym.get_score_answer_fn("countdown")
    row = {"question": entry["question"], "metadata": entry["metadata"]}
    texts = [entry["answer"], f"<think>?</think>#### {entry['answer']}", "no idea"]
    found = scores("f", texts, answer=entry["answer"], row=row, f=score_answer)
    assert found == [1.0, 1.0, score_answer("no idea", entry)]
    assert json.dumps(found)


VERL = "verl.utils.reward_score"


@pytest.mark.parametrize(
    ("source", "gold", "texts", "wanted"),
    [
        ("openai/gsm8k", "18", ["#### 18", "#### 17", "18"], [1.0, 0.0, 0.0]),
        ("HuggingFaceH4/MATH-500", "18", [r"\boxed{18}", r"\boxed{17}"], [1.0, 0.0]),
        ("math_dapo", "18", ["Answer: 18", "Answer: 17"], [1.0, -1.0]),
    ],
)
def test_verl_default_compute_score(scores, source, gold, texts, wanted):
    importable(VERL)
    found = scores(f"{VERL}:default_compute_score", texts, answer=gold, row={"data_source": source})
    assert found == wanted


def test_verl_functions_of_one_data_source_and_of_batches(scores):
    importable(VERL)
    assert scores(f"{VERL}.gsm8k:compute_score", ["#### 18", "so 18"]) == [1.0, 0.0]
    options = {"method": "flexible", "format_score": 0.1}
    assert scores(f"{VERL}.gsm8k:compute_score", ["so 18", "so 17"], options=options) == [1.0, 0.1]
    batched = f"{VERL}.math_batch:compute_score_batched"
    assert scores(batched, [r"\boxed{18}", "18"], row={"data_source": "x"}) == [1.0, 0.0]


def test_verifiers_rubric_functions(scores, tmp_path):
    importable("verifiers")
    (tmp_path / "rubrics.py").write_text(
        "import functools\nimport verifiers as vf\n"
        "from verifiers.rubrics.math_rubric import MathRubric\n"
        "rubric = MathRubric()\n"
        "correct = functools.partial(rubric.correct_answer, parser=rubric.parser)\n"
        "parser = vf.XMLParser(['think', 'answer'])\n"
        "shape = parser.get_format_reward_func()\n"
    )
    assert scores("rubrics.py:correct", [r"\boxed{18}", r"\boxed{17}", ""]) == [1.0, 0.0, 0.0]
    good = "<think>\na\n</think>\n<answer>\n4\n</answer>"
    found = scores("rubrics.py:shape", [good, "4"])
    assert found[0] > found[1]
