"""How a question becomes the ids that the model reads, and a worked answer the ids that it learns.

Prompt and completion are always encoded apart, in SFT as in sampling. The answer never passes the template as an
assistant turn, because templates rewrite such turns: they drop thoughts, or add empty think blocks. Left out:
conversations of several turns, tools, images.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from reasoner.config import Data
from reasoner.data.codec import Codec, Ids
from reasoner.errors import ConfigError, DataError, ModelError
from reasoner.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = Path(__file__).with_name("chatml.jinja")
DATE_FORMAT = "%d %b %Y"
CLOCK = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")
QUESTION, ANSWER = "Zq7question", "Zq7answer"  # what no template writes by itself
THINK, END_THINK = "<think>", "</think>"


class Rendered(NamedTuple):
    """A prompt's guarded text (see Codec) and the chat turns behind it, none for a plain one."""

    text: str
    messages: tuple[Message, ...] = ()


class ReadyPrompt(NamedTuple):
    """A prompt as the model reads it; `prefill` is what the template wrote of the answer's beginning."""

    text: str
    token_ids: Ids
    messages: tuple[Message, ...]
    prefill: str


class Template(ABC):
    """Prompts and completions for one tokenizer. Row text comes through `guard`, so that it writes no control token."""

    codec: Codec
    turn_end_id: int  # what the model writes to end its answer: the last id of every completion
    prefill: str  # what the prompt already has of every answer
    bos: Ids  # put before prompts that don't begin with it

    @abstractmethod
    def render(self, question: str, system: str | None = None) -> Rendered:
        """The text that asks `question` and is ready for the model's answer."""

    def prompt(self, question: str, system: str | None = None) -> ReadyPrompt:
        """The prompt that asks `question`, as text and ids."""
        rendered = self.render(question, system)
        ids = self.all_prompt_ids([rendered.text])[0]
        return ReadyPrompt(self.codec.unguard(rendered.text), ids, rendered.messages, self.prefill)

    def all_prompt_ids(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of rendered prompts, with one BOS where the tokenizer wants one."""
        return [ids if ids[:1] == self.bos else (*self.bos, *ids) for ids in self.codec.encode_all(texts)]

    def completion_ids(self, text: str) -> Ids:
        """The ids of an answer, apart from its prompt, ending in `turn_end_id`; `text` doesn't repeat the prefill."""
        return self.all_completion_ids([text])[0]

    def all_completion_ids(self, texts: Sequence[str]) -> list[Ids]:
        """`completion_ids` of many answers."""
        end = (self.turn_end_id,)
        return [ids if ids[-1:] == end else (*ids, *end) for ids in self.codec.encode_all(texts)]

    def after_prefill(self, text: str) -> str:
        """The part of an answer that is left for the model to write: see the function of this name."""
        return after_prefill(self.prefill, text)

    def guard(self, text: str) -> str:
        """Row text with its control tokens marked as the text they are."""
        return self.codec.guard(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens kept, spaces untouched."""
        return self.codec.decode(ids)


class PlainTemplate(Template):
    """The text as it is, behind the tokenizer's BOS if it has that habit; the answer ends in eos."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.codec = Codec(tokenizer)
        self.turn_end_id = _eos(tokenizer)
        self.prefill = ""
        self.bos = _bos(self.codec)

    def render(self, question: str, system: str | None = None) -> Rendered:
        """See Template. Raises DataError if the text ends in a space, ConfigError for a system text."""
        if system is not None:
            raise ConfigError("data.system needs a chat template: with data.template=plain write it into data.prompt")
        if question.endswith(" "):
            raise DataError(
                "this plain prompt ends in a space, after which an answer begins with other tokens than those it is "
                "trained on: let data.prompt end in other text"
            )
        return Rendered(question)


class ChatTemplate(Template):
    """A Jinja chat template with the date fixed, probed once for what it writes around question and answer.

    Raises ModelError if the template can't be rendered, loses the question, or leaves the assistant's header to the
    model.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", source: str, *, name: str, date: str, add_bos: bool):
        self.codec = Codec(tokenizer)
        self.name = name
        self.bos = _bos(self.codec) if add_bos else ()
        self.source = _fix_clock(source, _parse_date(date), name)  # the Jinja text, its date fixed
        self._date = date
        self._in_parts = False
        if QUESTION not in self.text_of([_asked(QUESTION)], generate=True):
            self._in_parts = True
        opening = self._opening()
        self.prefill = opening[self._header_length(opening) :]
        self.turn_end_id = self._find_turn_end()

    def render(self, question: str, system: str | None = None) -> Rendered:
        """See Template. Raises ModelError if the template refuses or drops `system`, DataError if it rewrites the
        question.
        """
        messages = [_asked(question)] if system is None else [{"role": "system", "content": system}, _asked(question)]
        try:
            text = self.text_of(messages, generate=True)
        except ModelError as error:
            if system is None:
                raise
            raise ModelError(f"{error}; it takes no data.system: write that text into data.prompt") from None
        if system is not None and system.strip() not in text:
            raise ModelError(f"the {self.name} drops data.system: write that text into data.prompt")
        if question.strip() not in text:
            raise DataError(f"the {self.name} rewrites this question: change the row by data.map")
        return Rendered(text, tuple({**turn, "content": self.codec.unguard(turn["content"])} for turn in messages))

    def conversation(self, turns: Sequence[Message]) -> ReadyPrompt:
        """A talk of several turns, guarded text each, that ends with a question. Templates drop earlier thoughts.

        Raises ModelError if the template refuses the turns.
        """
        text = self.text_of(turns, generate=True)
        messages = tuple({**turn, "content": self.codec.unguard(turn["content"])} for turn in turns)
        return ReadyPrompt(self.codec.unguard(text), self.all_prompt_ids([text])[0], messages, self.prefill)

    def text_of(self, messages: Sequence[Message], *, generate: bool) -> str:
        """What the template writes of the turns; `generate`: and of the answer to come. Raises ModelError if it refuses
        them."""
        from jinja2 import TemplateError

        turns: list[dict[str, Any]] = [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]} if self._in_parts else dict(turn)
            for turn in messages
        ]
        options: dict[str, Any] = {"add_generation_prompt": generate, "date_string": self._date}
        try:
            text = self.codec.tokenizer.apply_chat_template(turns, chat_template=self.source, tokenize=False, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise ModelError(f"the {self.name} can't be rendered: {error}") from None
        return cast(str, text)

    def _opening(self) -> str:
        """What the template writes between the question and the answer to come."""
        asked = self.text_of([_asked(QUESTION)], generate=True)
        if asked.count(QUESTION) != 1:
            times = asked.count(QUESTION)
            raise ModelError(f"the {self.name} writes the question {times} times: choose another data.template")
        return asked.partition(QUESTION)[2]

    def _header_length(self, opening: str) -> int:
        """How much of `opening` the template also writes before an assistant's words; the rest is the prefill.

        An earlier turn shows the bare header, for the last one may get an empty think block. A think tag always
        belongs to the prefill.
        """
        turns = [_asked(QUESTION), _said(ANSWER), _asked("Zq7next"), _said("Zq7last")]
        header = self.text_of(turns, generate=False).partition(QUESTION)[2].partition(ANSWER)[0]
        length = next((i for i, (a, b) in enumerate(zip(opening, header, strict=False)) if a != b), None)
        length = min(len(opening), len(header)) if length is None else length
        left = header[length:].strip()
        if left and opening == self.text_of([_asked(QUESTION)], generate=False).partition(QUESTION)[2]:
            raise ModelError(
                f"the {self.name} ignores add_generation_prompt, so the model would have to write {left!r} by itself: "
                "choose another data.template"
            )
        at = opening.find(THINK)
        return length if at < 0 else min(length, at)

    def _find_turn_end(self) -> int:
        closing = self.text_of([_asked(QUESTION), _said(ANSWER)], generate=False).partition(ANSWER)[2]
        token = self.codec.control_in(closing)
        return self.codec.special[token][0] if token else _eos(self.codec.tokenizer)


def make_template(tokenizer: "PreTrainedTokenizerBase", data: Data) -> Template:
    """The template that `data.template` names: model (the tokenizer's own), chatml, plain, or a .jinja file.

    Raises ModelError if the tokenizer has none or it doesn't serve, ConfigError for an unknown name, a file that can't
    be read or a date that is none.
    """
    name = data.template
    if name == "plain":
        return PlainTemplate(tokenizer)
    if name == "model":
        if not tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template: set data.template=chatml, or data.template=plain for a base model"
            )
        source = tokenizer.get_chat_template()
        return ChatTemplate(tokenizer, source, name="model's chat template", date=data.date, add_bos=False)
    path = CHATML if name == "chatml" else Path(name).expanduser()
    if path.suffix != ".jinja":
        raise ConfigError(f"data.template={name}: give model, chatml, plain or a .jinja file")
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.template={name} can't be read: {error}") from None
    if path == CHATML and not {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        raise ModelError("data.template=chatml wants <|im_start|> and <|im_end|> as tokens: set data.template=plain")
    return ChatTemplate(tokenizer, source, name=f"chat template {path.name}", date=data.date, add_bos=True)


def after_prefill(prefill: str, text: str) -> str:
    """The answer's text without the beginning that the template has written already.

    >>> after_prefill("<think>\\n", "<think>2+2=4</think>4")
    '2+2=4</think>4'

    Raises DataError if a think block that the template opens is never closed, or a second one would follow it.
    """
    written = prefill.strip()
    if not written:
        return text
    left = text.lstrip()
    begins = f"the chat template begins every answer with {prefill!r}"
    if left.startswith(written):
        left = left[len(written) :]
        text = left.lstrip() if prefill[-1].isspace() else left
    elif left.startswith(THINK):
        raise DataError(f"{begins}, and data.completion opens a think block of its own: leave out one of them")
    if THINK in written and END_THINK not in written and END_THINK not in text:
        raise DataError(f"{begins}, and data.completion never closes it: write {END_THINK} into it")
    return text


def _asked(question: str) -> Message:
    return {"role": "user", "content": question}


def _said(answer: str) -> Message:
    return {"role": "assistant", "content": answer}


def _bos(codec: Codec) -> Ids:
    return (cast(int, codec.tokenizer.bos_token_id),) if codec.begins_with_bos() else ()


def _eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-sequence token: name one with model.eos_token=TOKEN")
    return cast(int, tokenizer.eos_token_id)


def _fix_clock(source: str, date: datetime, name: str) -> str:
    """The template with the fixed date where it asks the clock; transformers keeps functions of ours out of it."""
    fixed = CLOCK.sub(lambda call: json.dumps(date.strftime(call[2])), source)
    if "strftime_now(" in fixed:
        raise ModelError(f"the {name} prints the clock's time whatever data.date says: give a .jinja file with a date")
    return fixed


def _parse_date(date: str) -> datetime:
    try:
        return datetime.strptime(date, DATE_FORMAT)
    except ValueError:
        raise ConfigError(f"data.date={date!r} is no date: write it like '26 Jul 2024'") from None
