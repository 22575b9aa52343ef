"""Where a reward function comes from: `file.py:function`, `module:function`, a built-in name, an entry point's name, or
a Python function handed in.

The parent reads a file's text but runs none of it: a module with a hang or a crash in it harms a worker only, and a
worker that is replaced in mid-run runs the text that the run began with.
"""

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle

from reasoner.config import EXTRAS, nearest
from reasoner.errors import MissingExtra, RewardError
from reasoner.rewards.pool import Setup, Worker
from reasoner.rewards.worker import ABSENT, LOADED, Source


@dataclass(frozen=True, slots=True)
class Builtin:
    """A function of this package; `imports` is a module too slow to load within a call's limit, by the answer kind
    that needs it. With `prepares`, its module says what a part needs of the machine.
    """

    module: str
    function: str
    imports: Mapping[str, str] = field(default_factory=dict)
    prepares: bool = False

    def prepare(self, key: str, options: Mapping[str, Any], timeout_s: float) -> tuple[dict[str, Any], str]:
        """Further options for the part `key`, and a line for the console. Raises RewardError if it can't run here."""
        if sys.platform == "win32":
            raise RewardError(f"{key}: programs are run on Linux and macOS only: take WSL2")
        return importlib.import_module(self.module).prepare(key, options, timeout_s)


BUILTINS = {
    "math": Builtin("reasoner.rewards.math", "accuracy", imports={"latex": "reasoner.rewards.latex"}),
    "exact": Builtin("reasoner.rewards.exact", "exact"),
    "numeric": Builtin("reasoner.rewards.exact", "numeric"),
    "choice": Builtin("reasoner.rewards.choice", "choice"),
    "gym_answer": Builtin("reasoner.rewards.gym", "gym_answer"),
    "think_format": Builtin("reasoner.rewards.format", "think_format"),
    "answer_format": Builtin("reasoner.rewards.format", "answer_format"),
    "tag_count": Builtin("reasoner.rewards.format", "tag_count"),
    "regex": Builtin("reasoner.rewards.format", "regex"),
    "json_schema": Builtin("reasoner.rewards.schema", "json_schema"),
    "length": Builtin("reasoner.rewards.length", "length"),
    "cosine_length": Builtin("reasoner.rewards.length", "cosine_length", imports={"latex": "reasoner.rewards.latex"}),
    "repetition": Builtin("reasoner.rewards.language", "repetition"),
    "language": Builtin("reasoner.rewards.language", "language"),
    "code": Builtin("reasoner.rewards.code", "code", prepares=True),
}
JUDGE = "judge"  # a built-in that no worker runs: base.py asks its endpoint
HOW = "give file.py:function, module:function or a built-in name"
ENTRY_POINTS = "reasoner.rewards"  # the group in which an installed package offers rewards by name


def source_of(key: str, fn: str, functions: Mapping[str, Callable[..., Any]], base_dir: Path) -> Source:
    """What a worker needs to load `fn`; `key` names it in errors. Raises RewardError if it can't be found or sent."""
    if fn in functions:
        try:
            code = getattr(inspect.unwrap(functions[fn]), "__code__", None)
            return ("pickled", code.co_filename if code else "", fn, cloudpickle.dumps(functions[fn]))
        except Exception as error:  # pickling runs the objects' own code, which may raise anything
            raise RewardError(
                f"{key}: the function can't be sent to the worker processes: {error}; let it make what it needs"
            ) from error
    if fn in BUILTINS:
        return ("module", BUILTINS[fn].module, BUILTINS[fn].function, b"")
    place, colon, name = fn.rpartition(":")
    if not colon and fn.endswith(".py"):
        raise RewardError(f"{key}={fn} names no function: write {fn}:NAME")
    if not colon and (offered := _entry_point(key, fn)):
        return offered
    if not place or not name:
        raise RewardError(f"{key}={fn}: {HOW}{nearest(fn, sorted([*BUILTINS, JUDGE, *functions]))}")
    if not place.endswith(".py"):
        return ("module", place, name, b"")
    tried = [base_dir / place, Path.cwd() / place]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise RewardError(f"{key}={fn}: there is no file {' or '.join(dict.fromkeys(map(str, tried)))}")
    try:
        return ("file", str(path.resolve()), name, path.read_bytes())
    except OSError as error:
        raise RewardError(f"{key}={fn}: {path} can't be read: {error.strerror}") from None


def _entry_point(key: str, name: str) -> Source | None:
    """The function that an installed package offers under this name; its metadata is read, its code is not run."""
    offered = {(point.module, point.attr) for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name)}
    if len(offered) > 1:
        said = ", ".join(sorted(f"{module}:{function}" for module, function in offered))
        raise RewardError(f"{key}={name}: more than one installed package offers it: name one of {said}")
    return next((("module", module, function, b"") for module, function in offered), None)


def parameters_of(setup: Setup, names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By part, the parameters of its function, asked of a worker that loads them all; `names` has each part's key=fn
    for errors.

    Raises RewardError if one can't be loaded or called by parameter name, MissingExtra if it needs a package of ours
    that isn't installed.
    """
    worker = Worker(setup)
    try:
        reply = worker.load()
    finally:
        worker.stop()
    if reply[0] == LOADED:
        return reply[1]
    if reply[0] == ABSENT:
        _, part, name, own = reply
        raise RewardError(f"{names[part]}: it has no '{name}'{nearest(name, own)}")
    _, part, reason, missing = reply
    package = (missing or "").partition(".")[0]
    if package in EXTRAS:
        raise MissingExtra(package, EXTRAS[package], names[part])
    raise RewardError(f"{names.get(part, 'reward.parts')}: can't be loaded: {reason}")
