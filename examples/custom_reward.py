"""A reward of your own: a plain function of a completion and its answer, given to `train`.

    python examples/custom_reward.py

The same function in a file of its own works on the command line: python -m reasoner conf=tiny reward=my_reward.py:score
"""

import sys

from reasoner import train


def score(completion: str, answer: str) -> float:
    """1 for the right sum, and a little for being close, so that there is something to learn from early on."""
    try:
        distance = abs(int(completion) - int(answer))
    except ValueError:
        return 0.0
    return 1.0 if distance == 0 else max(0.0, 0.3 - 0.1 * distance)


if __name__ == "__main__":  # reward workers are processes that import this file
    result = train("tiny", reward=score, overrides=sys.argv[1:])
    print(result.rows[-1]["greedy_accuracy"])
