"""`python -m reasoner chat run=DIR`: talk to what a run trained, and to what it was before, in the terminal.

A question is asked as the run asked its problems: by `data.prompt`, `data.system` and the template. Sampling is the hf
engine's on any machine, one token after the other from the policy's own weights. Left out: images, tools, and a web
page (serve is for other programs).
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text
from torch import Tensor

from reasoner.assembly import NO_CONTEXT_LIMIT, check_before_loading
from reasoner.compose import compose_conf
from reasoner.config import Config, Data, Optim, data_of, validate
from reasoner.console import score_line, visible
from reasoner.data.templates import END_THINK, THINK, ChatTemplate, Template, make_template
from reasoner.errors import ConfigError, InputError, ModelError
from reasoner.evaluation.weights import BASE, weights_of
from reasoner.models.loading import load_model, load_tokenizer
from reasoner.models.policy import Policy
from reasoner.models.sources import context_limit
from reasoner.models.stops import stop_ids
from reasoner.rewards.base import load_rewards
from reasoner.rollout.engine import Sampling
from reasoner.rollout.hf import HfEngine
from reasoner.run_folder import conf_of
from reasoner.types import Completion, Message, Prompt
from reasoner.words import plural

OWN = ("run", "checkpoint", "temperature", "max_tokens")
HELP = """  /both            base and trained answer side by side; again: the trained one alone
  /reward ANSWER   score what was said last by the run's rewards, with ANSWER as the gold one
  /think           show the thoughts of the last answer
  /new             forget what was said
  /quit            leave (Ctrl-D does too; Ctrl-C stops an answer)"""
COLUMN = re.compile(r"\{[^{}]+\}")


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A run's model, loaded without its data: what is needed to speak with it, and the weights of each speaker."""

    config: Config
    data: Data
    tokenizer: Any
    template: Template
    policy: Policy
    engine: HfEngine
    stop_ids: tuple[int, ...]
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by speaker, base first


@dataclass(frozen=True, slots=True)
class Said:
    """An answer and what it answers."""

    speaker: str
    prompt: Prompt
    completion: Completion

    @property
    def thoughts_and_answer(self) -> tuple[str, str]:
        """The text inside the think block, "" without one, and the text after it."""
        text = self.prompt.prefill + self.completion.text
        if THINK not in text:
            return "", text.strip()
        thoughts, closed, answer = text.partition(THINK)[2].partition(END_THINK)
        return thoughts.strip(), answer.strip() if closed else ""


def chat(arguments: Sequence[str], *, lines: Iterable[str] | None = None, stream: TextIO | None = None) -> None:
    """Answer questions until `/quit` or the end of `lines` (none: what is typed). Raises InputError."""
    own = dict(line.split("=", 1) for line in arguments if "=" in line and line.split("=")[0] in OWN)
    overrides = [line for line in arguments if line.split("=")[0] not in OWN]
    if not own.get("run"):
        raise ConfigError("chat run=DIR [checkpoint=NAME] [temperature=0] [max_tokens=N]: name a run's folder")
    temperature, max_tokens = _temperature(own.get("temperature", "0")), _max_tokens(own.get("max_tokens"))
    model = open_model(Path(own["run"]).expanduser(), own.get("checkpoint"), overrides)
    limit = max_tokens or model.config.evaluate.max_completion_tokens or model.config.grpo.max_completion_tokens
    sampling = Sampling(temperature, limit, 1, model.stop_ids, model.config.seed)
    Chat(model, sampling, stream or sys.stdout).run(_typed() if lines is None else lines)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"temperature={text}: give a number from 0 on")
    return value


def _max_tokens(text: str | None) -> int | None:
    if text is not None and not (text.isdecimal() and int(text) > 0):
        raise ConfigError(f"max_tokens={text}: give a whole number from 1 on")
    return int(text) if text else None


def _typed() -> Iterator[str]:
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text in its encoding are no reason to end
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def open_model(run: Path, checkpoint: str | None, overrides: Sequence[str]) -> Model:
    """The model of a run with the weights before training and those of `checkpoint` (none: what the run exported, or
    its best or newest checkpoint). Raises InputError."""
    config = validate(compose_conf(str(conf_of(run)), overrides).values)
    config = replace(
        config,
        rollout=replace(config.rollout, engine="hf", max_sequences=1),
        sft=replace(config.sft, optim=Optim()),
        grpo=replace(config.grpo, optim=Optim()),
    )
    chosen = weights_of(run, config, (BASE, checkpoint) if checkpoint else (), key="checkpoint")
    check_before_loading(config)
    data = data_of(config, config.grpo.data, "grpo.data")
    tokenizer = load_tokenizer(config.model)
    template = make_template(tokenizer, data)
    policy = load_model(config.model, tokenizer, seed=config.seed)
    limit = context_limit(config.model) or NO_CONTEXT_LIMIT
    engine = HfEngine(policy, template.decode, max_context=limit, max_sequences=1)
    model = Model(config, data, tokenizer, template, policy, engine, stop_ids(tokenizer, template, policy.model))
    for one in chosen:
        one.load(model)
        model.weights[one.name] = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
    return model


