"""The verifier that a reasoning-gym task brings along, as the reward `gym_answer`. Needs the extra `gym`.

Left out: the partial credit that `score_answer` pays ("1 2 3 -4" earns 0.25 of a task whose answer is -4); an answer is
right or wrong.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import reasoning_gym

from reasoner.rewards.answers import after_thinking, final_answer


def gym_answer(completion: str, answer: str, task: str, metadata: Mapping[str, Any], question: str = "") -> float:
    """1.0 if the task's own `score_answer` gives the answer full marks, else 0.0; columns `task` and `metadata` come
    with the rows.

    What is judged: the text after `####` or in the last box, else the whole completion after `</think>`. For tasks with
    many right answers (countdown, puzzles); where the gold is the only one, `exact` and `math` cost less. Raises
    ValueError for an unknown task.
    """
    said = final_answer(completion)
    if said is None:
        said = (after_thinking(completion) or "").strip()
    entry = {"question": question, "answer": answer, "metadata": dict(metadata)}
    score_answer = cast(Callable[..., float], reasoning_gym.get_score_answer_fn(task))
    return float(score_answer(said, entry) == 1.0)
