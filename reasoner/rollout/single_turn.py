"""The seam between trainer and engine: a rollout function makes completions of prompts with the `generate` it is given.

The one here asks once. An environment with tools is another function of the same type, which calls `generate` several
times and marks the tokens that it wrote itself `sampled=False`: it is no engine, and the trainer does not know of it.
"""

from collections.abc import Callable, Sequence

from reasoner.types import Completion, Prompt

Generate = Callable[[Sequence[Prompt]], list[list[Completion]]]
Rollout = Callable[[Sequence[Prompt], Generate], list[list[Completion]]]


def rollout(prompts: Sequence[Prompt], generate: Generate) -> list[list[Completion]]:
    """The completions of each prompt, in the prompts' order: one question, one answer."""
    return generate(prompts)