class Chat:
    """A conversation: each speaker remembers its own answers."""

    def __init__(self, model: Model, sampling: Sampling, stream: TextIO):
        self.model = model
        self.sampling = sampling
        self.both = False
        self.turn = 0
        self.last: list[Said] = []
        self.asked: list[str] = []
        self.answers: dict[str, list[str]] = {name: [] for name in model.weights}
        self._stream = stream
        self._screen = RichConsole(file=stream, highlight=False, markup=False, emoji=False)
        self._commands: dict[str, Callable[[str], None]] = {
            "/both": self._both,
            "/reward": self._reward,
            "/think": self._think,
            "/new": self._new,
            "/help": lambda _: self._say(HELP),
        }

    @property
    def speakers(self) -> list[str]:
        """Who answers next."""
        return list(self.answers) if self.both else list(self.answers)[-1:]

    def run(self, lines: Iterable[str]) -> None:
        """Answer each line until there are no more, or `/quit`."""
        self._say(f"{self.model.config.name}: {' and '.join(self.answers)}; /help lists what else can be typed")
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            if word == "/quit":
                return
            if word.startswith("/"):
                self._commands.get(word, self._unknown)(rest.strip())
            elif word:
                self._ask(line.strip())

    def _unknown(self, _: str) -> None:
        self._say(f"there is no such command; there are\n{HELP}")

    def _ask(self, question: str) -> None:
        try:
            said = [self._answer(name, question) for name in self.speakers]
        except InputError as error:
            self._say(f"error: {error}")
            return
        self.last = said
        self.turn += 1
        self.asked.append(question)
        for one in said:
            self.answers[one.speaker] += [one.thoughts_and_answer[1]]
        for name in self.answers.keys() - {one.speaker for one in said}:
            self.answers[name].append("")
        if self.both:
            self._side_by_side()

    def _answer(self, speaker: str, question: str) -> Said:
        model, place = self.model, list(self.answers).index(speaker)
        model.policy.load_state(model.weights[speaker])
        model.engine.load_adapter(model.policy.trainable(), place)
        prompt = self._prompt(speaker, question)
        shown = Shown(self._stream, prompt.prefill, live=not self.both)
        ids: list[int] = []
        sampling = replace(self.sampling, seed=self.sampling.seed + self.turn)
        with closing(model.engine.stream(prompt, sampling, policy_step=place)) as tokens:
            try:
                for token in tokens:
                    ids.append(token)
                    shown.update(model.template.decode(ids[:-1] if token in sampling.stop_ids else ids))
            except KeyboardInterrupt:
                shown.note("stopped")
        stopped = bool(ids) and ids[-1] in sampling.stop_ids
        text = model.template.decode(ids[:-1] if stopped else ids)
        shown.end(text, len(ids), cut=len(ids) == sampling.max_tokens and not stopped)
        n = len(ids)
        reason = "stop" if stopped else "length"
        return Said(speaker, prompt, Completion(tuple(ids), (True,) * n, (0.0,) * n, text, reason, place, place))

    def _prompt(self, speaker: str, question: str) -> Prompt:
        """The question as the run asked its problems, behind what was said before where the template knows turns."""
        model, template = self.model, self.model.template
        asked, system = as_asked(model.data.prompt, question), model.data.system
        ready = template.prompt(template.guard(asked), None if system is None else template.guard(system))
        if self.asked and isinstance(template, ChatTemplate):
            turns: list[Message] = [turn for turn in ready.messages if turn["role"] == "system"]
            for before, answer in zip(self.asked, self.answers[speaker], strict=True):
                if answer:
                    turns.append({"role": "user", "content": as_asked(model.data.prompt, before)})
                    turns.append({"role": "assistant", "content": answer})
            turns.append({"role": "user", "content": asked})
            ready = template.conversation([{**turn, "content": template.guard(turn["content"])} for turn in turns])
        num_tokens, limit = len(ready.token_ids), model.engine.max_context
        if num_tokens + self.sampling.max_tokens > limit:
            raise ModelError(
                f"the question, with what goes along of the talk, has {plural(num_tokens, 'token')} and its answer may "
                f"have {self.sampling.max_tokens:,}, together more than the model's context of {limit:,}: type /new to "
                "forget what was said, ask a shorter question, or start with a smaller max_tokens=N"
            )
        columns = {"answer_kind": model.data.answer_kind, "question": question}
        return Prompt(f"chat:{self.turn}", ready.text, "", columns, ready.token_ids, ready.messages, ready.prefill)

    def _both(self, _: str) -> None:
        if len(self.answers) < 2:
            self._say("there is only one set of weights: checkpoint=base was asked for")
            return
        self.both = not self.both
        self._say(f"now {' and '.join(self.speakers)} answer" if self.both else f"now {self.speakers[0]} answers alone")

    def _side_by_side(self) -> None:
        table = Table(expand=True)
        for one in self.last:
            table.add_column(one.speaker, ratio=1)
        cells = []
        for one in self.last:
            thoughts, answer = one.thoughts_and_answer
            folded = "[thoughts; /think shows them]\n" if thoughts else ""
            cells.append(Text(visible(folded + answer) + f"\n({plural(len(one.completion.token_ids), 'token')})"))
        table.add_row(*cells)
        self._screen.print(table)

    def _reward(self, gold: str) -> None:
        if not self.last or not gold:
            self._say("ask something first, then /reward ANSWER with the right answer")
            return
        config = self.model.config
        prompts = [replace(one.prompt, answer=gold) for one in self.last]
        base_dir = Path.cwd()
        try:
            with load_rewards(
                config.reward, functions={}, base_dir=base_dir, columns=set(prompts[0].columns)
            ) as rewards:
                scores = rewards.score(prompts, [one.completion for one in self.last])
        except InputError as error:
            self._say(f"these rewards can't judge a typed question: {error}")
            return
        for one, score in zip(self.last, scores, strict=True):
            self._say(f"{one.speaker}: {score_line(one.completion, score)}")

    def _think(self, _: str) -> None:
        for one in self.last:
            self._say(f"{one.speaker}: {one.thoughts_and_answer[0] or 'no thoughts'}")

    def _new(self, _: str) -> None:
        self.asked, self.last = [], []
        self.answers = {name: [] for name in self.answers}
        self._say("what was said is forgotten")

    def _say(self, text: str) -> None:
        put(self._stream, visible(text) + "\n")


