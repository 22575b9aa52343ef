"""`python -m reasoner init [DIR]`: a folder to begin an own project in: a conf, a reward and ten rows, that train as
they are.

Left out: questions, and any choice of what is written. The files say in comments what to change.
"""

import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from reasoner.errors import ConfigError, RunFolderError

TEMPLATES = Path(__file__).parent / "starter"
FILES = {"conf/mine.yaml": "mine.yaml", "my_reward.py": "my_reward.py", "problems.csv": "problems.csv"}
NEXT = (
    ("reward conf=mine", "try the rewards on the rows; no model"),
    ("data conf=mine", "see the rows as the model reads them"),
    ("conf=mine", "train, in about a minute on a CPU"),
)


def init(arguments: Sequence[str], *, say: Callable[[str], None] = print) -> None:
    """Write the starter files into a folder, which is made if need be, and say what can be done next.

    Nothing that is there is touched. Raises ConfigError for other arguments than one folder, and RunFolderError where
    a file of these names is there already or the folder can't be written; then no new file is left behind.
    """
    if len(arguments) > 1 or any(word.startswith("-") or "=" in word for word in arguments):
        raise ConfigError(f"init {' '.join(arguments)}: give it one folder, or none for this one: init [DIR]")
    folder = Path(*arguments).expanduser()
    there = next((name for name in FILES if (folder / name).exists() or (folder / name).is_symlink()), None)
    if there:
        raise RunFolderError(f"{folder / there} is there already, and init overwrites nothing: name another folder")
    write(folder)
    say(f"wrote {', '.join(str(folder / name) for name in FILES)}")
    say("next, in this order:")
    if folder.resolve() != Path.cwd():
        say(f"  cd {shlex.quote(str(folder))}")
    commands = [f"{shlex.quote(python())} -m reasoner {words}" for words, _ in NEXT]
    width = max(map(len, commands))
    for command, (_, purpose) in zip(commands, NEXT, strict=True):
        say(f"  {command:{width}}  # {purpose}")


def write(folder: Path) -> None:
    """Copy the templates, all or none. Raises RunFolderError."""
    written: list[Path] = []
    try:
        for name, template in FILES.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                written.append(path)
                file.write((TEMPLATES / template).read_bytes())
    except OSError as error:
        for path in written:
            path.unlink()
        raise RunFolderError(f"init {folder}: {error.filename or folder}: {error.strerror}") from error


def python() -> str:
    """How a shell reaches this interpreter: `python` where that is it, else its path."""
    found = shutil.which("python")
    return "python" if found and Path(found).parent == Path(sys.executable).parent else sys.executable
