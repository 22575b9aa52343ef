"""Rows in the shape of another program, recognised by their columns where `data.prompt` is left as it is and there is
no column `question`: verl's, TRL's (messages; prompt and completion), ShareGPT's and Alpaca's.

A shape gives the columns question, answer, worked and system, in place of those that it read. Left out: conversations
of several turns (the row is dropped and counted), preferences, images, tool calls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from reasoner.config import Data
from reasoner.data.columns import ColumnTemplate, cell_text
from reasoner.errors import DataError

DEFAULTS = Data()
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant"}
GOLD_NAMES = ("answer", "solution", "ground_truth", "final_answer")
INSTRUCTION = "{instruction}[[\n\n{input}]]"


@dataclass(frozen=True, slots=True)
class Turns:
    """A conversation of one turn; `said` is "" where no answer is written."""

    system: str
    asked: str
    said: str


@dataclass(frozen=True, slots=True)
class Shape:
    """How one program writes its rows. `read` gives the row's new columns, or None for a conversation of several turns;
    `uses` are the columns that it reads and that leave the row.
    """

    name: str
    uses: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any] | None]
    prompt: str = "{question}"
    brings_system: bool = True  # whether a column `system` is the row's own system text

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row as we read it. Raises DataError where it has no question."""
        made = self.read(row)
        if made is None:
            return None
        kept = {name: cell for name, cell in row.items() if name not in self.uses}
        return {**made, **kept}

    def settings(self, data: Data, row: Mapping[str, Any]) -> Data:
        """`data` with the templates that the shape brings, where the conf leaves them as they are."""
        if self is VERL_BESIDE:
            return data
        made = self.read(row) or {}
        written = data.completion is None and bool(made.get("worked"))
        return replace(data, prompt=self.prompt, completion="{worked}" if written else data.completion)

    def told(self, data: Data) -> str:
        """The line that says what was recognised, with the keys that change it."""
        worked = f", data.completion={data.completion}" if data.completion else ""
        return f"rows in the shape of {self.name}: data.prompt={data.prompt!r}, data.answer={data.answer}{worked}"


def shape_of(row: Mapping[str, Any], data: Data) -> Shape | None:
    """The shape of a source's first row, None where the conf's own templates fit or nothing is recognised.

    Of verl's rows with other columns that the conf's templates read, only `prompt` is known, and leaves the row.
    """
    if data.prompt != DEFAULTS.prompt or "question" in row:
        if "prompt" not in row or not _has_gold(row):
            return None
        templates = {"prompt": data.prompt, "answer": data.answer, "completion": data.completion or ""}
        read = [ColumnTemplate(text, f"data.{key}").names(row) for key, text in templates.items()]
        return None if any("prompt" in names for names in read) else VERL_BESIDE
    return next((shape for fits, shape in SHAPES if fits(row)), None)


def turns(messages: Any, *, role: str = "role", content: str = "content") -> Turns | None:
    """System text, question and answer of messages; None if there are several turns. Raises DataError if there is no
    question, or a message is no text.
    """
    told: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    for message in messages:
        if not isinstance(message, Mapping) or role not in message:
            raise DataError(f"a message without '{role}': {cell_text(message)[:80]}")
        who = ROLES.get(str(message[role]), str(message[role]))
        who = "system" if who == "developer" else who
        if who not in told:
            raise DataError(f"a message of the role '{who}': only system, user and assistant are read")
        told[who].append(_content(message.get(content)))
    if not told["user"]:
        raise DataError("the messages hold no question of the user's")
    if len(told["user"]) > 1 or len(told["assistant"]) > 1:
        return None
    return Turns("\n".join(told["system"]), told["user"][0], "".join(told["assistant"]))


def _content(content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise DataError("a message holds more than text: images and tools are not read")
        return "".join(map(str, parts))
    return cell_text(content)


def _is_messages(cell: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    return isinstance(cell, Sequence) and not isinstance(cell, str) and bool(cell) and isinstance(cell[0], Mapping)


def _made(found: Turns | None, answer: Any = None) -> dict[str, Any] | None:
    if found is None:
        return None
    gold = found.said if answer is None else answer
    return {"question": found.asked, "answer": gold, "worked": found.said, "system": found.system}


def _verl(row: Mapping[str, Any]) -> dict[str, Any] | None:
    gold = row["reward_model"]["ground_truth"]
    return _made(turns(row["prompt"]) if _is_messages(row["prompt"]) else Turns("", cell_text(row["prompt"]), ""), gold)


def _messages(row: Mapping[str, Any]) -> dict[str, Any] | None:
    return _made(turns(row["messages"]), _gold(row))


def _sharegpt(row: Mapping[str, Any]) -> dict[str, Any] | None:
    first = row["conversations"][0]
    role, content = ("from", "value") if "from" in first else ("role", "content")
    found = turns(row["conversations"], role=role, content=content)
    if found is not None and row.get("system"):
        found = replace(found, system=cell_text(row["system"]))
    return _made(found, _gold(row))


def _prompt_completion(row: Mapping[str, Any]) -> dict[str, Any] | None:
    prompt, completion = row["prompt"], row.get("completion")
    if not _is_messages(prompt):
        said = "".join(_content(one.get("content")) for one in completion) if _is_messages(completion) else completion
        return _made(Turns("", cell_text(prompt), cell_text(said)), _gold(row))
    written = list(completion) if _is_messages(completion) else []
    found = turns([*prompt, *written])
    if found is not None and isinstance(completion, str):
        found = replace(found, said=completion)
    return _made(found, _gold(row))


def _alpaca(row: Mapping[str, Any]) -> dict[str, Any] | None:
    gold = _gold(row)
    return {"answer": row["output"] if gold is None else gold, "worked": row["output"]}


def _gold(row: Mapping[str, Any]) -> Any:
    return next((row[name] for name in GOLD_NAMES if row.get(name) is not None), None)


def _has_gold(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("reward_model"), Mapping) and "ground_truth" in row["reward_model"]


VERL_BESIDE = Shape("verl, whose column prompt is not read", ("prompt",), lambda row: {}, brings_system=False)
SHAPES: tuple[tuple[Callable[[Mapping[str, Any]], bool], Shape], ...] = (
    (lambda row: "prompt" in row and _has_gold(row), Shape("verl (prompt, reward_model)", ("prompt",), _verl)),
    (lambda row: _is_messages(row.get("messages")), Shape("TRL (messages)", ("messages",), _messages)),
    (
        lambda row: _is_messages(row.get("conversations")),
        Shape("ShareGPT (conversations)", ("conversations",), _sharegpt),
    ),
    (
        lambda row: {"instruction", "output"} <= row.keys(),
        Shape("Alpaca (instruction, input, output)", (), _alpaca, INSTRUCTION),
    ),
    (
        lambda row: isinstance(row.get("prompt"), str) or _is_messages(row.get("prompt")),
        Shape("TRL (prompt, completion)", ("prompt", "completion"), _prompt_completion),
    ),
)
