"""What a run that goes on may change of its config, and what it may not."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from reasoner.checkpoint import Progress
from reasoner.errors import ConfigError
from reasoner.redact import Redactor

FREE = (
    "grpo.steps",
    "sft.steps",
    "*.eval_every",
    "out",
    "tracking",
    "checkpoint.keep",
    "checkpoint.every",
    "resume.*",
    "grpo.show_every",
    "model.gradient_checkpointing",  # what layers keep changes no number; a step that ran out of memory asks for more
)
FIXED = (  # these decide which rows come next, or what the weights are
    "data.*",
    "sft.data",
    "sft.data.*",
    "grpo.data",
    "grpo.data.*",
    "model",
    "model.*",
    "seed",
    "stages",
    "grpo.prompts_per_step",
    "grpo.ledger",
    "sft.examples_per_step",
)
TRAINING = ("sft", "grpo")
ABSENT = "(not set)"


def check_resume(old: Mapping[str, Any], new: Mapping[str, Any], allow: Sequence[str], progress: Progress) -> list[str]:
    """The changes from the run's own resolved config to the one it goes on with, a line each, to be printed.

    `allow` holds keys, or sections, that may differ beside the free ones. Raises ConfigError for a change that would
    alter the data's order or the model, for one that is not allowed, and for steps that don't fit what `progress` says
    is done.
    """
    before, after = (
        _leaves(old),
        _leaves(Redactor.from_environment().tree(new)),
    )  # the old one was redacted when it was written
    changed = [key for key in dict.fromkeys((*before, *after)) if before.get(key, ABSENT) != after.get(key, ABSENT)]
    said = {key: f"{key} was {_show(before, key)}, now {_show(after, key)}" for key in changed}
    for key in changed:
        if _matches(key, FIXED) and not _matches(key, FREE):
            raise ConfigError(
                f"{said[key]}: it would change the data's order or the model; go on without it, or start a new run"
            )
    refused = [
        key
        for key in changed
        if not _matches(key, FREE) and not _matches(key, [*allow, *(f"{entry}.*" for entry in allow)])
    ]
    if refused:
        keys = ",".join((*allow, *refused))
        raise ConfigError(f"{'; '.join(said[key] for key in refused)}: to go on with that, add resume.allow=[{keys}]")
    _check_steps(before, after, progress)
    return [said[key] for key in changed if not key.startswith("resume.")]


def _check_steps(before: Mapping[str, Any], after: Mapping[str, Any], progress: Progress) -> None:
    done = [stage for stage in after["stages"][: progress.stage_index] if stage in TRAINING]
    for key in (f"{stage}.steps" for stage in done):
        if before[key] != after[key] and key != f"{progress.stage}.steps":
            raise ConfigError(
                f"{key} was {before[key]}, now {after[key]}: that stage is done; go on with {key}={before[key]}"
            )
    key = f"{progress.stage}.steps"
    if progress.stage in TRAINING and after[key] < progress.step:
        raise ConfigError(
            f"{key}={after[key]}, but {progress.step} steps are done: give at least {key}={progress.step}"
        )


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists are values, and so are empty sections."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, f"{key}.")
        else:
            leaves[key] = list(value) if isinstance(value, tuple) else value
    return leaves


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _show(leaves: Mapping[str, Any], key: str) -> str:
    return str(leaves.get(key, ABSENT))
