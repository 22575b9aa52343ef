"""What a run folder holds, read for the page. Left out: completions, of which there may be too many to read whole."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from reasoner.errors import RunFolderError
from reasoner.evaluate import ProblemResult
from reasoner.results import Results
from reasoner.run_folder import COMPLETIONS, EVAL, EVAL_PROBLEMS, METRICS, SUMMARY, conf_of, read_rows

Row = dict[str, Any]

# What a row of each file has had from the first day; later keys have a default where they are read.
METRICS_KEYS = {"stage": str, "stage_index": int, "step": int, "policy_step": int}
EVAL_KEYS = {"row": str, "stage_index": int, "set": str, "greedy_accuracy": int | float}
PROBLEM_KEYS = {"row": str, "stage_index": int, "set": str} | {
    f.name: f.type for f in fields(ProblemResult) if f.default is MISSING and f.default_factory is MISSING
}


@dataclass(frozen=True, slots=True)
class Source:
    """One run as its files tell it. A run that goes on, or was killed, has no summary: it is {}."""

    folder: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: list[Row]
    results: Results
    asked: Mapping[str, tuple[str, str]]  # problem id -> its prompt and answer, where eval_problems.jsonl holds them
    completions: Path

    @property
    def name(self) -> str:
        """The run's folder and the one above it: `tiny/2026-11-27_01-30-00`."""
        return "/".join(self.folder.resolve().parts[-2:])

    def steps(self, stage: str) -> list[Row]:
        """The rows of metrics.jsonl of one kind of stage."""
        return [row for row in self.metrics if row["stage"] == stage]


def read_source(folder: Path) -> Source:
    """The run in `folder`. Raises RunFolderError where there is none, or a file of it is damaged."""
    conf = conf_of(folder)
    problems = _rows(folder / EVAL_PROBLEMS, PROBLEM_KEYS)
    return Source(
        folder=folder,
        config=_config(conf),
        summary=_json(folder / SUMMARY, {}),
        metrics=_rows(folder / METRICS, METRICS_KEYS),
        results=Results.from_files(_checked(folder / EVAL, _json(folder / EVAL, []), EVAL_KEYS), problems),
        asked={row["id"]: (row["prompt"], row.get("answer", "")) for row in problems if "prompt" in row},
        completions=folder / COMPLETIONS,
    )


def _config(path: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        what = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            what = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise _damaged_config(path, what) from error
    if not isinstance(config, Mapping):
        raise _damaged_config(path, "no settings by name in it")
    if not isinstance(config.get("model", {}), Mapping):
        raise _damaged_config(path, "no settings by name under model")
    return config


def _damaged_config(path: Path, what: str) -> RunFolderError:
    return RunFolderError(f"{path} is damaged ({what}): mend it, or make it {{}}, and the report does without settings")


def _damaged(path: Path, what: object) -> RunFolderError:
    return RunFolderError(f"{path} is damaged ({what}): delete it, and the report does without")


def _rows(path: Path, keys: Mapping[str, Any]) -> list[Row]:
    return _checked(path, read_rows(path), keys) if path.exists() else []


def _checked(path: Path, rows: Iterable[Any], keys: Mapping[str, Any]) -> list[Row]:
    """The rows, each with the keys of these types. Raises RunFolderError, naming the row and the key."""
    checked = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise _damaged(path, f"row {number} has no keys")
        for key, kind in keys.items():
            if key not in row or not isinstance(row[key], kind):
                raise _damaged(path, f"row {number} has {f'a wrong {key}' if key in row else f'no {key}'}")
        checked.append(row)
    return checked


def _json(path: Path, absent: Any) -> Any:
    """What the file holds, `absent` without one. Raises RunFolderError unless that is of `absent`'s type."""
    if not path.exists():
        return absent
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(found, type(absent)):
        raise _damaged(path, f"a {type(found).__name__} in place of a {type(absent).__name__}")
    return found
