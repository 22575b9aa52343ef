"""The process that runs reward functions. The pool starts it by path with `python -P`: nobody's `__main__` is run a
second time, and the `math.py` beside this file can't stand in for the standard library's. Standard library only;
everything else arrives in the setup.

It speaks in pickles, one request, one reply, on what were its standard input and output; what a reward prints goes to
standard error. Left out: limits on time. The parent keeps the clock and kills the process group.
"""

import importlib
import inspect
import numbers
import os
import pickle
import signal
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

MAX_REASON_CHARS = 300
LOADED, UNLOADABLE, ABSENT = "loaded", "unloadable", "absent"  # replies to the setup
VALUE, NAMED, FAILED = "value", "named", "failed"  # replies to a call
# What a function may return: a float, None, (score, extras) or named parts; a list; a float or a dict with a score.
RETURNS_ONE, RETURNS_LIST, RETURNS_SCORE = "one", "list", "score"
PICKLED_FILE = "<dynamic-code>"  # what cloudpickle gives for the file of a pickled function's lines

# Where a function comes from: ("file", path, function, the file's text), ("module", module, function, b""), or
# ("pickled", the file it was written in, function, the pickle).
Source = tuple[str, str, str, bytes]


class Function(NamedTuple):
    """A loaded reward function and the file its lines are in."""

    call: Callable[..., Any]
    file: str


