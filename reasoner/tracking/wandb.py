"""Weights & Biases: the only home of wandb.

Sent are numbers and the redacted config; not the code, the console, the command line, the machine's data, or the
client's reports about itself. Everything also lies in the run folder under wandb/. WANDB_MODE is followed; without it a
service that can't be reached, or that has no login, means the offline mode, which `wandb sync` uploads later. The login
is never asked for: a prompt would hold up the night. Left out: joining a resumed run to its earlier one there.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reasoner.errors import MissingExtra
from reasoner.redact import Redactor
from reasoner.tracking.values import OFF, PROJECT, first_line, numbers, table

START_S, FINISH_S = 30, 60  # seconds that the service may take


class WandbTracker:
    """A tracker that logs to wandb, offline if need be, and is off after the client's first error.

    `client` is the wandb module, or what stands for it.
    """

    @staticmethod
    def load() -> Any:
        """wandb itself. Raises MissingExtra if it is not installed."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported: no telemetry
        try:
            import wandb
        except ModuleNotFoundError:
            raise MissingExtra("wandb", "wandb", "tracking=[wandb]") from None
        return wandb

    def __init__(self, run: Path, config: Mapping[str, Any], say: Callable[[str], None], client: Any):
        self._say = say
        self._client = client
        self._started: set[str] = set()
        self._run: Any = self._start(run, Redactor.from_environment().tree(config))

    def log(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        """Send the row's finite numbers as `stage/name`, over `stage/step`."""
        if self._run is None:
            return
        values = {**numbers(stage, row), f"{stage}/step": step}
        if not self._try(lambda: self._send(stage, values), "it is off from here on"):
            self._run = None

    def table(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send completions as a table of their own."""
        if self._run is None:
            return
        columns, cells = table(rows)
        shown = self._try(lambda: self._client.Table(columns=columns, data=cells), "no table of this step")
        values = {f"{stage}/completions": shown, f"{stage}/step": step}
        if shown is not None and not self._try(lambda: self._send(stage, values), "it is off from here on"):
            self._run = None

    def close(self) -> None:
        """Finish the run; what could not be sent in time stays in the run folder."""
        run, self._run = self._run, None
        if run is not None:
            self._try(lambda: (run.finish(),), "its last numbers are in the run folder's wandb/, for `wandb sync`")

    def _start(self, run: Path, config: Mapping[str, Any]) -> Any:
        if "WANDB_MODE" in os.environ:
            return self._try(lambda: self._init(run, config, None), OFF)
        offline = f"it logs offline: `wandb sync {run / 'wandb'}/offline-*` uploads that later"
        logged_in = self._try(lambda: self._client.login(prompt=False, verify=True), offline)
        if logged_in is False:
            self._say(f"wandb: no login (see `wandb login`); {offline}")
        online = self._try(lambda: self._init(run, config, "online"), offline) if logged_in else None
        return online or self._try(lambda: self._init(run, config, "offline"), OFF)

    def _init(self, run: Path, config: Mapping[str, Any], mode: str | None) -> Any:
        settings = self._client.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            init_timeout=START_S,
            finish_timeout=FINISH_S,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        return self._client.init(
            project=PROJECT,
            name=str(config.get("name", run.name)),
            dir=str(run),
            config=dict(config),
            mode=mode,
            settings=settings,
        )

    def _send(self, stage: str, values: Mapping[str, Any]) -> bool:
        if stage not in self._started:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._started.add(stage)
        self._run.log(dict(values))
        return True

    def _try(self, call: Callable[[], Any], consequence: str) -> Any:
        """What the call returns; None, after one line that says why and the consequence, if it raises."""
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - the client raises what it likes; none of it is worth a night's training
            self._say(f"wandb: {first_line(error)}; {consequence}")
            return None
