"""How long 2,048 GSM8K-like completions take to score on two workers, and what eight bombs among them add:
`python -m benchmarks.reward_pool`.

The bombs go off in a function that a stranger might write, since the built-in `math` refuses them unevaluated. Left
out: sampling, and rewards that wait on a network.
"""

import argparse
import math
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reasoner.config import Reward, RewardPart
from reasoner.rewards.base import Rewards, load_rewards
from reasoner.rewards.math import accuracy
from reasoner.types import Completion, Prompt, Score

MARK = "BOMB "
WORKERS, ROUNDS = 2, 5
BAR_ROWS, BAR_S = 2048, 3.0


def power() -> float:
    """`9^{9^9}`: one operation that never returns to Python, so no signal ends it."""
    return float(len(str(9**9**9)))


def factorial() -> float:
    """`1000000!`, to the last digit."""
    sys.set_int_max_str_digits(0)
    return float(len(str(math.factorial(1_000_000))))


def brackets() -> float:
    """3,000 brackets, read by recursion on a stack that is too small for it."""

    def depth(text: str) -> int:
        return 1 + depth(text[1:-1]) if text else 0

    return float(depth("(" * 3000 + ")" * 3000))


def regex() -> float:
    """A pattern that tries every way to split the text."""
    return float(bool(re.fullmatch(r"(a+)+", "a" * 60 + "b")))


def loop() -> float:
    """`while True`."""
    while True:
        pass


def memory() -> float:
    """10 GB, each page of it touched."""
    return float(len(b"1" * 10_000_000_000))


def crash() -> float:
    """The end of the process."""
    os.abort()


def printing() -> float:
    """Output without end."""
    while True:
        print("and so on " * 1000)


BOMBS: dict[str, Callable[[], float]] = {
    bomb.__name__: bomb for bomb in (power, factorial, brackets, regex, loop, memory, crash, printing)
}


def careless(completion: str, answer: str) -> float:
    """`math` that sets off what the completion names."""
    if completion.startswith(MARK):
        return BOMBS[completion.removeprefix(MARK)]()
    return accuracy(completion, answer)


def cases(count: int) -> tuple[list[Prompt], list[Completion]]:
    """Word problems with worked answers of about 500 characters, every third one wrong; the same ones every time."""
    draw = random.Random(0)
    prompts, completions = [], []
    for number in range(count):
        steps, total = [], draw.randrange(2, 99)
        for _ in range(draw.randrange(3, 7)):
            more = draw.randrange(2, 99)
            steps.append(f"After another {more} boxes there are {total} + {more} = {total + more} boxes in the store.")
            total += more
        said = total + (number % 3 == 0)
        text = "\n".join([*steps, *steps[:2], f"#### {said:,}"])
        length = len(text) // 4
        prompts.append(Prompt(f"train:{number}", "How many boxes?", str(total), {"answer_kind": "number"}, (1,)))
        completions.append(Completion((0,) * length, (True,) * length, (0.0,) * length, text, "stop", 0, 0))
    return prompts, completions


def with_bombs(completions: list[Completion]) -> list[Completion]:
    """The same with each bomb in place of one of them, spread over the batch."""
    spread = list(completions)
    for k, name in enumerate(BOMBS):
        spread[(2 * k + 1) * len(spread) // (2 * len(BOMBS))] = Completion(
            (0,), (True,), (0.0,), MARK + name, "stop", 0, 0
        )
    return spread


def timed(rewards: Rewards, prompts: list[Prompt], completions: list[Completion]) -> tuple[float, list[Score]]:
    """Seconds to all scores, and the scores."""
    began = time.monotonic()
    scores = rewards.score(prompts, completions)
    return time.monotonic() - began, scores


def measure(count: int, timeout_s: float, rounds: int) -> dict[str, Any]:
    """Seconds without and with bombs, what became of each bomb, and how many other scores are not what they were."""
    prompts, completions = cases(count)
    reward = Reward({"accuracy": RewardPart(fn="careless", timeout_s=timeout_s)}, workers=WORKERS)
    plain = Reward({"accuracy": RewardPart(fn="math", timeout_s=timeout_s)}, workers=WORKERS)
    with load_rewards(plain, functions={}, base_dir=Path.cwd(), columns={"answer_kind"}) as rewards:
        first_s, expected = timed(rewards, prompts, completions)
        seconds = [timed(rewards, prompts, completions)[0] for _ in range(rounds)]
    mined = with_bombs(completions)
    with load_rewards(reward, functions={"careless": careless}, base_dir=Path.cwd(), columns=set()) as rewards:
        rewards.score(prompts[:WORKERS], completions[:WORKERS])  # as the rehearsal before a run does
        bombed = [timed(rewards, prompts, mined) for _ in range(rounds)]
    outcomes = {c.text.removeprefix(MARK): s for c, s in zip(mined, bombed[0][1], strict=True) if MARK in c.text}
    wrong = sum(
        score != right
        for _, scores in bombed
        for score, right, completion in zip(scores, expected, mined, strict=True)
        if MARK not in completion.text
    )
    return {
        "completions": count,
        "workers": WORKERS,
        "timeout_s": timeout_s,
        "first_s": first_s,
        "seconds": seconds,
        "bombed_s": [one for one, _ in bombed],
        "added_s": statistics.median(one for one, _ in bombed) - statistics.median(seconds),
        "bombs": {name: score.failures.get("accuracy", score.parts) for name, score in outcomes.items()},
        "wrong_scores": wrong,
    }


def main() -> None:
    """Measure and keep the result."""
    from benchmarks.common import RESULTS, about, write_json

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--completions", type=int, default=BAR_ROWS)
    options = parser.parse_args()
    result = about(f"python -m benchmarks.reward_pool --completions {options.completions}")
    result |= measure(options.completions, RewardPart(fn="math").timeout_s, ROUNDS)
    result["bar"] = {"seconds": BAR_S, "added_s": result["timeout_s"]}
    write_json(RESULTS / f"reward_pool-{options.completions}.json", result)
    print({key: result[key] for key in ("first_s", "seconds", "bombed_s", "added_s", "bombs", "wrong_scores")})


if __name__ == "__main__":
    main()
