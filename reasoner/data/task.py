"""All data of a run: worked examples for SFT, prompts for GRPO, evaluation sets, kept apart from each other, counted.

What is held out stays so whatever `stages` says, so that a stage run on its own never trains on another run's test.
Left out: reading anything that no stage needs.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from reasoner.config import Config, Data, data_of
from reasoner.data.drawn import AT_ONCE, TRIED, Drawn
from reasoner.data.examples import make_examples
from reasoner.data.problems import Problem, Problems, at, make_problems
from reasoner.data.prompts import make_prompts
from reasoner.data.python_rows import rows_from_python
from reasoner.data.rows import Rows, read_rows, source_of
from reasoner.data.shapes import shape_of
from reasoner.data.split import (
    drop_duplicates,
    exact_key,
    take_heldout,
    without_heldout,
    without_overlap,
    without_shared_ngrams,
)
from reasoner.data.templates import Template, make_template
from reasoner.errors import ConfigError, DataError, ModelError
from reasoner.types import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELDOUT, VALIDATION = "heldout", "validation"
TRAINING = ("sft", "grpo")
MEASURING = {"evaluate", "export"}
OWN_SOURCE = {"path", "name", "subset", "split", "sheet"}
SETTING = re.compile(r"(?<![\w./])data\.(\w+)")
# What can become of a row, in the order in which it can happen, with the words for it.
COUNTS = {
    "dropped_by_map": "dropped by data.map",
    "several_turns": "conversations of several turns",
    "empty": "empty",
    "heldout": "held out",
    "duplicates": "duplicates",
    "overlap_removed": "removed for overlap",
    "long_prompts": "prompts too long",
    "long_completions": "completions too long",
}
AS_DRAWN = ("long_prompts", "long_completions")  # what only the tokens tell
SHOWN_CHARS = 400

Report = dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class Task:
    """What a run trains on and is measured on.

    `report` has a section's (sft, grpo, each set's) counts: `rows` read, one for each of COUNTS, `kept`; and for a set
    `overlap_removed_from_training`. Of a big source (see drawn.py) it lacks those of AS_DRAWN, which `kept` then
    includes. `validation` are rows of GRPO's that never train, to choose a checkpoint by.
    """

    template: Template
    examples: Sequence[Example]
    prompts: Sequence[Prompt]
    sets: Mapping[str, tuple[Prompt, ...]]
    report: Report
    validation: tuple[Prompt, ...] = ()
    notes: tuple[str, ...] = ()  # what was recognised in the rows

    @property
    def overlap_removed(self) -> dict[str, int]:
        """By set, the rows that overlap cost: the set's own (masked) or training's (exact)."""
        return {
            name: self.report[name]["overlap_removed"] + self.report[name]["overlap_removed_from_training"]
            for name in self.sets
        }

    def first_prompts(self, count: int) -> list[Prompt]:
        """At most `count` prompts: of GRPO, then of SFT, then of the sets."""
        worked = (example.prompt for example in self.examples)
        return list(islice(chain(self.prompts, worked, *self.sets.values()), count))

    def columns(self) -> set[str]:
        """The columns that every prompt has."""
        worked = [example.prompt for example in self.examples] if not isinstance(self.examples, Drawn) else []
        made = [side for side in (self.prompts, worked, *self.sets.values()) if not isinstance(side, Drawn)]
        names = [frozenset(prompt.columns) for prompt in chain(*made)]
        names += [side.columns for side in (self.prompts, self.examples) if isinstance(side, Drawn)]
        return set(frozenset.intersection(*names))

    def lines(self) -> list[str]:
        """What was recognised, a line a section, and the first prompt as the model reads it."""
        prompts = self.first_prompts(1)
        text = prompts[0].text if len(prompts[0].text) <= SHOWN_CHARS else f"{prompts[0].text[:SHOWN_CHARS]}..."
        shown = f"the first prompt, {len(prompts[0].token_ids)} tokens: {text!r}"
        return [*self.notes, *(_line(name, counts) for name, counts in self.report.items()), shown]


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the conf that reads rows: a training stage, a set, `data` for its held-out rows, or `grpo.data` for
    those that choose a checkpoint."""

    name: str
    where: str  # in the conf
    data: Data
    source: tuple[str, ...]
    given: Sequence[Mapping[str, Any]] | None
    own: frozenset[str] = frozenset()  # the keys that it says itself, and not `data`

    @property
    def trains(self) -> bool:
        """True for sft and grpo."""
        return self.name in TRAINING


