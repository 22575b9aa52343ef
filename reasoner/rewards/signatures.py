"""Which library a reward function was written for, told by its parameters, and the arguments that it gets.

Ours, batched, TRL's, verl's, verifiers' and reasoning-gym's functions are taken as they are. Functions of lists get
lists of one: each completion is scored on its own, so that batches change nothing. Left out: functions that compare the
completions of a group, and arguments that only the other library's trainer has (`trainer_state`, `parser`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from reasoner.config import nearest
from reasoner.errors import RewardError
from reasoner.rewards.answers import after_thinking, final_answer
from reasoner.rewards.worker import RETURNS_LIST, RETURNS_ONE, RETURNS_SCORE
from reasoner.types import Completion, Prompt

Family = Literal["ours", "lists", "verl", "verl_lists", "verifiers", "gym"]
OWN_NAMES = ("completion", "answer", "prompt", "finish_reason", "num_tokens", "prefill")
NAMES: dict[Family, tuple[str, ...]] = {
    "ours": OWN_NAMES,
    "lists": ("completions", "prompts", "completion_ids", "answers", "answer", "finish_reason", "num_tokens"),
    "verl": ("solution_str", "ground_truth", "extra_info"),
    "verl_lists": ("solution_strs", "ground_truths", "extra_infos"),
    "verifiers": ("completion", "answer", "prompt", "state", "info", "task"),
    "gym": ("answer", "entry"),
}
RETURNS: dict[Family, str] = {"lists": RETURNS_LIST, "verl": RETURNS_SCORE, "verl_lists": RETURNS_LIST}
WRITTEN_FOR: dict[Family, str] = {
    "ours": "one completion",
    "lists": "lists, as TRL's",
    "verl": "verl",
    "verl_lists": "verl's batches",
    "verifiers": "verifiers",
    "gym": "reasoning-gym",
}
# One of these among the parameters says whose the function is; two of different families are ambiguous.
MARKS: dict[str, Family] = {
    "completion": "ours",
    "completions": "lists",
    "prompts": "lists",
    "completion_ids": "lists",
    "solution_str": "verl",
    "solution_strs": "verl_lists",
}
OF_VERIFIERS = ("state", "info", "parser")
OF_A_GROUP = ("states", "tasks", "infos")
OF_TRAINERS = {
    "trainer_state": "TRL's trainer",
    "log_extra": "TRL's trainer",
    "log_metric": "TRL's trainer",
    "environments": "TRL's trainer",
    "parser": "a rubric of verifiers",
}


@dataclass(frozen=True, slots=True)
class Signature:
    """How one reward function is called. `messages`: completions as chat messages (None: where the prompt has them).

    >>> both = frozenset({"completion", "answer"})
    >>> Signature("ours", named=both, wanted=both, messages=False)
    """

    family: Family
    named: frozenset[str]  # its parameters
    wanted: frozenset[str] | None  # the names it is given; None: all there are
    messages: bool | None

    @property
    def returns(self) -> str:
        """What it must return, in the worker's words."""
        return RETURNS.get(self.family, RETURNS_ONE)

    def arguments(self, prompt: Prompt, completion: Completion, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the function is called with. The family's names come before options, and options before columns."""
        values = _values(self, prompt, completion, options)
        return values if self.wanted is None else {name: values[name] for name in values if name in self.wanted}


def _values(form: Signature, prompt: Prompt, completion: Completion, options: Mapping[str, Any]) -> dict[str, Any]:
    text = prompt.prefill + completion.text
    columns, family = prompt.columns, form.family
    own = {
        "answer": prompt.answer,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
    }
    if family == "ours":
        return {**columns, **options, "completion": text, "prompt": prompt.text, "prefill": prompt.prefill, **own}
    if family == "gym":
        return {**options, **_gym(prompt, text)}
    if family == "verl":
        info = columns.get("extra_info", dict(columns))
        source = {"data_source": columns["data_source"]} if "data_source" in columns else {}
        return {**source, "extra_info": info, **options, "solution_str": text, "ground_truth": prompt.answer}
    if family == "verl_lists":
        info = columns.get("extra_info", dict(columns))
        source = {"data_sources": [columns["data_source"]]} if "data_source" in columns else {}
        return {**source, "extra_infos": [info], **options, "solution_strs": [text], "ground_truths": [prompt.answer]}
    said, asked = (
        _as_messages(prompt, text)
        if form.messages or (form.messages is None and prompt.messages)
        else (
            text,
            prompt.text,
        )
    )
    if family == "verifiers":
        return {**columns, **options, **_rollout(prompt, asked, said)}
    lists = {name: [value] for name, value in {**columns, **own}.items() if name not in options}
    ids = [list(completion.token_ids)]
    return {
        **lists,
        **options,
        "completions": [said],
        "prompts": [asked],
        "completion_ids": ids,
        "answers": [prompt.answer],
    }


def _as_messages(prompt: Prompt, text: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    asked = [dict(message) for message in prompt.messages] or [{"role": "user", "content": prompt.text}]
    return [{"role": "assistant", "content": text}], asked


def _rollout(prompt: Prompt, asked: object, said: object) -> dict[str, Any]:
    """verifiers' arguments; `info` is the row's column of that name, or all its columns."""
    columns = prompt.columns
    names = {
        "prompt": asked,
        "completion": said,
        "answer": prompt.answer,
        "task": columns.get("task", "default"),
        "info": columns.get("info", dict(columns)),
    }
    return {**names, "state": {**columns, **names}}


def _gym(prompt: Prompt, text: str) -> dict[str, Any]:
    """reasoning-gym's arguments: what the completion gives as its answer, as `gym_answer` reads it, and the row."""
    said = final_answer(text)
    if said is None:
        said = (after_thinking(text) or "").strip()
    return {"answer": said, "entry": {"question": "", **prompt.columns, "answer": prompt.answer}}


def signature_of(where: str, parameters: Mapping[str, Any], options: Mapping[str, Any], columns: set[str]) -> Signature:
    """Whose function this is. Raises RewardError, naming the parameters, where they say two things or nothing; for a
    parameter that nothing fills, and for an option that nothing takes.
    """
    where = f"{where} (line {parameters['line']})" if parameters["line"] else where
    names = [*parameters["required"], *parameters["optional"]]
    family = _family(where, parameters, names, columns)
    _check_options(where, parameters, names, options, NAMES[family])
    _check_required(where, parameters["required"], family, options, columns)
    named = wanted = frozenset(names)
    if parameters["takes_all"]:  # a stranger's ** takes what its own library would give, and no columns
        stranger = family in ("verl", "verl_lists", "verifiers", "gym")
        sources = {"verl": {"data_source"}, "verl_lists": {"data_sources"}}.get(family, set())
        wanted = frozenset({*names, *NAMES[family], *options, *sources}) if stranger else None
    return Signature(family, named, wanted, _messages(family, parameters, names))


def _family(where: str, parameters: Mapping[str, Any], names: list[str], columns: set[str]) -> Family:
    marks: dict[str, Family] = {name: MARKS[name] for name in names if name in MARKS}
    if "entry" in names and "answer" in names and not marks and "entry" not in columns:
        return "gym"
    if "entry" in names and marks and "entry" not in columns:
        marks["entry"] = "gym"
    if len(set(marks.values())) > 1:
        said = " and ".join(f"'{name}' ({WRITTEN_FOR[family]})" for name, family in marks.items())
        raise RewardError(f"{where}: its parameters {said} belong to different kinds of reward function: keep one kind")
    if not names and parameters["takes_all"]:
        raise RewardError(
            f"{where} takes only **{parameters['takes_all']}, which may mean anything: name 'completion' (one text), "
            "'completions' (lists, as TRL's) or 'solution_str' (verl's) among its parameters"
        )
    families: list[Family] = [*marks.values(), "ours"]
    family = families[0]
    if family == "lists":
        grouped = [name for name in names if name in OF_A_GROUP and name not in columns]
        if grouped:
            raise RewardError(
                f"{where} asks for '{grouped[0]}' of a whole group, as verifiers' group functions do: each completion "
                "is scored on its own here; write it for one completion"
            )
        return family
    if family == "ours" and "completion" in names:
        return _ours_or_verifiers(where, parameters, names, columns)
    return family


def _ours_or_verifiers(where: str, parameters: Mapping[str, Any], names: list[str], columns: set[str]) -> Family:
    """Both take `completion`: the annotation of it decides, then the names that only verifiers has."""
    told = _says_messages(parameters["annotations"].get("completion", ""))
    if told is not None:
        strange = told or any(name in names and name not in columns for name in OF_VERIFIERS)
        return "verifiers" if strange else "ours"
    strange = [name for name in names if name in OF_VERIFIERS]
    both = [name for name in strange if name in columns]
    if both:
        raise RewardError(
            f"{where}: '{both[0]}' among its parameters ({', '.join(names)}) is a column of the rows and an argument "
            "of verifiers' rubric functions: write completion: str for the column and a text, or completion: "
            "list[dict] for verifiers' messages"
        )
    return "verifiers" if strange else "ours"


def _says_messages(annotation: str) -> bool | None:
    """True for chat messages, False for text, None where the annotation says neither."""
    if "dict" in annotation.lower() or "Message" in annotation:
        return True
    return False if "str" in annotation else None


def _messages(family: Family, parameters: Mapping[str, Any], names: list[str]) -> bool | None:
    annotations = parameters["annotations"]
    if family == "verifiers":  # its environments are chats unless the function says otherwise
        return _says_messages(annotations.get("completion", "")) is not False
    if family == "lists":
        return False if "answers" in names else _says_messages(annotations.get("completions", ""))
    return False


def _check_options(
    where: str, parameters: Mapping[str, Any], names: list[str], options: Mapping[str, Any], filled: tuple[str, ...]
) -> None:
    for option in options:
        if option in filled:
            raise RewardError(
                f"{where}: the option '{option}' is an argument that every reward gets: choose another name"
            )
        if not parameters["takes_all"] and option not in names:
            raise RewardError(f"{where} takes no option '{option}'{nearest(option, names)}")


def _check_required(
    where: str, required: list[str], family: Family, options: Mapping[str, Any], columns: set[str]
) -> None:
    of_rows = {
        "verl": columns & {"data_source"},
        "verl_lists": {"data_sources"} if "data_source" in columns else set(),
        "gym": set(),
    }.get(family, columns)
    known = [*NAMES[family], *sorted(options), *sorted(of_rows - set(NAMES[family]))]
    if family == "gym" and "metadata" not in columns:
        raise RewardError(f"{where} is reasoning-gym's score_answer, which needs the column 'metadata' of its rows")
    for name in required:
        if name in known:
            continue
        if name in OF_TRAINERS:
            raise RewardError(
                f"{where} asks for '{name}', which only {OF_TRAINERS[name]} has: give it a default, or fill it with "
                "functools.partial"
            )
        if name in ("data_source", "data_sources"):
            raise RewardError(
                f"{where} asks for '{name}': the rows have no column data_source; say it in the part's options "
                f"({name}: {'openai/gsm8k' if name == 'data_source' else '[openai/gsm8k]'})"
            )
        close = nearest(name, known)
        there = "" if close.startswith(";") else f" There are: {', '.join(known)}"
        raise RewardError(
            f"{where} asks for '{name}', which is no argument of a reward, no option and no column{close}{there}"
        )
