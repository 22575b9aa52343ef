"""MLflow: to the server that MLFLOW_TRACKING_URI names, without one into the run folder's mlruns/.

mlflow-skinny suffices. Its telemetry is switched off, as nothing here reports on its user.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reasoner.compose import leaves
from reasoner.errors import MissingExtra
from reasoner.tracking.values import PROJECT, numbers, table

MAX_PARAM_CHARS = 500  # that every server takes
PARAMS_A_CALL = 100
# Read as mlflow is imported or called; what the user set stands. A server that is away is asked twice, 10 s each.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class MlflowTracker:
    """Metrics by stage over the stage's steps, settings as params, completions as tables among the artifacts."""

    @staticmethod
    def load() -> Any:
        """mlflow itself. Raises MissingExtra if it is not installed."""
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            import mlflow
        except ModuleNotFoundError:
            raise MissingExtra("mlflow-skinny", "mlflow", "tracking=[mlflow]") from None
        return mlflow

    def __init__(self, run: Path, config: Mapping[str, Any], say: Callable[[str], None], client: Any):
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow would rather have a database
            uri = (run.resolve() / "mlruns").as_uri()
        self._entities = client.entities
        self._client = client.MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(PROJECT)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        name = "/".join(run.resolve().parts[-2:])
        self._id = self._client.create_run(experiment_id, run_name=name).info.run_id
        params = [client.entities.Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in leaves(config)]
        for start in range(0, len(params), PARAMS_A_CALL):
            self._client.log_batch(self._id, params=params[start : start + PARAMS_A_CALL])

    def log(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        """See Tracker."""
        now = int(1000 * time.time())
        found = [self._entities.Metric(name, value, now, step) for name, value in numbers(stage, row).items()]
        self._client.log_batch(self._id, metrics=found)

    def table(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See Tracker: a JSON table of columns and data, as mlflow's own are."""
        columns, cells = table(rows)
        self._client.log_dict(self._id, {"columns": columns, "data": cells}, f"completions/{stage}-{step:06d}.json")

    def close(self) -> None:
        """See Tracker."""
        self._client.set_terminated(self._id)
