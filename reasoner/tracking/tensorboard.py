"""TensorBoard: event files in the run folder's tensorboard/. `tensorboard --logdir outputs` shows every run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reasoner.errors import MissingExtra
from reasoner.tracking.values import numbers, table

FOLDER = "tensorboard"


class TensorBoardTracker:
    """Scalars by stage over the stage's steps; config and completions as text."""

    @staticmethod
    def load() -> Any:
        """The writer's module. Raises MissingExtra if TensorBoard is not installed."""
        try:
            import tensorboard  # noqa: F401 - torch's writer needs it and says so in many lines
        except ModuleNotFoundError:
            raise MissingExtra("tensorboard", "tensorboard", "tracking=[tensorboard]") from None
        from torch.utils import tensorboard as client

        return client

    def __init__(self, run: Path, config: Mapping[str, Any], say: Callable[[str], None], client: Any):
        self._writer = client.SummaryWriter(log_dir=str(run / FOLDER))
        lines = [f"    {key}: {value}" for key, value in config.items()]  # indented: Markdown shows it as it is
        self._writer.add_text("config", "\n".join(lines))

    def log(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        """See Tracker."""
        for name, value in numbers(stage, row).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def table(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See Tracker: a Markdown table, every cell as code, so that nothing in it is markup."""
        columns, cells = table(rows)
        lines = [columns, ["---"] * len(columns), *([_cell(cell) for cell in row] for row in cells)]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        self._writer.add_text(f"{stage}/completions", text, step)

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()


def _cell(value: Any) -> str:
    text = str(value).replace("`", "'").replace("|", "\\|")
    return f"`{' '.join(text.split()) or ' '}`"
