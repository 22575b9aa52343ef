"""The seam between trainer and engine: a rollout function makes completions of prompts with the `generate` it is given.

The one here asks once. An environment with tools is another function of the same type, which calls `generate` several
times and marks the tokens that it wrote itself `sampled=False`: it is no engine, and the trainer does not know of it.
"""

from collections.abc import Callable, Sequence

from reasoner.rollout.engine import Finished, unheard
from reasoner.types import Completion, Prompt

Generate = Callable[[Sequence[Prompt], Finished], list[list[Completion]]]
Rollout = Callable[[Sequence[Prompt], Generate, Finished], list[list[Completion]]]


def rollout(prompts: Sequence[Prompt], generate: Generate, finished: Finished = unheard) -> list[list[Completion]]:
    """The completions of each prompt, in the prompts' order: one question, one answer.

    `finished` may be called with a completion as soon as nothing will be added to it; not every one has to be.
    """
    return generate(prompts, finished)
