"""What a tracker is, and the trackers that a config names.

Left out: completions and files. They hold the user's data, and stay in the run folder.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from reasoner import world
from reasoner.tracking.wandb import WandbTracker


class Tracker(Protocol):
    """Takes numbers. It never raises: a service that fails costs one line, not the run."""

    def log(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        """Send the finite numbers of a row as `stage/name`, over that stage's steps."""
        ...

    def close(self) -> None:
        """Send what is left, within a minute."""
        ...


TRACKERS = {"wandb": WandbTracker}


def make_trackers(
    names: Sequence[str], run: Path, *, config: Mapping[str, Any], say: Callable[[str], None]
) -> list[Tracker]:
    """The trackers of config.tracking, begun; none on ranks other than the main one.

    `config` is the resolved one, shown beside the numbers without secrets; `say` takes the line for a service that
    fails. Raises MissingExtra if a tracker's package is not installed.
    """
    if not world.is_main():
        return []
    return [TRACKERS[name](run, config, say) for name in names]
