"""Worked examples for SFT: the ids of the prompt, then, made apart, the ids of the answer and the stop id.

An answer that is too long is dropped and counted, never cut: a cut answer teaches not to stop.
"""

from collections.abc import Sequence

from reasoner.data.problems import Problem, at
from reasoner.data.templates import Template
from reasoner.types import Example, Prompt


def make_examples(
    prompts: Sequence[tuple[Problem, Prompt]], template: Template, max_completion_tokens: int
) -> tuple[list[tuple[Problem, Example]], int]:
    """The examples whose answer fits, stop id included, and how many were too long.

    Raises DataError, with the row's place, where the answer and the template's think tags don't fit each other.
    """
    texts: list[str] = []
    for problem, _ in prompts:
        with at(problem.where):
            texts.append(template.after_prefill(problem.completion))
    made = [
        (problem, Example(prompt, ids))
        for (problem, prompt), ids in zip(prompts, template.all_completion_ids(texts), strict=True)
        if len(ids) <= max_completion_tokens
    ]
    return made, len(prompts) - len(made)