def load_task(config: Config, tokenizer: "PreTrainedTokenizerBase", rows: Any = None) -> Task:
    """The task of the conf; `rows` from Python (see rows_from_python) stand in for those of `data`, and of sections
    without their own source.

    Raises DataError (with file:line), ConfigError, ModelError (the template, characters) or MissingExtra.
    """
    sections = _sections(config, None if rows is None else rows_from_python(rows, config.data.split))
    template = _template_of(sections, tokenizer)
    problems, counts, notes = _read(sections, template)
    _split(sections, problems, counts)
    measured = not MEASURING.isdisjoint(config.stages)
    used = [section for section in sections if section.trains or section.name == VALIDATION or measured]
    task = _encode(used, problems, counts, template, config.sft.max_completion_tokens)
    return replace(task, notes=notes)


def _sections(config: Config, given: Sequence[Mapping[str, Any]] | None) -> list[Section]:
    def section(name: str, where: str, node: Mapping[str, Any]) -> Section:
        data = data_of(config, node, where)
        rows = None if OWN_SOURCE & node.keys() else given
        own = frozenset(node.keys() | OWN_SOURCE if {"path", "name"} & node.keys() else node.keys())
        with naming(where, own):
            source = source_of(data, rows)
        return Section(name, where, data, source, rows, own)

    training = [section(name, f"{name}.data", getattr(config, name).data) for name in TRAINING if name in config.stages]
    measured = not MEASURING.isdisjoint(config.stages)
    nodes = config.evaluate.sets
    chooses = "grpo" in config.stages and data_of(config, config.grpo.data, "grpo.data").validation > 0
    for name in (name for name in (*TRAINING, HELDOUT, *([VALIDATION] if chooses else [])) if name in nodes):
        raise ConfigError(f"evaluate.sets.{name}: the name is taken; choose another for the set")
    validation = [section(VALIDATION, "grpo.data", config.grpo.data)] if chooses else []
    if not nodes:
        heldout = section(HELDOUT, "data", {})
        shared = bool(config.data.heldout) and any(one.source == heldout.source for one in training)
        return [*training, *validation, heldout] if measured or shared else [*training, *validation]
    sets = [section(name, f"evaluate.sets.{name}", node) for name, node in nodes.items()] if measured else []
    for one in sets:
        twin = next((other for other in training if other.source == one.source), None)
        if twin:
            what = f"{one.where} reads the rows that {twin.where} trains on"
            raise DataError(f"{what}: give {one.where}.split or {one.where}.path, or leave evaluate.sets out")
    return [*training, *validation, *sets]


@contextmanager
def naming(where: str, own: Collection[str]) -> Iterator[None]:
    """Errors of reading call a setting by the name under which it can be changed: `sft.data.map` for `data.map` where
    `own`, what `sft.data` says itself, has a map."""
    try:
        yield
    except (ConfigError, DataError) as error:
        told = SETTING.sub(lambda found: f"{where}.{found[1]}" if found[1] in own else found[0], str(error))
        raise type(error)(told) from error.__cause__


def _template_of(sections: Sequence[Section], tokenizer: "PreTrainedTokenizerBase") -> Template:
    first = sections[0]
    for other in sections[1:]:
        for key in ("template", "date"):
            one, two = getattr(first.data, key), getattr(other.data, key)
            if one != two:
                raise ConfigError(
                    f"{first.where} has {key}={one}, {other.where} {key}={two}: a run has one; set data.{key}"
                )
    return make_template(tokenizer, first.data)


