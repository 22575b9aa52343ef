"""A run's whole state on disk, so that going on gives what the unbroken run gives.

A checkpoint is a folder of one safetensors file, one JSON file and a done-file with the size and sha256 of both. It is
made under another name, each file and folder forced to the disk, the done-file last, then renamed; only then are old
ones removed. Killed at any moment, the newest whole one is found again. Nothing here is ever unpickled, so a checkpoint
from a stranger is data, not code.

Left out: what is in the state. The stages name their own tensors; optimizer_state.py turns optimizers into
tensors and JSON.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reasoner import disk
from reasoner.errors import RunFolderError
from reasoner.redact import Redactor
from reasoner.run_folder import CHECKPOINTS, ROW_FILES

TENSORS, STATE, DONE = "tensors.safetensors", "state.json", "done.json"
FILES = (TENSORS, STATE)
POLICY = "policy."  # in front of the names of the policy's tensors
FOLDER_NAME = re.compile(r"(\d{2,})-([a-z]+)-(\d{6,})(\.replaced)?")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come: `step` steps of the stage at `stage_index` are done.

    >>> Progress(stage_index=3, stage="grpo", step=50, policy_step=50, cursor=1600).name
    '03-grpo-000050'

    `policy_step` counts the updates of the sampled policy, `cursor` the rows taken from the stage's data.
    """

    stage_index: int
    stage: str
    step: int
    policy_step: int
    cursor: int

    @property
    def name(self) -> str:
        """The checkpoint's folder."""
        return f"{self.stage_index:02d}-{self.stage}-{self.step:06d}"


