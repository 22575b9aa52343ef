"""Rewards for length, in tokens, the stop token counted: `length` for completions near the limit, `cosine_length` for
short right ones.
"""

import math

from reasoner.rewards.math import accuracy


def length(num_tokens: int, max_tokens: int, buffer_tokens: float) -> float:
    """0.0 up to max_tokens - buffer_tokens, then linearly down to -1.0 at max_tokens, and -1.0 beyond.

    The soft overlong punishment of DAPO, arXiv:2503.14476 eq. 13, with L_max = max_tokens and L_cache = buffer_tokens;
    a number below 1 is a share of max_tokens. For runs where completions reach the limit; set max_tokens to
    grpo.max_completion_tokens. Raises ValueError unless 0 < buffer_tokens <= max_tokens.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(
            f"buffer_tokens={buffer_tokens}, max_tokens={max_tokens}: need 0 < buffer_tokens <= max_tokens"
        )
    if buffer_tokens < 1:
        buffer_tokens *= max_tokens
    over = num_tokens - (max_tokens - buffer_tokens)
    return -min(over / buffer_tokens, 1.0) if over > 0 else 0.0


def cosine_length(
    completion: str,
    answer: str,
    num_tokens: int,
    max_tokens: int,
    answer_kind: str = "number",
    right_short: float = 1.0,
    right_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
) -> float:
    """Right answers earn more, wrong ones lose more, the shorter: long + (short - long) (1 + cos(pi n / N)) / 2.

    n tokens of at most N = max_tokens; `math` says what is right. arXiv:2502.03373 appendix C.1, without its -10 beyond
    N. For models whose right answers ramble; put it beside `math`, which stays the accuracy. Raises ValueError where a
    wrong answer could earn as much as a right one, or max_tokens is not positive.
    """
    if max_tokens <= 0:
        raise ValueError(f"max_tokens={max_tokens}: give 1 or more")
    if not max(wrong_short, wrong_long) < min(right_short, right_long):
        raise ValueError(
            f"wrong answers earn {wrong_short:g} to {wrong_long:g}, right ones {right_short:g} to {right_long:g}: "
            "every right one must earn more"
        )
    right = accuracy(completion, answer, answer_kind) == 1.0
    short, long = (right_short, right_long) if right else (wrong_short, wrong_long)
    done = min(num_tokens / max_tokens, 1.0)
    return long + (short - long) * (1 + math.cos(math.pi * done)) / 2
