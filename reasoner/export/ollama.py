"""to=ollama: a folder that `ollama create NAME -f Modelfile` takes: the GGUF file and a Modelfile.

Ollama does not run the Jinja template that a GGUF file carries: it knows some by their text and sends all others'
prompts bare. So the Modelfile has a Go template, made of what the run's own template writes around turns, and compared
with it on sample conversations before anything is written. Left out: tools, images, and templates that rewrite earlier
turns, which are refused.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reasoner.config import Config
from reasoner.data.codec import Codec
from reasoner.data.templates import ChatTemplate, Template
from reasoner.errors import ModelError
from reasoner.types import Message

MODELFILE = "Modelfile"
PROMPT = "{{ .Prompt }}"
SYSTEM, ASKED, SAID, AGAIN = "Zq7system", "Zq7asked", "Zq7said", "Zq7again"
LEAST_CONTEXT = 4096  # tokens; more only where the run asked for more, as Ollama reserves memory for all of it
REMEDY = "export to=gguf, and write a Modelfile by hand"


@dataclass(frozen=True, slots=True)
class Turns:
    """What a chat template writes around each turn's text.

    >>> Turns(first="", system=("<|system|>", "<|end|>"), user=("<|user|>", "<|end|>"),
    ...       assistant=("<|assistant|>", "<|end|>"), opening="<|assistant|>")
    """

    first: str  # before the first turn where there is no system text
    system: tuple[str, str] | None  # None: the template takes none
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str  # of the answer to come
    in_user: bool = False  # the system text stands inside the first question's turn, which `system` opens

    def go(self) -> str:
        """Ollama's template."""
        branches = []
        asks = self.user[0]
        if self.system:
            branches.append(("system", *self.system))
            if self.in_user:
                asks = f"{{{{ if or (ne $i 1) (not $.System) }}}}{asks}{{{{ end }}}}"
        branches += [("user", asks, self.user[1]), ("assistant", *self.assistant)]
        inner = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}' for role, before, after in branches
        )
        first = f"{{{{ if not .System }}}}{self.first}{{{{ end }}}}" if self.system and self.first else self.first
        return f"{first}{{{{ range $i, $m := .Messages }}}}{{{{ {inner}{{{{ end }}}}{{{{ end }}}}{self.opening}"


def template_of(template: Template) -> str:
    """Ollama's template of a run's. Raises ModelError for one that it can't say."""
    if not isinstance(template, ChatTemplate):
        return PROMPT
    bos = template.codec.tokenizer.bos_token if Codec(template.codec.tokenizer).begins_with_bos() else ""
    write = _without_bos(template, str(bos or ""))
    turns = _turns(write, str(template.codec.tokenizer.eos_token))
    if turns is not None:
        go = turns.go()
        plain = "".join((turns.first, *(turns.system or ()), *turns.user, *turns.assistant, turns.opening))
        if "{{" not in plain and '"""' not in plain and all(_same(go, write, talk) for talk in _samples(turns)):
            return go
    raise ModelError(f"Ollama's templates can't say what the {template.name} writes: {REMEDY}")


def _without_bos(template: ChatTemplate, bos: str) -> Callable[..., str]:
    """What the template writes, less the BOS, which llama.cpp puts there by itself."""

    def write(messages: Sequence[Message], generate: bool = True) -> str:
        return template.text_of(messages, generate=generate).removeprefix(bos)

    return write


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _turns(write: Callable[..., str], eos: str) -> Turns | None:
    """What stands around the turns of a sample conversation; None where the template loses or repeats one."""
    ask, say = _turn("user", ASKED), _turn("assistant", SAID)
    talk = _between(write([ask, say, _turn("user", AGAIN)]), ASKED, SAID, AGAIN)
    alone = _between(write([ask], generate=False), ASKED)
    ended = _between(write([ask, say], generate=False), ASKED, SAID)
    if talk is None or alone is None or ended is None:
        return None
    before, answers, asks_again, rest = talk
    # Phi's template ends a whole talk with one more token.
    asked_end, said_end = (
        closing if following.startswith(closing) else _shared(closing.removesuffix(eos), following)
        for closing, following in ((alone[1], answers), (ended[2], asks_again))
    )
    if not rest.startswith(asked_end):
        return None
    if not before.endswith(asks_again[len(said_end) :]):
        said_end = asks_again[: len(asks_again) - len(_shared(before[::-1], asks_again[::-1]))]
    user = (asks_again[len(said_end) :], asked_end)
    assistant, opening = (answers[len(asked_end) :], said_end), rest[len(asked_end) :]
    first = before[: len(before) - len(user[0])]
    try:
        systemic = _between(write([_turn("system", SYSTEM), ask]), SYSTEM, ASKED)
    except ModelError:
        systemic = None  # it takes no system text
    if systemic is None:
        return Turns(first, None, user, assistant, opening)
    start, middle, _ = systemic
    in_user = not user[0] or not middle.endswith(user[0])
    return Turns(
        first, (start, middle if in_user else middle[: -len(user[0])]), user, assistant, opening, in_user=in_user
    )


