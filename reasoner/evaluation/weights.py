"""Which weights a run has to show: before training, its checkpoints, and what it exported; and how each gets into the
policy."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from reasoner import checkpoint
from reasoner.config import Config, nearest
from reasoner.errors import ConfigError, RunFolderError
from reasoner.models.loading import load_saved
from reasoner.models.policy import Policy
from reasoner.results import best_of
from reasoner.run_folder import EVAL

BASE, EXPORT, BEST, LAST, ALL = "base", "export", "best", "last", "all"
WORDS = (BASE, EXPORT, BEST, LAST, ALL)


class Loaded(Protocol):
    """A model that is loaded, and by what conf."""

    @property
    def config(self) -> Config: ...

    @property
    def policy(self) -> Policy: ...

    @property
    def tokenizer(self) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """One set of weights of a model. `policy_step` names them to the engine: those that a run measured draw the same
    samples again."""

    name: str
    policy_step: int
    load: Callable[[Loaded], None]
    artefact: Path | None = None


def weights_of(run: Path, config: Config, asked: Sequence[str], *, key: str = "checkpoints") -> list[Weights]:
    """The weights that `checkpoints=` names, the base first; none named: the base and what the run exported, or its
    best or newest checkpoint. `key` is what the user typed them after; `checkpoint` takes one, and so not `all`.

    Raises ConfigError for a name that is not there, RunFolderError where nothing was trained yet.
    """
    there = {path.name: path for path in checkpoint.whole(run)}
    best = _best(run, config)
    chosen = best if best in there else None
    artefact = exported(run, config)
    if not there and artefact is None and tuple(asked) != (BASE,):
        raise RunFolderError(f"run={run} has neither a checkpoint nor an exported model: nothing was trained yet")
    newest = max(there, default=None)
    words = WORDS if key == "checkpoints" else WORDS[: WORDS.index(ALL)]
    names: list[str] = []
    for name in asked or (BASE, EXPORT if artefact else chosen or LAST):
        names += (
            [BASE, *sorted(there), *([EXPORT] if artefact else [])] if name == ALL and key == "checkpoints" else [name]
        )
    resolved = [{BEST: chosen, LAST: newest}.get(name, name) for name in names]
    for name, found in zip(names, resolved, strict=True):
        if found is None or (found not in there and found not in (BASE, EXPORT)) or (found == EXPORT and not artefact):
            raise ConfigError(f"{key}={name}: {_why_none(name, best, [*there, *words])}")
    last = there.get(chosen or newest or "")
    step = checkpoint.progress_of(last).policy_step if last else 1
    ordered = sorted(dict.fromkeys(name for name in resolved if name), key=lambda name: name != BASE)
    return [_weights(name, there, artefact, step, config) for name in ordered]


def _why_none(name: str, best: str | None, options: list[str]) -> str:
    """Why the run has no such weights, with the remedy or what there is."""
    if name == BEST and best is None:
        return "this run measured no checkpoint on the way: set grpo.eval_every when you train"
    if name == BEST:
        return f"its checkpoint, {best}, was deleted"
    return f"this run has none{nearest(name, [one for one in options if one != name])}"


def exported(run: Path, config: Config) -> Path | None:
    """The adapter or model that the run's stage `export` saved, None without."""
    folder = run / ("adapter" if config.model.lora else "model")
    return folder if folder.is_dir() else None


def _best(run: Path, config: Config) -> str | None:
    rows = json.loads((run / EVAL).read_bytes()) if (run / EVAL).is_file() else []
    trained = [index for index, stage in enumerate(config.stages) if stage in ("sft", "grpo")]
    best = best_of(rows, trained[-1]) if trained else None
    return best.name if best else None


def _weights(name: str, there: dict[str, Path], artefact: Path | None, step: int, config: Config) -> Weights:
    if name == BASE:
        return untrained()
    if name != EXPORT:
        path = there[name]
        return Weights(name, checkpoint.progress_of(path).policy_step, lambda parts: _load_checkpoint(parts, path))
    assert artefact is not None
    return Weights(name, step, lambda parts: load_artefact(parts, artefact), artefact)


def untrained() -> Weights:
    """The model as it was loaded; it comes first, before others are loaded over it."""
    return Weights(BASE, 0, lambda parts: None)


def load_artefact(parts: Loaded, folder: Path) -> None:
    """Put what `Policy.save` wrote into the policy. Raises ModelError where it is of another model."""
    if parts.config.model.lora:
        parts.policy.reload(folder)
    else:
        saved = load_saved(folder, parts.config.model, parts.tokenizer, device="cpu")
        parts.policy.load_state(saved.state())


def _load_checkpoint(parts: Loaded, path: Path) -> None:
    parts.policy.load_state(checkpoint.policy_of(checkpoint.load(path)[1]))
