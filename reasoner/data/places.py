"""What `data.path` means: a file, a folder, or a pattern such as `rows/*.jsonl`.

A folder without a split is read whole only where no file of it is named after one: a test set is never trained on by
accident.
"""

import difflib
import glob
import re
from pathlib import Path

from reasoner.errors import DataError

SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "heldout")
MAGIC = re.compile(r"[*?\[]")
SHARD = re.compile(r"[-_.]\d+(?:-of-\d+)?")
SAVE_AS = {
    ".xls": "save it as .xlsx",
    ".ods": "save it as .xlsx",
    ".gz": "unpack it first",
    ".zip": "unpack it first",
    ".bz2": "unpack it first",
    ".xz": "unpack it first",
    ".zst": "unpack it first",
}


def files_of(path: str, split: str | None, endings: tuple[str, ...]) -> list[Path]:
    """The files that `data.path` means, in order; in a folder those of the split. All end in one of `endings`.

    Raises DataError if there are none, or the choice is the user's.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _of_folder(place, path, split, endings)
    if not place.exists() and MAGIC.search(path):
        found = sorted(Path(name) for name in glob.glob(str(place), recursive=True))
        files = [file for file in found if file.is_file()]
        if not files:
            raise DataError(f"data.path={path}: no file is named like this: correct the pattern")
        for file in files:
            _check_ending(file, path, endings)
        return files
    if not place.exists():
        names = [f.name for f in place.parent.iterdir()] if place.parent.is_dir() else []
        close = difflib.get_close_matches(place.name, names, n=1)
        hint = f"; did you mean {place.parent / close[0]}?" if close else ": give the path of a file that is there"
        raise DataError(f"data.path={path}: there is no such file{hint}")
    _check_ending(place, path, endings)
    return [place]


def _check_ending(file: Path, path: str, endings: tuple[str, ...]) -> None:
    ending = file.suffix.lower()
    if ending not in endings:
        name = f"{path}" if str(file) == path else f"{path} ({file})"
        remedy = SAVE_AS.get(ending, "save it as one of these")
        raise DataError(f"data.path={name}: a file ends in {', '.join(endings)}; {remedy}")


def _of_folder(folder: Path, path: str, split: str | None, endings: tuple[str, ...]) -> list[Path]:
    there = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in endings and file.is_file()]
    if split is not None:
        named = [file for file in there if file.stem == split] or [file for file in there if _split_of(file) == split]
        if not named and (folder / split).is_dir():
            inside = sorted((folder / split).iterdir())
            named = [file for file in inside if file.suffix.lower() in endings and file.is_file()]
        if len({(file.suffix.lower(), file.parent) for file in named}) == 1:
            return named
    elif there and len({file.suffix.lower() for file in there}) == 1 and not any(_split_of(file) for file in there):
        return there
    listed = ", ".join(file.name for file in there) or "no data file"
    raise DataError(f"data.path={path} is a folder: name a file in it, or set data.split; there is: {listed}")


def _split_of(file: Path) -> str | None:
    """`train` for train.jsonl, train-00000-of-00002.parquet and gsm8k_train.csv; None for rows.jsonl."""
    stem = SHARD.sub("", file.stem).lower()
    return next((name for name in SPLITS if re.search(rf"(?:^|[-_. ]){name}(?:$|[-_. ])", stem)), None)
