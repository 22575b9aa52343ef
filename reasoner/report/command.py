"""`python -m reasoner report run=DIR [run=OTHER ...] [to=FILE]`."""

from collections.abc import Sequence
from pathlib import Path

from reasoner.config import nearest
from reasoner.errors import ConfigError
from reasoner.report.write import COMPARISON, REPORT, write_report

KEYS = ("run", "to")


def report(settings: Sequence[str]) -> Path:
    """Write the report of one run into its folder, or the comparison of several into the working directory, or either
    to `to`; returns the file.

    Raises ConfigError for another key, an empty value or no run; see write_report.
    """
    runs: list[Path] = []
    to: Path | None = None
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in KEYS:
            raise ConfigError(f"report has no key '{key}'{nearest(key, list(KEYS))}: it takes run=DIR and to=FILE")
        if not value:
            raise ConfigError(f"{key}= is empty: give {key}={'DIR' if key == 'run' else 'FILE'}")
        if key == "run":
            runs.append(Path(value).expanduser())
        else:
            to = Path(value).expanduser()
    if not runs:
        raise ConfigError("report needs a run's folder: python -m reasoner report run=outputs/NAME/DATE_TIME")
    to = to or (runs[0] / REPORT if len(runs) == 1 else Path(COMPARISON))
    write_report(runs, to)
    return to
