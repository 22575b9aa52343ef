"""Problems as prompts, in token ids. A prompt that is too long is dropped and counted, never cut: a cut loses the
question, or the turn that the model is to answer in.
"""

from collections.abc import Sequence

from reasoner.config import Data
from reasoner.data.problems import Problem, at
from reasoner.data.templates import Rendered, Template
from reasoner.types import Prompt


def make_prompts(
    problems: Sequence[Problem], data: Data, template: Template, source: str
) -> tuple[list[tuple[Problem, Prompt]], int]:
    """The problems that fit `data.max_prompt_tokens`, each with its prompt, and how many were too long.

    A prompt's id is SOURCE:ROW, its row's number in the file. Raises DataError, with the row's place, for a question
    that the template can't carry.
    """
    rendered: list[Rendered] = []
    problems = list(problems)  # each is made of its row when it is asked for
    for problem in problems:
        with at(problem.where):
            rendered.append(
                template.render(problem.question, problem.system or None if data.system is None else data.system)
            )
    all_ids = template.all_prompt_ids([one.text for one in rendered])
    made = [
        (problem, _prompt(f"{source}:{problem.number}", problem, one, ids, template))
        for problem, one, ids in zip(problems, rendered, all_ids, strict=True)
        if len(ids) <= data.max_prompt_tokens
    ]
    return made, len(problems) - len(made)


def _prompt(name: str, problem: Problem, rendered: Rendered, ids: tuple[int, ...], template: Template) -> Prompt:
    return Prompt(
        id=name,
        text=template.codec.unguard(rendered.text),
        answer=problem.answer,
        columns=problem.columns,
        token_ids=ids,
        messages=rendered.messages,
        prefill=template.prefill,
    )