class Shown:
    """An answer on the screen as it grows: thoughts as a count, the rest as it comes."""

    def __init__(self, stream: TextIO, prefill: str, *, live: bool):
        self.stream = stream
        self.prefill = prefill
        self.live = live
        self.written = 0
        self.thinking = False

    def update(self, text: str, *, last: bool = False) -> None:
        """Show what is new of the text so far; half a tag, and a character whose bytes are not all there, wait."""
        whole = (self.prefill + text).lstrip()
        before, opened, rest = whole.partition(THINK)
        if opened and END_THINK not in rest:
            if not self.thinking:
                self._put("(thinking ...")
            self.thinking = True
            return
        if self.thinking:
            self._put(" /think shows it)\n")
            self.thinking = False
        answer = (before + rest.partition(END_THINK)[2]).lstrip() if opened else whole
        if not last and (THINK.startswith(answer) or answer.endswith("\ufffd")):
            return
        self._put(visible(answer[self.written :]))
        self.written = len(answer)

    def note(self, text: str) -> None:
        """A word in brackets."""
        self._put(f" [{text}]")

    def end(self, text: str, num_tokens: int, *, cut: bool) -> None:
        """What waited of the whole text, and the line after the answer."""
        self.update(text, last=True)
        cut_words = ", cut at the limit: max_tokens=N sets another" if cut else ""
        self._put(f"{')' if self.thinking else ''}\n({plural(num_tokens, 'token')}{cut_words})\n")

    def _put(self, text: str) -> None:
        if self.live:
            put(self.stream, text)


def put(stream: TextIO, text: str) -> None:
    """Write at once; what the stream's encoding can't say becomes a question mark."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()


def as_asked(template: str, question: str) -> str:
    """The question inside `data.prompt`, where that has one column to be typed; else the question alone.

    >>> as_asked("{question}\\nPut the answer into \\\\boxed{{}}.", "2+2?")
    '2+2?\\nPut the answer into \\\\boxed{}.'
    """
    plain = re.sub(r"\[\[.*?\]\]", "", template, flags=re.DOTALL).replace("{{", "\0").replace("}}", "\1")
    if len(COLUMN.findall(plain)) != 1:
        return question
    return COLUMN.sub(lambda _: question, plain).replace("\0", "{").replace("\1", "}")
