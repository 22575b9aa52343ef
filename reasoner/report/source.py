"""What a run folder holds, read for the page. Left out: completions, of which there may be too many to read whole."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reasoner.errors import RunFolderError
from reasoner.results import Results
from reasoner.run_folder import COMPLETIONS, CONFIG, EVAL, EVAL_PROBLEMS, METRICS, SUMMARY, read_rows

Row = dict[str, Any]


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
    if not (folder / CONFIG).is_file():
        raise RunFolderError(f"run={folder}: there is no run (no {CONFIG}): name a run's folder")
    problems = _rows(folder / EVAL_PROBLEMS)
    return Source(
        folder=folder,
        config=yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")),
        summary=_json(folder / SUMMARY, {}),
        metrics=_rows(folder / METRICS),
        results=Results.from_files(_json(folder / EVAL, []), problems),
        asked={row["id"]: (row["prompt"], row["answer"]) for row in problems if "prompt" in row},
        completions=folder / COMPLETIONS,
    )


def _rows(path: Path) -> list[Row]:
    return list(read_rows(path)) if path.exists() else []


def _json(path: Path, absent: Any) -> Any:
    if not path.exists():
        return absent
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged ({error}): delete it, and the report does without") from error
