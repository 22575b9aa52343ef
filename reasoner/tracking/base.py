"""What a tracker is, and the trackers that a config names.

metrics.jsonl is the truth; a tracker is a copy of it for looking at. Left out: files. Completions stay in the run
folder too, unless config.track_completions sends the shown ones.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from reasoner import world
from reasoner.errors import MissingExtra
from reasoner.redact import Redactor
from reasoner.tracking.background import Background
from reasoner.tracking.mlflow import MlflowTracker
from reasoner.tracking.tensorboard import TensorBoardTracker
from reasoner.tracking.trackio import TrackioTracker
from reasoner.tracking.values import OFF, first_line
from reasoner.tracking.wandb import WandbTracker


class Tracker(Protocol):
    """Takes numbers and tables. It never raises and never makes a run wait: a service that fails costs a line."""

    def log(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        """Send the finite numbers of a row of metrics.jsonl as `stage/name`, over that stage's steps."""
        ...

    def table(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rows of completions.jsonl as the table `stage/completions`."""
        ...

    def close(self) -> None:
        """Send what is left, within a minute."""
        ...


TRACKERS = {
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "tensorboard": TensorBoardTracker,
    "mlflow": MlflowTracker,
}


def make_trackers(
    names: Sequence[str], run: Path, *, config: Mapping[str, Any], say: Callable[[str], None]
) -> list[Background]:
    """The trackers of config.tracking, begun; none on ranks other than the main one.

    `config` is the resolved one, shown beside the numbers without secrets; `say` takes the line for a service that
    fails; close_all ends them. Raises MissingExtra if a tracker's package is not installed.
    """
    if not world.is_main():
        return []
    redactor = Redactor.from_environment()
    return [tracker for name in names if (tracker := _begin(name, run, redactor.tree(config), redactor, say))]


def _begin(
    name: str, run: Path, config: Mapping[str, Any], redactor: Redactor, say: Callable[[str], None]
) -> Background | None:
    kind = TRACKERS[name]
    try:
        client = kind.load()
    except MissingExtra:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a package that breaks as it is imported is no reason not to train
        say(f"{name}: {first_line(error)}; {OFF}")
        return None
    return Background(name, lambda said: _Redacted(kind(run, config, said, client), redactor), say)


class _Redacted:
    """A tracker that is never told a secret."""

    def __init__(self, tracker: Tracker, redactor: Redactor):
        self._tracker, self._redactor = tracker, redactor

    def log(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        self._tracker.log(stage, step, row)

    def table(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._tracker.table(stage, step, self._redactor.tree(rows))

    def close(self) -> None:
        self._tracker.close()