def save(
    run: Path,
    progress: Progress,
    tensors: Mapping[str, Tensor],
    json_state: Any,
    *,
    keep: int = 2,
    best: str | None = None,
) -> Path:
    """The new checkpoint's folder, whole on disk; of the older ones `keep - 1` stay, and the one named `best`.

    Tensors of any dtype and device come back bit by bit, on the CPU. `json_state` is what JSON can say (tuples come
    back as lists). The main rank alone calls it. Raises RunFolderError if the disk refuses; the checkpoints that were
    there stay.
    """
    folder = run / CHECKPOINTS
    final, temporary = folder / progress.name, folder / f".{progress.name}.tmp"
    try:
        folder.mkdir(exist_ok=True)
        disk.sync(run)
        for leftover in folder.glob(".*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        _write(temporary, progress, tensors, json_state)
        for rows in (run / name for name in ROW_FILES):  # the rows of a step are as safe as its weights
            if rows.exists():
                disk.sync(rows)
        _put_in_place(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk.refusal(
            _os_error(error),
            f"write the checkpoint {final}",
            f"the one before is kept: make room, then go on with resume={run}",
        ) from error
    _retire(folder, final, keep, best)
    return final


def newest_whole(run: Path) -> Path | None:
    """A run's latest checkpoint of which every file is as written, past halves and damaged ones; None without."""
    return next((path for path in _newest_first(run / CHECKPOINTS) if _is_whole(path)), None)


def newest(run: Path) -> Path:
    """As `newest_whole`, for a user who wants to go on: raises RunFolderError if there is none."""
    if not run.is_dir():
        raise RunFolderError(
            f"resume={run}: there is no such folder; give the folder of a run, the one with config.yaml in it"
        )
    found = newest_whole(run)
    if found is None:
        raise RunFolderError(
            f"resume={run}: there is no whole checkpoint in {run / CHECKPOINTS}; start a new run with out=OTHER"
        )
    return found


def whole(run: Path) -> list[Path]:
    """A run's finished checkpoints, the oldest first. Their files are not read: `load` does, and checks them."""
    return [path for path in reversed(_newest_first(run / CHECKPOINTS)) if (path / DONE).is_file()]


def progress_of(path: Path) -> Progress:
    """Where a checkpoint stands, without its tensors. Raises RunFolderError if it is not one of ours."""
    try:
        return Progress(**json.loads((path / STATE).read_bytes())["progress"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"the checkpoint {path} is not one of ours: {error}; go on from another one") from error


def load(path: Path) -> tuple[Progress, dict[str, Tensor], Any]:
    """(progress, tensors, json_state) as saved. Raises RunFolderError if a file is missing, cut, changed or foreign."""
    if not _is_whole(path):
        raise RunFolderError(
            f"the checkpoint {path} is not whole: a file is missing, cut or changed; go on from another one"
        )
    try:
        state = json.loads((path / STATE).read_bytes())
        return Progress(**state["progress"]), load_file(path / TENSORS), state["state"]
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"the checkpoint {path} is not one of ours: {error}; go on from another one") from error


def policy_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a checkpoint's tensors the policy's state, by its own names."""
    return {name.removeprefix(POLICY): tensor for name, tensor in tensors.items() if name.startswith(POLICY)}


def bring(source: Path, run: Path, name: str) -> None:
    """Copy the checkpoint `name` of the run `source` into `run`, whole or not at all, unless it is there.

    Raises RunFolderError if `source` has no whole one, or if the disk refuses.
    """
    final, temporary = run / CHECKPOINTS / name, run / CHECKPOINTS / f".{name}.tmp"
    if _is_whole(final):
        return
    folder = source / CHECKPOINTS
    found = next((path for path in (folder / name, folder / f"{name}.replaced") if _is_whole(path)), None)
    if found is None:
        raise RunFolderError(
            f"resume={source}: going on needs its best checkpoint so far, {folder / name}, and a file of it is "
            "missing, cut or changed: put it back, or start a new run with out=OTHER"
        )
    try:
        for leftover in (temporary, final):  # of a copy that was killed; damaged
            _remove(leftover)
        shutil.copytree(found, temporary)
        for path in temporary.iterdir():
            disk.sync(path)
        temporary.rename(final)
        disk.sync(final.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk.refusal(error, f"write the checkpoint {final}", "make room, then try again") from error


def _write(folder: Path, progress: Progress, tensors: Mapping[str, Tensor], json_state: Any) -> None:
    save_file(_storable(tensors), folder / TENSORS)
    state = Redactor.from_environment().tree({"progress": asdict(progress), "state": json_state})
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
    for name in FILES:
        disk.sync(folder / name)
    disk.sync(folder)
    (folder / DONE).write_text(json.dumps({name: _seal(folder / name) for name in FILES}), encoding="utf-8")
    disk.sync(folder / DONE)
    disk.sync(folder)


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with memory of its own: safetensors refuses two names for one storage."""
    seen: set[int] = set()
    storable: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        storage = kept.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != kept.nbytes:
            kept = kept.clone()
        seen.add(kept.untyped_storage().data_ptr())
        storable[name] = kept
    return storable


def _seal(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename the finished checkpoint; one of the same step stays findable by another name until the new one stands."""
    aside = final.with_name(f"{final.name}.replaced")
    if final.exists():
        _remove(aside)
        final.rename(aside)
    temporary.rename(final)
    disk.sync(final.parent)
    _remove(aside)


def _retire(folder: Path, newest: Path, keep: int, best: str | None) -> None:
    """Remove what `newest` outdates: those beyond `keep`, and later ones, left by a run that has gone back."""
    ordered = _newest_first(folder)
    place = ordered.index(newest)
    outdated = [path for path in ordered[place + keep :] if path.name != best]
    for path in (*ordered[:place], *outdated):
        _remove(path)


def _remove(path: Path) -> None:
    """The done-file goes first, so that a folder half removed is no checkpoint."""
    (path / DONE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    found = [match for match in map(FOLDER_NAME.fullmatch, names) if match]
    found.sort(key=lambda match: (int(match[1]), int(match[3]), not match[4]), reverse=True)
    return [folder / match[0] for match in found]


def _is_whole(path: Path) -> bool:
    try:
        done = json.loads((path / DONE).read_bytes())
        return all(done[name] == _seal(path / name) for name in FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _os_error(error: OSError | SafetensorError) -> OSError:
    """The disk's own error; safetensors only says it in words: `I/O error: ... (os error 28)`."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else 0, str(error))