def _read(
    sections: Sequence[Section], template: Template
) -> tuple[dict[str, Problems], dict[str, Counter[str]], tuple[str, ...]]:
    problems: dict[str, Problems] = {}
    counts: dict[str, Counter[str]] = {}
    known: dict[tuple[Any, ...], Rows] = {}
    seen: list[tuple[Rows, Data, bool, str]] = []
    notes: list[str] = []
    masked = any(section.data.overlap == "masked" for section in sections)
    for section in sections:
        data, name = section.data, section.name
        key = (section.source, data.map, data.limit, data.size)
        with naming(section.where, section.own):
            if key not in known:
                known[key] = read_rows(data, section.given)
            rows = known[key]
            first = rows.rows[0] if rows.rows else None
            shape = shape_of(first.columns, data) if first else None
            if shape and first:
                with at(first.where):
                    data = shape.settings(data, first.columns)
                notes.append(f"{name}: {shape.told(data)}")
            worked = name == "sft"
            twin = next((other for a, b, c, other in seen if a is rows and b == data and c == worked), None)
            if twin:  # a big file is read once, not once a section
                problems[name], counts[name] = problems[twin], counts[twin].copy()
                continue
            problems[name], counts[name] = make_problems(
                rows, data, template.guard, worked=worked, shape=shape, masked=masked
            )
            seen.append((rows, data, worked, name))
    return problems, counts, tuple(notes)


def _split(sections: Sequence[Section], problems: dict[str, Problems], counts: Mapping[str, Counter[str]]) -> None:
    """Draws the held-out rows and takes them, duplicates and overlap away from where they don't belong."""
    drawn = [section for name in (HELDOUT, VALIDATION) for section in sections if section.name == name]
    for place, one in enumerate(drawn):
        for before in drawn[:place]:
            _hold_out(problems, counts, one, before)
        key = f"data.{one.name}"
        problems[one.name] = take_heldout(problems[one.name], getattr(one.data, one.name), one.data.seed, key)
    for section in (section for section in sections if section.trains):
        name = section.name
        for one in drawn:
            _hold_out(problems, counts, section, one)
        problems[name], counts[name]["duplicates"] = drop_duplicates(problems[name])
    training = [section.name for section in sections if section.trains or section.name == VALIDATION]
    for section in (section for section in sections if section.name not in training):
        name = section.name
        if section.data.overlap == "masked":
            trained = [problems[source] for source in training]
            problems[name], counts[name]["overlap_removed"] = without_overlap(problems[name], trained, "words")
        elif section.data.overlap == "exact":
            key = exact_key([problems[side] for side in (name, *training)])
            for source in training:
                problems[source], removed = without_overlap(problems[source], [problems[name]], key)
                counts[source]["overlap_removed"] += removed
                counts[name]["overlap_removed_from_training"] += removed
        elif section.data.overlap == "ngrams":
            for source in training:
                problems[source], removed = without_shared_ngrams(problems[source], problems[name])
                counts[source]["overlap_removed"] += removed
                counts[name]["overlap_removed_from_training"] += removed


def _hold_out(
    problems: dict[str, Problems], counts: Mapping[str, Counter[str]], section: Section, drawn: Section
) -> None:
    """Takes the rows that were drawn for another section away from this one."""
    same = section.source == drawn.source
    problems[section.name], gone = without_heldout(problems[section.name], problems[drawn.name], same_source=same)
    counts[section.name]["heldout"] += gone


