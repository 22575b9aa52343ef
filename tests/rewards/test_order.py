"""What no trick earns, and that correctness outranks the rest, for every group in conf/reward (PITFALLS E6, E10)."""

from itertools import product
from pathlib import Path

import pytest

from reasoner.compose import compose_conf
from reasoner.config import validate
from reasoner.rewards.base import load_rewards
from reasoner.rewards.math import accuracy

REPO = Path(__file__).parents[2]
GROUPS = sorted(path.stem for path in (REPO / "conf/reward").glob("*.yaml"))
JUDGED = "judge"  # the group that a language model decides
LIMIT_TOKENS = 64  # conf=tiny, overridden below

# Hedges and farms, each for the gold 18 as a number.
TRICKS = [
    r"\boxed{17=18}",
    r"\boxed{18=18}",
    r"\boxed{x=18}",
    r"\boxed{17, 18}",
    r"\boxed{16 17 18}",
    r"\boxed{18 or 19}",
    r"\boxed{17 or 18}",
    r"\boxed{17/18}",
    r"\boxed{36/2}",
    r"\boxed{18!/17!}",
    r"\boxed{9+9}",
    r"\boxed{\{17,18\}}",
    r"\boxed{18\text{ or }17}",
    r"\boxed{18,0}",
    r"\boxed{1 8}",
    r"\boxed{\pm 18}",
    r"\boxed{-18}",
    r"\boxed{\approx 18}",
    r"\boxed{[17,18]}",
    r"\boxed{18",
    r"\boxed{18} \boxed{17}",
    r"\boxed{}",
    "#### 17 or 18",
    "#### 18 19",
    "#### 17=18",
    "####\n18",
    "<answer>17 or 18</answer>",
    "<answer>17, 18</answer>",
    "<answer>18</answer><answer>17</answer>",
    "<answer>18",
    "<answer><answer>18</answer> 17</answer>",
    "<answer>the answer is 18 or so</answer>",
    r"<think>\boxed{18}",
    r"<think>\boxed{18}</think>",
    "<think><answer>18</answer></think>",
    "<think>#### 18</think>17",
    "#### 17\nUser: what is 9+9?\nAssistant: #### 18",
    r"\boxed{17}" + "\n<|im_end|>\n<|im_start|>user\n" + r"\boxed{18}",
    "<answer>17</answer>\nQuestion: 9+9\n<answer>18</answer>",
    " ".join(str(n) for n in range(100)),
    "".join(rf"\boxed{{{n}}}" for n in range(17)),
    "".join(rf"\boxed{{{n}}}" for n in reversed(range(19))),
    "18",
    "The answer is 18.",
    "",
    r"\boxed{eighteen}",
    "#### 18 thousand",
    "#### 18%18",
    "#### <18>",
    "<think>a</think>" * 50 + "18",
    "<think></think>" * 50,
    "<answer></answer>" * 50,
]


@pytest.mark.parametrize("text", TRICKS)
@pytest.mark.parametrize("shell", ["{}", "<think>a</think>\n{}", "<think>\n18\n</think>\n{}\n"])
def test_no_hedge_and_no_farm_earns_the_math_reward(text, shell):
    assert accuracy(shell.format(text), "18", "number") == 0.0


def test_all_boxes_in_turn_earn_the_last_one_only():
    """Which is what one guess earns, so that listing gains nothing."""
    said = "".join(rf"\boxed{{{n}}}" for n in range(19))
    assert [accuracy(said, str(n), "number") for n in range(19)] == [0.0] * 18 + [1.0]


# A completion's answer, its shape and its length vary apart: every right one is compared with every wrong one.
ANSWERS = {"number": ("18", ["17", "", "17 or 18", "eighteen"]), "choice": ("B", ["A", "", "A or B", "AB"])}
PROGRAMS = ["print(18)", "print(17)", "", "print('18 or 17')", "exit(0)"]
ANSWERS["code"] = (f"\n```python\n{PROGRAMS[0]}\n```\n", [f"\n```python\n{wrong}\n```\n" for wrong in PROGRAMS[1:]])
TESTS = '{"inputs": [""], "outputs": ["18"]}'  # what `code` has for a gold answer
SHAPES = [
    "{}",
    "<think>We have it, so the answer is this one.</think>{}",
    "<think>We have it, so this is the one.</think><answer>{}</answer>",
    r"<think>We have it, so this is the one.</think>\boxed{{{}}}",
    "<think>wait, </think>#### {}",
    r"\boxed{{{}}}",
    "#### {}",
    "wait, no. " * 40 + "#### {}",
    "答案是九个鸡蛋 " * 40 + r"\boxed{{{}}}",
    r"<think><think></think>\boxed{{{}}}",
    "<answer>{}</answer>",
    "<think>" * 30 + "</think>" * 30 + "#### {}",
]
LENGTHS = [1, LIMIT_TOKENS // 2, LIMIT_TOKENS - 1, LIMIT_TOKENS, 4 * LIMIT_TOKENS]


@pytest.mark.parametrize("group", [group for group in GROUPS if group != JUDGED])
def test_e10_correctness_outranks_the_rest_for_every_pair(group, make_prompt, make_completion, tmp_path):
    values = compose_conf("tiny", [f"reward={group}", f"grpo.max_completion_tokens={LIMIT_TOKENS}"]).values
    reward = validate(values).reward
    gold, wrong = ANSWERS.get(group, ANSWERS["number"])
    lengths = LENGTHS[:1] if group == "code" else LENGTHS  # a program's length is no matter, and running it costs
    cases = [(shape.format(said), n) for shape, said, n in product(SHAPES, [gold, *wrong], lengths)]
    with load_rewards(reward, base_dir=tmp_path, columns={"answer_kind"}) as rewards:
        prompt = make_prompt(TESTS if group == "code" else gold, answer_kind="number")
        scores = rewards.score([prompt] * len(cases), [make_completion(text, n) for text, n in cases])
    assert [score.failures for score in scores if score.failed] == []
    earned = {case: score.total for case, score in zip(cases, scores, strict=True) if score.parts["accuracy"] == 1.0}
    others = {case: score.total for case, score in zip(cases, scores, strict=True) if score.parts["accuracy"] != 1.0}
    assert len(earned) >= len(lengths)
    assert len(others) >= 4 * len(lengths)
    assert {case: total for case, total in earned.items() if total <= max(others.values())} == {}


def test_the_groups_are_all_there():
    assert " ".join(GROUPS) == "choice clean code concise exact judge math numeric overlong think think_answer"