def main() -> None:
    """Load the functions that the setup names, then answer calls until the parent closes the pipe."""
    parent_pid, memory_bytes = int(sys.argv[1]), int(sys.argv[2])
    _die_with(parent_pid)
    _limit_memory(memory_bytes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent decides
    requests, replies = _take_pipes()
    setup = pickle.load(requests)
    sys.path[:] = setup["sys_path"]
    functions: dict[str, Function] = {}
    _reply(replies, _load(setup["sources"], functions))
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            os._exit(0)  # a thread that a reward left behind must not keep the process
        _reply(replies, answer(functions, request))


def _die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when the parent's thread that started it ends; elsewhere than Linux the
    closed pipe must do.
    """
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.name == "posix" and os.getppid() != parent_pid:
        os._exit(1)  # it was gone before the line above


def _limit_memory(limit_bytes: int) -> None:
    if sys.platform == "linux":  # macOS takes the limit and ignores it
        import resource

        # Not RLIMIT_AS: that counts shared libraries too, and a CUDA torch maps gigabytes of them on import.
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return requests, replies


def _reply(replies: BinaryIO, reply: tuple[Any, ...]) -> None:
    pickle.dump(reply, replies)
    replies.flush()


def _load(sources: dict[str, Source], functions: dict[str, Function]) -> tuple[Any, ...]:
    """Fill `functions` and reply with each one's parameters, or with the first part that can't be had and why."""
    modules: dict[str, types.ModuleType] = {}
    described = {}
    for part, (kind, place, name, blob) in sources.items():
        try:
            if kind == "pickled":
                found = pickle.loads(blob)
            else:
                if place not in modules:
                    modules[place] = importlib.import_module(place) if kind == "module" else run_file(place, blob)
                if not hasattr(modules[place], name):
                    return (ABSENT, part, name, _own_functions(modules[place]))
                found = getattr(modules[place], name)
            described[part] = describe(found)
            code = getattr(inspect.unwrap(found), "__code__", None)
            functions[part] = Function(found, place if kind == "pickled" or not code else code.co_filename)
        except BaseException as error:  # noqa: BLE001  a stranger's module: whatever it raises says why it can't be loaded
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            return (UNLOADABLE, part, reason_of(error, place), missing)
    return (LOADED, described)


def run_file(path: str, source: bytes) -> types.ModuleType:
    """The module that `source` makes; compiled here, not imported, so that no cached bytecode of an older text is
    taken.
    """
    name = "reward_file_" + "".join(c if c.isalnum() else "_" for c in path)
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def _own_functions(module: types.ModuleType) -> list[str]:
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__
    ]
    return sorted(name for name in own if not name.startswith("_"))


def describe(function: Any) -> dict[str, Any]:
    """A reward function's parameters. Raises TypeError where it can't be called by parameter name once a completion."""
    if not callable(function):
        raise TypeError(f"it is {type(function).__name__}, not a function")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError("it yields: a reward returns its score")
    parameters = inspect.signature(function).parameters.values()
    unnamed = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if unnamed:
        raise TypeError(f"its parameter '{unnamed[0]}' is positional-only: rewards are called by parameter name")
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    code = getattr(inspect.unwrap(function), "__code__", None)
    return {
        "required": [p.name for p in by_name if p.default is p.empty],
        "optional": [p.name for p in by_name if p.default is not p.empty],
        "takes_all": next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), ""),
        "annotations": {p.name: _written(p.annotation) for p in by_name if p.annotation is not p.empty},
        "line": code.co_firstlineno if code else None,
    }


def _written(annotation: Any) -> str:
    """An annotation as its author wrote it, or nearly: `list[dict[str, str]]`."""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def answer(functions: dict[str, Function], request: tuple[Any, ...]) -> tuple[str, Any]:
    """(VALUE, a finite float or None), (NAMED, (the same, floats by name)) or (FAILED, why)."""
    kind, name, blob, returns = request
    try:
        if kind == "import":
            importlib.import_module(name)
            return (VALUE, None)
        value = functions[name].call(**pickle.loads(blob))
        if inspect.isawaitable(value):
            value = _waited_for(value)
        return judge(value, returns)
    except BaseException as error:  # noqa: BLE001  a stranger's function: whatever it raises, SystemExit too, is its failure
        return (FAILED, reason_of(error, functions[name].file if name in functions else ""))


def _waited_for(value: Any) -> Any:
    import asyncio  # a tenth of a second, which most runs don't need

    async def wait() -> Any:
        return await value

    return asyncio.run(wait())


def judge(value: Any, returns: str) -> tuple[str, Any]:
    """What a reward returned, held to what its signature promises; everything else is a failure, never a 0."""
    if returns == RETURNS_LIST:
        if not isinstance(value, list | tuple):
            return (FAILED, f"returned {type(value).__name__}: a function of lists returns a list of floats and Nones")
        if len(value) != 1:
            return (FAILED, f"returned {type(value).__name__} of {len(value)} for one completion")
        value = value[0]
        return _with_names(value, "score") if isinstance(value, dict) else _number(value)
    if returns == RETURNS_SCORE:
        return _with_names(value, "score") if isinstance(value, dict) else _number(value)
    if isinstance(value, dict):
        return _with_names(value, None)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
        verdict, number = _number(value[0])
        return (verdict, number) if verdict == FAILED else (NAMED, (number, _numbers_of(value[1])))
    return _number(value)


def _with_names(values: dict[Any, Any], score: str | None) -> tuple[str, Any]:
    """A dict's value: its entry `score`, and the rest beside it; without one the sum of its parts, all numbers or
    None.
    """
    if score is not None:
        if score not in values:
            return (FAILED, f"returned a dict without '{score}': it has {', '.join(map(str, values)) or 'nothing'}")
        verdict, number = _number(values[score])
        rest = {name: value for name, value in values.items() if name != score}
        return (verdict, number) if verdict == FAILED else (NAMED, (number, _numbers_of(rest)))
    if "score" in values:
        return (FAILED, "returned named parts, one of them 'score': return (score, extras), or rename the part")
    judged = {str(name): _number(value) for name, value in values.items()}
    for name, (verdict, reason) in judged.items():
        if verdict == FAILED:
            return (FAILED, f"its part '{name}': {reason}")
    parts = {name: number for name, (_, number) in judged.items() if number is not None}
    return (NAMED, (sum(parts.values()) if parts else None, parts))


def _numbers_of(extras: dict[Any, Any]) -> dict[str, float]:
    judged = {str(name): _number(value) for name, value in extras.items()}
    return {name: number for name, (verdict, number) in judged.items() if verdict == VALUE and number is not None}


def _number(value: Any) -> tuple[str, Any]:
    """(VALUE, a finite float or None): bool and int count as floats."""
    if value is None:
        return (VALUE, None)
    if not isinstance(value, numbers.Real):
        length = f" of {len(value)}" if isinstance(value, list | tuple) else ""
        return (
            FAILED,
            f"returned {type(value).__name__}{length}: a reward returns one float for its one completion, or None",
        )
    try:
        number = float(value)
    except OverflowError:
        return (FAILED, "returned a number too large for a float")
    if number != number or number in (float("inf"), float("-inf")):
        return (FAILED, f"returned {number}")
    return (VALUE, number)


def reason_of(error: BaseException, file: str) -> str:
    """`TypeError: what (file.py:12)`, the innermost line in the reward's own file, or anywhere if there is none."""
    text = "more memory than a worker may have" if isinstance(error, MemoryError) else " ".join(str(error).split())
    lines = _lines(error)
    if isinstance(error, SyntaxError):
        text, lines = str(error.msg), [(str(error.filename), error.lineno or 0)]
    lines = [(file if name == PICKLED_FILE else name, number) for name, number in lines]
    place = next((line for line in reversed(lines) if line[0] == file), lines[-1] if lines else None)
    where = f" ({os.path.basename(place[0])}:{place[1]})" if place else ""
    return f"{type(error).__name__}: {text}".rstrip(": ")[:MAX_REASON_CHARS] + where


def _lines(error: BaseException) -> list[tuple[str, int]]:
    lines, trace = [], error.__traceback__
    while trace:
        lines.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return [
        line for line in lines if line[0] not in (__file__, importlib.__file__) and not line[0].startswith("<frozen")
    ]


if __name__ == "__main__":
    main()
