"""A ledger of pass rates: what each prompt earned so far, kept across runs, so that prompts without signal rest.

A prompt whose whole group was right, or wrong, teaches nothing. After one such visit it rests for one turn, after two
in a row for three, after more for seven: solved and hopeless prompts are drawn less, and never forgotten, for the model
changes. One visit with signal brings a prompt back. All of it is a function of the entries, which every checkpoint
holds, so that a resumed run draws as the unbroken one. Left out: a model of how hard a prompt is that was never tried.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from reasoner import disk
from reasoner.errors import ConfigError
from reasoner.grpo.advantages import JudgedGroup
from reasoner.types import Prompt
from reasoner.words import plural

RESTING = "resting"
LONGEST_REST = 7  # turns
SHOWN_CHARS = 300  # of a prompt's text in the file
SHOWN = 3  # hopeless prompts in the console


@dataclass(slots=True)
class Entry:
    """What is known of a prompt.

    >>> Entry(solved=9, total=16, dull=0, rest=0, text="2+2=", answer="4")
    """

    solved: int = 0  # completions that the accuracy reward gave full marks, over all visits
    total: int = 0  # completions whose rewards did not fail
    dull: int = 0  # visits without signal since the last one with it
    rest: int = 0  # turns for which it is passed over
    text: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Visit:
    """What one group tells of its prompt."""

    prompt: Prompt
    solved: int
    total: int
    signal: bool


def visits(judged: Iterable[JudgedGroup], accuracy_part: str) -> list[Visit]:
    """What these groups tell, those left out in which every reward failed."""
    found: list[Visit] = []
    for one in judged:
        valid = [score for score in one.group.scores if not score.failed]
        solved = sum(score.parts.get(accuracy_part) == 1 for score in valid)
        if valid:
            found.append(Visit(one.group.prompt, solved, len(valid), not one.dead))
    return found


class Ledger:
    """The pass rates of prompts, by a hash of text and answer. `about` says of which model and reward they are.

    Every rank has one and keeps it alike; the main rank alone writes it.
    """

    def __init__(self, path: Path, about: Mapping[str, str]):
        self.path, self.about = path, dict(about)
        self.entries: dict[str, Entry] = {}

    def read(self) -> None:
        """Take over what the file holds, if it is there. Raises ConfigError if it is no ledger, or one of another model
        or reward.
        """
        if not self.path.exists():
            return
        try:
            head, *rows = [json.loads(line) for line in self._lines()]
            about = head["ledger"]
            found = {row["key"]: Entry(**{name: row[name] for name in row if name != "key"}) for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ConfigError(f"grpo.ledger={self.path} is no ledger of ours ({why}): name another file") from None
        if about != self.about:
            raise ConfigError(f"grpo.ledger={self.path} is of {about}, this run of {self.about}: name another file")
        self.entries = found

    def _lines(self) -> list[str]:
        """Split at line feeds alone: a prompt may hold U+2028, which str.splitlines takes for an end too."""
        return self.path.read_text(encoding="utf-8").removesuffix("\n").split("\n")

    def turn(self, prompt: Prompt) -> str | None:
        """A word if the prompt rests on this turn of its, which that brings closer to its end; else None."""
        entry = self.entries.get(key_of(prompt))
        if entry is None or not entry.rest:
            return None
        entry.rest -= 1
        return RESTING

    def note(self, seen: Iterable[Visit]) -> None:
        """Add what a step's groups, those of all ranks, tell."""
        for visit in seen:
            prompt = visit.prompt
            new = Entry(text=prompt.text[-SHOWN_CHARS:], answer=prompt.answer)
            entry = self.entries.setdefault(key_of(prompt), new)
            entry.solved += visit.solved
            entry.total += visit.total
            entry.dull = 0 if visit.signal else entry.dull + 1
            entry.rest = min(2**entry.dull - 1, LONGEST_REST)

    def state(self) -> dict[str, Any]:
        """The entries as JSON can say them."""
        return {key: list(asdict(entry).values()) for key, entry in self.entries.items()}

    def load_state(self, state: Mapping[str, Sequence[Any]]) -> None:
        """The entries of `state()`, in place of those that are here."""
        self.entries = {key: Entry(*values) for key, values in state.items()}

    def write(self) -> None:
        """Write the file, the hopeless prompts first. Raises RunFolderError if the disk refuses."""
        ranked = sorted(self.entries.items(), key=lambda one: (one[1].solved / one[1].total, -one[1].total, one[0]))
        rows = [{"ledger": self.about}, *({"key": key, **asdict(entry)} for key, entry in ranked)]
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            disk.replace(self.path, data)
        except OSError as error:
            raise disk.refusal(error, f"write grpo.ledger={self.path}", "give a file that can be written") from error

    def lines(self) -> list[str]:
        """How many prompts were tried, solved and hopeless, and the most tried of the hopeless ones."""
        hopeless = sorted((e for e in self.entries.values() if not e.solved), key=lambda e: (-e.total, e.text))
        solved = sum(entry.solved == entry.total for entry in self.entries.values())
        tried = plural(len(self.entries), "prompt")
        said = f"ledger: {tried} tried, {solved:,} always solved, {len(hopeless):,} never; they are in {self.path}"
        return [said, *(f"never solved in {e.total:,}: {e.text!r}, answer {e.answer!r}" for e in hopeless[:SHOWN])]


def key_of(prompt: Prompt) -> str:
    """A prompt's name in the ledger, whatever its row's number is."""
    return blake2b(f"{prompt.text}\0{prompt.answer}".encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
