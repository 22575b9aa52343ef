"""The fullest micro-batch that a stage's settings allow, and whether a step has several, by arithmetic: what the
rehearsal before step 1 runs.

Left out: what it costs (peak.py).
"""

import math

from reasoner.config import Config, data_of
from reasoner.grpo.batch import SHARED_FROM, WITH_COPIES
from reasoner.models.attention import Layout


def worst_lengths(config: Config, stage: str, max_context: int, *, tokens: int | None = None) -> list[int]:
    """The fullest micro-batch of a stage, as lengths of its sequences: `tokens`, else tokens_per_micro_batch.

    >>> worst_lengths(config, "grpo", 2048)  # tokens_per_micro_batch=2048, 256 + 512 tokens
    [768, 768, 512]
    """
    longest = longest_trained(config, stage, max_context)
    rows = _rows(config, stage)
    whole, rest = divmod(tokens or getattr(config, stage).tokens_per_micro_batch, longest)
    if whole >= rows or whole == 0:
        return [longest] * min(rows, max(whole, 1))
    return [longest] * whole + ([rest] if rest > 1 else [])


def worst_layout(config: Config, stage: str, max_context: int, *, shares: bool, tokens: int | None = None) -> Layout:
    """The fullest micro-batch of a stage, with as many copies of prompts as `split` lets in if prompts are shared.

    >>> worst = worst_layout(config, "grpo", 2048, shares=True)  # tokens_per_micro_batch=2048, 256 + 512 tokens
    >>> worst.lengths, worst.shared  # 4096 tokens, 2048 of which are copies
    ((683, 683, 683, 683, 682, 682), (0, 410, 410, 410, 409, 409))
    """
    lengths = worst_lengths(config, stage, max_context, tokens=tokens)
    if not shares or stage == "sft":
        return Layout.of(lengths)
    longest, rows = lengths[0], _rows(config, stage)
    own = max(tokens or config.grpo.tokens_per_micro_batch, longest)
    count = min(rows, max(3, math.ceil(WITH_COPIES * own / longest)))
    whole = min(WITH_COPIES * own, count * longest)
    copies = min(whole - own, (count - 1) * (whole // count - 1))
    if copies <= 0:  # the whole step fits as it is
        return Layout.of(lengths)
    return Layout.of(_spread(whole, count), shared=[0, *_spread(copies, count - 1)])


def is_whole_step(config: Config, stage: str, max_context: int, *, shares: bool) -> bool:
    """Whether a step of the stage is one micro-batch, however long its prompts and completions turn out.

    >>> is_whole_step(config, "grpo", 2048, shares=True)  # 32 x 8 of 256 + 200 tokens, tokens_per_micro_batch=65536
    True
    """
    tokens, longest = getattr(config, stage).tokens_per_micro_batch, longest_trained(config, stage, max_context)
    rows = _rows(config, stage)
    if not shares or stage == "sft":
        return rows * longest <= tokens
    further = config.grpo.completions_per_prompt - 1
    group = longest + further * min(longest, config.grpo.max_completion_tokens)
    # A prompt that is not shared, for that would save less than a token in SHARED_FROM, is computed for each.
    group = min((1 + further) * longest, math.ceil(group * SHARED_FROM / (SHARED_FROM - 1)))
    return config.grpo.prompts_per_step * group <= tokens and rows * longest <= WITH_COPIES * tokens


def longest_trained(config: Config, stage: str, max_context: int) -> int:
    """Tokens of the longest sequence that a stage learns from."""
    settings = getattr(config, stage)
    prompt = data_of(config, settings.data, f"{stage}.data").max_prompt_tokens
    return min(max_context, prompt + settings.max_completion_tokens)


def _rows(config: Config, stage: str) -> int:
    """Sequences of a step."""
    if stage == "sft":
        return config.sft.examples_per_step
    return config.grpo.prompts_per_step * config.grpo.completions_per_prompt


def _spread(total: int, count: int) -> list[int]:
    """`count` numbers that differ by at most one."""
    each, more = divmod(total, count)
    return [each + (i < more) for i in range(count)]