def _between(text: str, *marks: str) -> list[str] | None:
    """The pieces around the marks, each of which must stand there once and in this order."""
    pieces = re.split("|".join(marks), text)
    return pieces if re.findall("|".join(marks), text) == list(marks) else None


def _shared(a: str, b: str) -> str:
    """How both begin."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _samples(turns: Turns) -> list[list[Message]]:
    talk = [
        _turn("user", "What is 2 + 2?"),
        _turn("assistant", "It is 4."),
        _turn("user", "And\n3 * 5?"),
        _turn("assistant", "15"),
        _turn("user", "Sure?"),
    ]
    samples = [talk[:1], talk[:3], talk]
    if turns.system:
        samples += [[_turn("system", "Be brief.\nThink."), *talk[:n]] for n in (1, 3, 5)]
    return samples


def _same(go: str, write: Callable[..., str], talk: Sequence[Message]) -> bool:
    return render(go, talk) == write(talk)


def render(go: str, messages: Sequence[Message]) -> str:
    """What Ollama sends for a talk: Go's text/template of the few forms that `Turns.go` writes.

    https://github.com/ollama/ollama/blob/main/docs/template.md
    """
    system = next((turn["content"] for turn in messages if turn["role"] == "system"), "")
    prompt = messages[-1]["content"]
    parts = re.split(r"\{\{ (.*?) \}\}", go)
    texts, actions = parts[::2], parts[1::2]

    def holds(condition: str, index: int, turn: Message) -> bool:
        if condition.startswith("eq .Role "):
            return turn["role"] == condition.split('"')[1]
        known = {"not .System": not system, "or (ne $i 1) (not $.System)": index != 1 or not system}
        return known[condition]

    def run(at: int, index: int, turn: Message, shown: bool) -> tuple[str, int]:
        """The text from piece `at` to the end of its block, and the action that ended it."""
        out = texts[at] if shown else ""
        while at < len(actions):
            action = actions[at]
            if action == "end" or action.startswith("else"):
                return out, at
            if action.startswith("range "):
                inner, stop = "", at
                for number, one in enumerate(messages):
                    text, stop = run(at + 1, number, one, True)
                    inner += text
                out, at = out + inner, stop
            elif action.startswith("if "):
                done, stop, branch = False, at, action
                while branch != "end":
                    takes = shown and not done and holds(branch.removeprefix("else ").removeprefix("if "), index, turn)
                    text, stop = run(stop + 1, index, turn, takes)
                    out, done, branch = out + text, done or takes, actions[stop]
                at = stop
            elif shown:
                out += {".Content": turn.get("content", ""), ".Prompt": prompt}[action]
            at += 1
            out += texts[at] if shown else ""
        return out, at

    return run(0, 0, {}, True)[0]


def modelfile(
    file: str, config: Config, template: str, stops: Sequence[str], *, system: str | None, context: int
) -> str:
    """The Modelfile of `file` beside it: sampling as the run's evaluation samples, stop tokens by their text, and as
    many tokens of context as the run asked for (at least 4,096 where the model has them)."""
    asked = config.data.max_prompt_tokens + config.grpo.max_completion_tokens
    settings: Mapping[str, Any] = {
        "num_ctx": min(context, max(LEAST_CONTEXT, asked)),
        "temperature": config.evaluate.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
    }
    lines = [f"FROM ./{file}", f'TEMPLATE """{template}"""']
    if system:
        if '"""' in system:
            raise ModelError(f'data.system holds """, which a Modelfile can\'t: {REMEDY}')
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in settings.items()]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    return "\n".join(lines) + "\n"
