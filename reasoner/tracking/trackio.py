"""trackio: on this machine by itself (`trackio show`), or wherever TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says.

What the machine does beside the run is not logged.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reasoner.errors import MissingExtra
from reasoner.tracking.values import PROJECT, numbers, table


class TrackioTracker:
    """Numbers by stage over the stage's steps; completions as trackio's tables."""

    @staticmethod
    def load() -> Any:
        """trackio itself. Raises MissingExtra if it is not installed."""
        try:
            import trackio
        except ModuleNotFoundError:
            raise MissingExtra("trackio", "trackio", "tracking=[trackio]") from None
        return trackio

    def __init__(self, run: Path, config: Mapping[str, Any], say: Callable[[str], None], client: Any):
        self._client = client
        name = "-".join(run.resolve().parts[-2:])
        self._run = client.init(
            PROJECT, name=name, config=dict(config), embed=False, auto_log_gpu=False, auto_log_cpu=False
        )

    def log(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        """See Tracker."""
        self._run.log(numbers(stage, row), step=step)

    def table(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See Tracker."""
        columns, cells = table(rows)
        self._run.log({f"{stage}/completions": self._client.Table(columns=columns, data=cells)}, step=step)

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()
