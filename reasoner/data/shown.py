"""What `python -m reasoner data` tells: counts, lengths, the template's facts, and three rows token by token.

Everything is text in pieces, each with what it is (`masked`, `trained`, or plain); who prints it chooses colours. Left
out: rewards, which have a rehearsal of their own.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from reasoner.config import Config
from reasoner.data.drawn import Drawn, first
from reasoner.data.task import Task
from reasoner.data.templates import ChatTemplate, Template
from reasoner.types import Prompt

ROWS = 3
CUT = "\ufffd"  # what decodes to it alone may be part of a character
MASKED, TRAINED, PLAIN = "masked", "trained", ""
# A terminal's styles; two of each, so that neighbouring tokens are told apart.
STYLES = {PLAIN: ("", ""), MASKED: ("bright_black", "bright_black underline"), TRAINED: ("green", "green underline")}


class Piece(NamedTuple):
    """A stretch of text; of a row, one token of it."""

    text: str
    kind: str = PLAIN


def shown(task: Task, config: Config) -> Iterator[list[Piece]]:
    """Lines of pieces; a row is one line whose pieces hold line breaks."""
    yield from ([Piece(line)] for line in task.lines()[:-1])
    yield [Piece("")]
    yield from ([Piece(line)] for line in chain(_lengths(task, config), facts(task.template, _prompts(task))))
    for name, rows in _rows(task):
        for number, (prompt, completion) in enumerate(rows, start=1):
            trained = f"{len(completion)} trained" if completion else "its answers are sampled, and trained"
            yield [Piece("")]
            yield [
                Piece(f"{name}, row {number} of {len(rows)}: {prompt.id}, {len(prompt.token_ids)} masked, {trained}")
            ]
            yield [*tokens(task.template, prompt.token_ids, MASKED), *tokens(task.template, completion, TRAINED)]
            yield [Piece(f"answer: {prompt.answer!r}")]


def plain(pieces: Sequence[Piece]) -> str:
    """The pieces where there are no colours: trained text, which is a row's end, stands in double brackets.

    >>> plain([Piece("2+2=", MASKED), Piece("4", TRAINED), Piece("</s>", TRAINED)])
    '2+2=[[4</s>]]'
    """
    text = "".join(piece.text for piece in pieces if piece.kind != TRAINED)
    trained = "".join(piece.text for piece in pieces if piece.kind == TRAINED)
    return f"{text}[[{trained}]]" if trained else text


def tokens(template: Template, ids: Sequence[int], kind: str) -> Iterator[Piece]:
    """The text of each token; tokens that only together are whole characters are one piece."""
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = template.decode(waiting)
        if not text.endswith(CUT) or len(waiting) > 8:
            yield Piece(text, kind)
            waiting = []
    if waiting:
        yield Piece(template.decode(waiting), kind)


def facts(template: Template, prompts: Sequence[Prompt]) -> Iterator[str]:
    """What the template does around a question, a line each."""
    tokenizer = template.codec.tokenizer
    name = template.name if isinstance(template, ChatTemplate) else "plain text, no chat template"
    yield f"template: {name}"
    ids = prompts[0].token_ids
    bos = tokenizer.bos_token_id
    begins = (
        "no beginning-of-sequence token"
        if bos is None
        else f"{sum(token == bos for token in ids)} of {tokenizer.bos_token}"
    )
    yield f"a prompt has {begins} and ends in {template.decode(ids[-4:])!r}"
    end = template.decode((template.turn_end_id,))
    yield f"an answer ends in {end!r} (id {template.turn_end_id})"
    if template.prefill:
        yield f"the template writes {template.prefill!r} of every answer itself: it is masked"
    if prompts[0].messages and prompts[0].messages[0]["role"] == "system":
        yield f"system: {prompts[0].messages[0]['content']!r}"


def _lengths(task: Task, config: Config) -> Iterator[str]:
    limits = {"sft": config.sft.max_completion_tokens}
    for name, prompts in _sections(task):
        big = isinstance({"sft": task.examples, "grpo": task.prompts}.get(name), Drawn)
        some = f" of the first {len(prompts):,} rows" if big else ""
        yield f"{name}: tokens a prompt{some}: {_spread(len(prompt.token_ids) for prompt in prompts)}"
        if name == "sft":
            told = _spread(len(example.completion_ids) for example in first(task.examples))
            yield f"{name}: tokens a worked answer: {told} of at most {limits[name]}"


def _sections(task: Task) -> Iterator[tuple[str, Sequence[Prompt]]]:
    if task.examples:
        yield "sft", [example.prompt for example in first(task.examples)]
    if task.prompts:
        yield "grpo", first(task.prompts)
    yield from task.sets.items()


def _prompts(task: Task) -> Sequence[Prompt]:
    return next(iter(_sections(task)))[1]


def _rows(task: Task) -> Iterator[tuple[str, list[tuple[Prompt, Sequence[int]]]]]:
    """Three rows of each training stage, of GRPO only where they are others than SFT's; without training of a set."""
    worked = [(example.prompt, example.completion_ids) for example in task.examples[:ROWS]]
    asked: list[tuple[Prompt, Sequence[int]]] = [(prompt, ()) for prompt in task.prompts[:ROWS]]
    if worked:
        yield "sft", list(worked)
    if asked and [prompt.token_ids for prompt, _ in asked] != [prompt.token_ids for prompt, _ in worked]:
        yield "grpo", asked
    if not worked and not asked:
        name, prompts = next(iter(task.sets.items()))
        yield name, [(prompt, ()) for prompt in prompts[:ROWS]]


def _spread(counts: Iterable[int]) -> str:
    ranked = sorted(counts)
    middle, late = ranked[len(ranked) // 2], ranked[min(len(ranked) - 1, len(ranked) * 99 // 100)]
    return f"median {middle:,}, 99% {late:,}, longest {ranked[-1]:,}"
