"""Runs compared from what they kept, without a model: `eval run=A run=B`, paired over the problems that all have."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reasoner.config import nearest
from reasoner.console import Console
from reasoner.errors import ConfigError, RunFolderError
from reasoner.evaluate import SetResult
from reasoner.evaluation.groups import check_kept
from reasoner.evaluation.measure import default_at, tell
from reasoner.evaluation.request import Request
from reasoner.results import sets_of_rows
from reasoner.run_folder import EVAL_PROBLEMS, read_config, read_rows
from reasoner.words import plural

CONDITIONS = (  # what rows must share to differ by their weights alone
    *("evaluate.max_completion_tokens", "grpo.max_completion_tokens", "evaluate.temperature", "evaluate.samples"),
    *("evaluate.accuracy", "data.prompt", "data.system", "data.template"),
)


@dataclass(frozen=True, slots=True)
class Side:
    """One row of one run."""

    label: str
    folder: Path
    sets: Mapping[str, SetResult]


def compare(request: Request) -> None:
    """Say the tables and gains of the request's rows over their common problems. Raises RunFolderError, ConfigError."""
    sides = _sides(request)
    with Console() as console:
        for line in _conditions(sides):
            console.say(line)
        common, told = _common(sides, request.sets)
        for line in told:
            console.say(line)
        check_kept(request.by, list(common[0][1].values()))
        samples = min(p.samples for _, sets in common for one in sets.values() for p in one.problems)
        if request.at and max(request.at) > samples:
            raise ConfigError(f"k={max(request.at)} asks for more than the {samples} samples that were kept")
        tell(common, request.by, request.at or default_at(samples), console)


def _sides(request: Request) -> list[Side]:
    runs = request.runs
    kept = [_kept(run) for run in runs]
    if len(runs) == 1:
        return [_side(runs[0], kept[0], row, row) for row in request.rows]
    rows = request.rows or ("",)
    if len(rows) not in (1, len(runs)):
        raise ConfigError(f"rows={','.join(rows)}: name one row for all, or one for each of the {len(runs)} runs")
    rows = rows * len(runs) if len(rows) == 1 else rows
    sides = [_side(run, found, row, str(run)) for run, found, row in zip(runs, kept, rows, strict=True)]
    if len({side.label.rpartition(" ")[0] for side in sides}) < len(sides):
        raise ConfigError(f"run={runs[0]} is there twice: compare its rows by eval run={runs[0]} rows=sft,grpo")
    return sides


def _kept(run: Path) -> dict[str, dict[str, SetResult]]:
    """Row -> set -> its problems, the last measured row last."""
    path = run / EVAL_PROBLEMS
    if not path.is_file():
        raise RunFolderError(f"run={run} holds no {EVAL_PROBLEMS}: name a run's folder, or one that eval left")
    found = sets_of_rows(read_rows(path))
    if not found:
        raise RunFolderError(f"run={run}: nothing was evaluated yet")
    return {row: sets for (_, row), sets in sorted(found.items(), key=lambda item: item[0][0])}


def _side(run: Path, kept: Mapping[str, Mapping[str, SetResult]], row: str, label: str) -> Side:
    name = row or list(kept)[-1]
    if name not in kept:
        raise ConfigError(f"rows={name}: {run} has no such row{nearest(name, list(kept))}")
    return Side(label if label == row else f"{label} {name}", run, kept[name])


def _common(sides: Sequence[Side], asked: Sequence[str]) -> tuple[list[tuple[str, Mapping[str, SetResult]]], list[str]]:
    """Each side with the problems that all have, under one id; and how many those are.

    A set is found by its name, else by its problems: two runs may call it differently.
    """
    last = sides[-1]
    names = [name for name in last.sets if not asked or name in asked]
    if not names:
        raise ConfigError(f"sets={','.join(asked)}: {last.folder} has none of them{nearest(asked[0], list(last.sets))}")
    told: list[str] = []
    common: list[dict[str, SetResult]] = [{} for _ in sides]
    for name in names:
        keyed = [_by_problem(side, name) for side in sides]
        shared = [key for key in keyed[-1] if all(key in one for one in keyed)]
        if not shared:
            continue
        counts = ", ".join(f"{side.label} {len(one):,}" for side, one in zip(sides, keyed, strict=True))
        told.append(f"{name}: {plural(len(shared), 'problem')} in {'both' if len(sides) == 2 else 'all'} ({counts})")
        for place, one in enumerate(keyed):
            problems = tuple(replace(one[key], id=f"{key[0]} {key[1]}") for key in shared)
            common[place][name] = SetResult(name, problems)
    if not told:
        raise RunFolderError(
            f"{' and '.join(str(side.folder) for side in sides)} have no problem in common: evaluate both on the same "
            "set, eval run=DIR sets=NAME or data.path=FILE"
        )
    return [(side.label, found) for side, found in zip(sides, common, strict=True)], told


def _by_problem(side: Side, name: str) -> dict[tuple[str, int], Any]:
    """(the problem's hash, how often it came before) -> the problem; ids, of results from before there were hashes."""
    results = [side.sets[name]] if name in side.sets else list(side.sets.values())
    seen, found = Counter[str](), {}
    for problem in (problem for result in results for problem in result.problems):
        key = problem.problem or problem.id
        found[key, seen[key]] = problem
        seen[key] += 1
    return found


def _conditions(sides: Sequence[Side]) -> list[str]:
    """What was not the same when they were measured, a line each."""
    folders = list(dict.fromkeys(side.folder for side in sides))
    confs = [read_config(folder) for folder in folders]
    lines = []
    for key in CONDITIONS:
        values = [_value(conf, key) for conf in confs]
        if key == "grpo.max_completion_tokens" and all(_value(conf, CONDITIONS[0]) is not None for conf in confs):
            continue
        if any(value != values[0] for value in values):
            told = json.dumps(values, ensure_ascii=False)
            lines.append(
                f"warning: they were measured with different {key}: {told}; the gain is not the weights' alone"
            )
    return lines


def _value(conf: Mapping[str, Any], key: str) -> Any:
    node: Any = conf
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