def _encode(
    sections: Sequence[Section],
    problems: Mapping[str, Problems],
    counts: Mapping[str, Counter[str]],
    template: Template,
    max_completion_tokens: int,
) -> Task:
    examples: Sequence[Example] = ()
    prompts: dict[str, Sequence[Prompt]] = {}
    report: Report = {}
    seen: set[str] = set()
    for section in sections:
        name, count = section.name, counts[section.name]
        learns = section.trains or name == VALIDATION
        names = ["rows", *COUNTS] if learns else ["rows", *COUNTS, "overlap_removed_from_training"]
        if section.trains and len(problems[name]) > AT_ONCE:
            names = [what for what in names if what not in AS_DRAWN]
            report[name] = {what: count[what] for what in names} | {"kept": len(problems[name])}
            if name == "sft":
                drawn = examples = Drawn(problems[name], _example_maker(section, template, max_completion_tokens, seen))
            else:
                drawn = prompts[name] = Drawn(problems[name], _prompt_maker(section, template, seen))
            if drawn.none_fits:
                told = f"the first {min(TRIED, len(drawn)):,} of {len(drawn):,} rows are too long"
                raise DataError(f"{name}: {told}: raise data.max_prompt_tokens or sft.max_completion_tokens")
            continue
        made, count["long_prompts"] = make_prompts(problems[name], section.data, template, name)
        kept = [problem for problem, _ in made]
        if name == "sft":
            worked, count["long_completions"] = make_examples(made, template, max_completion_tokens)
            kept, examples = [problem for problem, _ in worked], tuple(example for _, example in worked)
        prompts[name] = tuple(prompt for _, prompt in made)
        report[name] = {what: count[what] for what in names} | {"kept": len(kept)}
        if not kept:
            raise DataError(f"{_line(name, report[name])}: nothing is left to work on; see {section.where}")
        _check_characters(kept, template, seen)
    sets = {name: tuple(found) for name, found in prompts.items() if name not in (*TRAINING, VALIDATION)}
    validation = tuple(prompts.get(VALIDATION, ()))
    return Task(template, examples, prompts.get("grpo", ()), sets, report, validation)


def _prompt_maker(section: Section, template: Template, seen: set[str]) -> Callable[[Problem], Prompt | str]:
    """Makes one prompt of a big source, or says why there is none."""

    def make(problem: Problem) -> Prompt | str:
        _check_characters([problem], template, seen)
        made, _ = make_prompts([problem], section.data, template, section.name)
        return made[0][1] if made else "long_prompts"

    return make


def _example_maker(
    section: Section, template: Template, max_completion_tokens: int, seen: set[str]
) -> Callable[[Problem], Example | str]:
    """Makes one worked example of a big source, or says why there is none."""

    def make(problem: Problem) -> Example | str:
        _check_characters([problem], template, seen)
        made, _ = make_prompts([problem], section.data, template, section.name)
        worked, _ = make_examples(made, template, max_completion_tokens)
        return worked[0][1] if worked else "long_completions" if made else "long_prompts"

    return make


def _check_characters(problems: Iterable[Problem], template: Template, seen: set[str]) -> None:
    """Raises ModelError if the tokenizer loses characters of a question or a gold text: no reward can come of them."""
    for problem in problems:
        for text in (problem.question, problem.answer, problem.completion):
            if seen.issuperset(text):
                continue
            lost = template.codec.lost(template.codec.unguard(text))
            if lost:
                raise ModelError(
                    f"{problem.where}: the model's tokenizer loses the characters {' '.join(sorted(lost))}: choose "
                    "another model, or replace them by data.map"
                )
            seen.update(text)


def _line(name: str, counts: Mapping[str, int]) -> str:
    what = "examples" if name == "sft" else "prompts" if name == "grpo" else "problems"
    gone = [f"{counts[key]:,} {told}" for key, told in COUNTS.items() if counts.get(key)]
    if AS_DRAWN[0] not in counts:
        gone.append("those too long are found, left out and counted as they are drawn")
    return f"{name}: {counts['kept']:,} {what} of {counts['rows']:,} rows" + (f" ({', '.join(gone)})" if gone else "")
