"""A soft limit on length: completions near the limit lose reward before they are cut. Lengths in tokens, the stop
token counted.
"""


def length(num_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """0.0 up to max_tokens - buffer_tokens, then linearly down to -1.0 at max_tokens, and -1.0 beyond.

    The soft overlong punishment of DAPO, arXiv:2503.14476 eq. 13, with L_max = max_tokens and L_cache = buffer_tokens.
    For runs where completions reach the limit; set max_tokens to grpo.max_completion_tokens. Raises ValueError unless 0
    < buffer_tokens <= max_tokens.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(
            f"buffer_tokens={buffer_tokens}, max_tokens={max_tokens}: need 0 < buffer_tokens <= max_tokens"
        )
    over = num_tokens - (max_tokens - buffer_tokens)
    return -min(over / buffer_tokens, 1.0) if over > 0 else 0.0
