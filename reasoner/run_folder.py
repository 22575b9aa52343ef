"""The folder a run writes into: its lock, its files, and what happens to them on resume.

Each write is whole or absent and passes the redactor. Rows are only ever appended in the order of (stage_index, step),
so cutting a file back to a checkpoint is shortening it. Left out: weights (checkpoint.py, Policy.save) and the report.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

import yaml

from reasoner import disk, world
from reasoner.errors import RunFolderError
from reasoner.lock import Lock
from reasoner.redact import Redactor

CONFIG, METRICS, COMPLETIONS, SUMMARY = "config.yaml", "metrics.jsonl", "completions.jsonl", "summary.json"
EVAL, EVAL_PROBLEMS, CHECKPOINTS, LOCK = "eval.json", "eval_problems.jsonl", "checkpoints", "run.lock"
ROW_FILES = (METRICS, COMPLETIONS, EVAL_PROBLEMS)
SIGNS_OF_A_RUN = (CONFIG, *ROW_FILES, EVAL, SUMMARY, CHECKPOINTS)
PROBE_BYTES = 2**20  # a disk with less room than this is full for us


class RunFolder:
    """An open run folder, ours until `close()`; a context manager. On ranks other than the main one it writes nothing.

    Every writer raises RunFolderError if the disk refuses; what was written before stays whole.
    """

    def __init__(self, path: Path, lock: Lock | None, redactor: Redactor):
        self.path = path
        self._is_main = world.is_main()
        self._lock = lock
        self._redactor = redactor

    @classmethod
    def open(cls, out: Path, *, resume: Path | None = None) -> Self:
        """The folder `out`, created, probed and locked, before anything heavy is loaded.

        `resume` is the folder of the run that goes on. If that is not `out` itself, its rows and evaluations are copied
        over, so that `out` tells the whole run. Raises RunFolderError if `out` can't be written, is full, is a file, is
        in use, or holds another run.
        """
        if not world.is_main():
            return cls(out, None, Redactor([]))
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = Lock.take(out / LOCK)
        except OSError as error:
            raise disk.refusal(error, f"write to out={out}", "choose another folder with out=OTHER") from error
        try:
            _probe(out)
            if resume is None or resume.resolve() != out.resolve():
                _refuse_other_run(out)
                if resume is not None:
                    _copy_rows(resume, out)
        except OSError as error:
            lock.release()
            raise disk.refusal(error, f"write to out={out}", "choose another folder with out=OTHER") from error
        except RunFolderError:
            lock.release()
            raise
        return cls(out, lock, Redactor.from_environment())

    def close(self) -> None:
        """Let the next run have the folder."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_config(self, text: str) -> None:
        """`config.yaml`: the resolved config."""
        self._replace(CONFIG, self._redactor.text(text))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """`summary.json`: status, stages, seconds, peak memory, versions."""
        self._replace(SUMMARY, self._json(summary, indent=2) + "\n")

    def write_eval(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """`eval.json`: every evaluation row so far, one a line."""
        self._replace(EVAL, "[\n" + ",\n".join(map(self._json, rows)) + "\n]\n")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One line of `metrics.jsonl`; `row` has at least stage_index and step."""
        self._append(METRICS, [row])

    def append_completions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lines of `completions.jsonl`; each row has at least stage_index and step."""
        self._append(COMPLETIONS, rows)

    def append_eval_problems(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lines of `eval_problems.jsonl`; each row has at least stage_index."""
        self._append(EVAL_PROBLEMS, rows)

    def eval_rows(self) -> list[dict[str, Any]]:
        """What `eval.json` holds, [] without one. Raises RunFolderError if it is damaged."""
        path = self.path / EVAL
        if not path.exists():
            return []
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            raise RunFolderError(f"{path} is damaged ({error}): move it away, and what it told is gone") from error

    def cut_back(self, stage_index: int, step: int) -> None:
        """Remove every row later than a checkpoint of (stage_index, step), and a last line that a kill cut in half.

        A row without a step belongs to a stage that is done in one go: it is later than step 0 of its stage. Raises
        RunFolderError, naming file:line, for a damaged line that is not the last one. Every rank calls it, and may read
        the files afterwards.
        """
        if self._is_main:
            for path in (self.path / name for name in ROW_FILES):
                if path.exists():
                    with self._disk(f"shorten {path}"):
                        os.truncate(path, _length_up_to(path, (stage_index, step)))
            rows = self.eval_rows()
            kept = [row for row in rows if _position(row) <= (stage_index, step)]
            if kept != rows:
                self.write_eval(kept)
        world.barrier()

    def _json(self, value: Any, indent: int | None = None) -> str:
        return json.dumps(self._redactor.tree(_plain(value)), ensure_ascii=False, allow_nan=False, indent=indent)

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        assert all("stage_index" in row for row in rows), "rows without a stage could not be cut back on resume"
        if self._is_main:
            lines = "".join(self._json(row) + "\n" for row in rows)
            with self._disk(f"add to {self.path / name}"):
                disk.append(self.path / name, _encode(lines))

    def _replace(self, name: str, text: str) -> None:
        if self._is_main:
            with self._disk(f"write {self.path / name}"):
                disk.replace(self.path / name, _encode(text))

    @contextmanager
    def _disk(self, doing: str) -> Iterator[None]:
        assert self._lock, "a closed run folder may be another run's by now"
        try:
            yield
        except OSError as error:
            remedy = f"the newest checkpoint is kept: make room, then go on with resume={self.path}"
            raise disk.refusal(error, doing, remedy) from error


def newest_run(folder: Path) -> Path | None:
    """The run inside `folder` that was begun or gone on with last, of those that took a step; None where there is none
    or `folder` is a run itself."""
    if (folder / CONFIG).is_file():
        return None
    runs = [config.parent for config in folder.glob(f"*/{CONFIG}") if (config.parent / METRICS).is_file()]
    return max(runs, key=lambda run: ((run / CONFIG).stat().st_mtime_ns, run.name), default=None)


def conf_of(folder: Path) -> Path:
    """The file with a run's settings. Raises RunFolderError where there is no run."""
    path = folder / CONFIG
    if not path.is_file():
        raise RunFolderError(f"run={folder}: there is no run (no {CONFIG}): name a run's folder")
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a run. Raises RunFolderError where there is no run, or its config.yaml is damaged."""
    path = conf_of(folder)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged ({' '.join(str(error).split())}): mend it first") from error
    if not isinstance(found, dict):
        raise RunFolderError(f"{path} is damaged (no settings by name in it): mend it first")
    return found


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one of a run's .jsonl files, without a last line that a kill cut in half.

    Raises RunFolderError, naming file:line, for a damaged line that is not the last one.
    """
    return (row for _, row in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each whole row, with the offset in bytes where it ends."""
    end, damaged = 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if damaged:
                raise RunFolderError(
                    f"{path}:{damaged} is damaged, and lines follow it: remove it, or start a new run with out=OTHER"
                )
            try:
                if not line.endswith(b"\n"):
                    raise ValueError
                row = json.loads(line)
            except ValueError:
                damaged = number
                continue
            end += len(line)
            yield end, row


def _length_up_to(path: Path, position: tuple[int, int]) -> int:
    """Bytes of the file's whole rows up to `position`."""
    kept = 0
    for end, row in _lines(path):
        if _position(row) > position:
            break
        kept = end
    return kept


def _position(row: Mapping[str, Any]) -> tuple[int, int]:
    """Where a row stands among the checkpoints. A checkpoint is measured once it is saved: that row is later than it,
    so that a run which was killed between measures it again."""
    measured = "set" in row
    return row["stage_index"], row["step"] + measured if "step" in row else 1


def _plain(value: Any) -> Any:
    """The value as JSON can say it: numbers that are not finite are null, dates and other cells of a row are text."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _encode(text: str) -> bytes:
    """UTF-8; a lone surrogate from a user's file becomes its JSON escape."""
    return text.encode("utf-8", "backslashreplace")


def _probe(out: Path) -> None:
    probe = out / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
        disk.sync(probe)
    finally:
        probe.unlink(missing_ok=True)


def _refuse_other_run(out: Path) -> None:
    if not any((out / name).exists() for name in SIGNS_OF_A_RUN):
        return
    can_go_on = any((out / CHECKPOINTS).glob("*/done.json"))
    go_on = f"go on with it by resume={out}" if can_go_on else "it has no checkpoint to go on from: delete it"
    raise RunFolderError(f"out={out} already holds a run: {go_on}, or choose out=OTHER")


def _copy_rows(source: Path, out: Path) -> None:
    for name in (*ROW_FILES, EVAL):
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
