"""Does the program that the model wrote pass its tests? The reward `code`, for tasks whose answer is a Python program.

The gold answer is the tests: inputs with outputs, calls with values, or assertions. Programs run in a sandbox
(sandbox.py), and what they should give stays outside it. Left out: other languages, installed packages, interactive
programs, and checkers for tasks with many right outputs.
"""

import ast
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from reasoner.errors import RewardError
from reasoner.rewards.answers import NEXT_TURN, after_thinking
from reasoner.rewards.sandbox import GRACE_S, Limits, Sandbox, protection
from reasoner.rewards.sandbox_calls import from_wire

FENCE = "```"
LANGUAGES = ("", "python", "python3", "py")
MAX_CHARS = 100_000
MARGIN_S = GRACE_S + 0.5  # of the part's timeout_s: a program's end must come before the worker's
SHORTEST_S = 2.0
DECIMAL = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d{1,3})?")
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")


@dataclass(frozen=True, slots=True)
class Pairs:
    """Inputs and what they should give: texts for a script, arguments and values where `entry` names a function.

    >>> Pairs("", ("1 2",), ("3",))
    >>> Pairs("add", ([1, 2],), (3,))
    """

    entry: str
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Assertions:
    """Python that raises where the program is wrong; each text is one test, or holds functions `test_...` that are."""

    statements: tuple[str, ...]


def prepare(key: str, options: Mapping[str, Any], timeout_s: float) -> tuple[dict[str, Any], str]:
    """What a part of this reward needs beside its options, and a line about its sandbox for the console; `key` is
    reward.parts.NAME. Raises RewardError where no sandbox is allowed here, or for options that can't be.
    """
    for name in ("protection", "timeout_s"):
        if name in options:
            raise RewardError(f"{key}: options.{name} is found out, not set; the part's timeout_s stands beside its fn")
    if timeout_s < SHORTEST_S:
        raise RewardError(
            f"{key}.timeout_s={timeout_s:g} is too short for a program's tests: give {SHORTEST_S:g} or more"
        )
    for name, least in (("test_s", 0.1), ("memory_mib", 64), ("tolerance", 0)):
        if name in options and not (isinstance(options[name], int | float) and options[name] >= least):
            raise RewardError(f"{key}.options.{name}={options[name]!r}: give a number from {least} on")
    method, line = protection(key, str(options.get("unsandboxed", "")))
    return {"protection": method, "timeout_s": timeout_s}, f"{key}: {line}"


def code(
    completion: str,
    answer: str,
    entry_point: str | None = None,
    test_setup_code: str | None = None,
    test_imports: Sequence[str] | str | None = None,
    partial: bool = False,
    test_s: float = 2.0,
    memory_mib: int = 512,
    tolerance: float = 1e-6,
    helpers: Sequence[str] = (),
    unsandboxed: str = "",
    timeout_s: float = 5.0,
    protection: str = "",
) -> float:
    """1.0 if the program in the last code block after `</think>` passes every test of `answer`, else 0.0; with
    `partial` the share of the tests that it passes.

    A test has `test_s` seconds, all of them together `timeout_s` less 1.5; what goes over them, over `memory_mib` or
    over the sandbox's other limits is wrong. `entry_point`, `test_setup_code` and `test_imports` are columns of
    HumanEval's and MBPP's rows. Raises ValueError for tests that are none of the known kinds or can't be run here,
    SandboxError where the sandbox fails.
    """
    ends = time.monotonic() + timeout_s - MARGIN_S
    tests = _tests(answer)
    source = program(completion)
    if source is None or len(source) > MAX_CHARS:
        return 0.0
    sandbox = _sandbox(protection, unsandboxed)
    sandbox.start()
    limits = Limits(test_s, max(0.1, ends - time.monotonic()), memory_mib)
    if isinstance(tests, Assertions):
        imports = [test_imports] if isinstance(test_imports, str) else test_imports or []
        asked = {
            "setup": "\n".join([*imports, test_setup_code or ""]),
            "statements": tests.statements,
            "entry": entry_point or "",
            "helpers": list(helpers),
        }
        passed, to_the_end = sandbox.judge(source, asked, limits, partial=partial)
        total = max(len(tests.statements), len(passed) + (not to_the_end))
    else:
        passed, total = _passed(sandbox, source, tests, limits, tolerance, partial), len(tests.inputs)
    share = sum(passed) / max(1, total)
    return share if partial else float(share == 1.0)


def program(completion: str) -> str | None:
    """The last code block after `</think>` that is marked as Python, else the last that is not marked; None if there is
    none, where a think block is open, and where the model went on with a turn of its own after one.
    """
    said = after_thinking(completion)
    if said is None:
        return None
    blocks, prose, fence, language = list[tuple[str, str]](), list[str](), "", ""
    lines = list[str]()
    for line in said.split("\n"):
        text = line.strip()
        if fence:
            if text.startswith(fence) and not text.strip("`"):
                blocks.append((language, "\n".join(lines)))
                fence, lines = "", []
            else:
                lines.append(line)
        elif text.startswith(FENCE) and "`" not in text.lstrip("`"):
            fence = text[: len(text) - len(text.lstrip("`"))]
            language = (text.lstrip("`").split() or [""])[0].lower()
        elif blocks:
            prose.append(line)
    if NEXT_TURN.search("\n".join(prose)):
        return None
    for wanted in (LANGUAGES[1:], LANGUAGES[:1]):
        found = [block for language, block in blocks if language in wanted]
        if found:
            return found[-1]
    return None


@lru_cache(maxsize=256)
def _tests(answer: str) -> Pairs | Assertions:
    """The tests that a gold answer holds. Raises ValueError for what is none of the known kinds."""
    value = _read(answer)
    if isinstance(value, dict):
        if isinstance(value.get("test_cases"), list):
            value = value["test_cases"]
        elif "inputs" in value and "outputs" in value:
            return _pairs(value.get("fn_name") or "", value["inputs"], value["outputs"])
    items = value if isinstance(value, list) else []
    if items and all(isinstance(one, dict) and "input" in one and "output" in one for one in items):
        entry = next((one["fn_name"] for one in items if one.get("fn_name")), "")
        return _pairs(entry, [one["input"] for one in items], [one["output"] for one in items])
    if items and all(isinstance(one, str) for one in items):
        return Assertions(tuple(items))
    if isinstance(value, str) and ("assert" in value or "def check" in value):
        return Assertions((value,))
    raise ValueError(
        f"the gold answer {answer[:80]!r} holds no tests: give inputs and outputs, a list of assertions, or test code"
    )


def _read(answer: str) -> Any:
    """The answer as JSON or as a Python literal, else the text that it is."""
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(answer.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return answer


def _pairs(entry: str, inputs: Any, outputs: Any) -> Pairs:
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise ValueError("the gold answer's inputs and outputs are no two lists of one length")
    if not entry:
        return Pairs("", tuple(_lines(one) for one in inputs), tuple(_lines(one) for one in outputs))
    calls = tuple(_arguments(one) for one in inputs)
    return Pairs(entry, calls, tuple(_read(one) if isinstance(one, str) else one for one in outputs))


def _lines(cell: Any) -> str:
    return "\n".join(map(str, cell)) if isinstance(cell, list) else str(cell)


def _arguments(cell: Any) -> list[Any]:
    """A call's arguments: a list of them, or text with one in each line, as JSON."""
    if isinstance(cell, str):
        return [_read(line) for line in cell.split("\n") if line.strip()]
    if not isinstance(cell, list):
        raise ValueError(f"a call's input is {type(cell).__name__}, not a list of arguments")
    return cell


def _passed(sandbox: Sandbox, source: str, tests: Pairs, limits: Limits, tolerance: float, partial: bool) -> list[bool]:
    """Which tests pass; without `partial` up to the first that fails."""
    if tests.entry:
        given = sandbox.values(source, tests.entry, tests.inputs, limits)
    else:
        given = sandbox.outputs(source, tests.inputs, limits)
    passed = list[bool]()
    with closing(given):
        for said, wanted in zip(given, tests.outputs, strict=True):
            right = said is not None and (
                same_value(wanted, said, tolerance) if tests.entry else same_output(wanted, said, tolerance)
            )
            passed.append(right)
            if not right and not partial:
                break
    return passed


def same_output(wanted: str, said: str, tolerance: float) -> bool:
    """Whether both texts have the same words in the same lines; empty lines at the end and white space are passed over,
    and a word that is wanted with a decimal point or an exponent may differ by the tolerance, absolute or relative.
    """
    wanted_lines, said_lines = wanted.rstrip().split("\n"), said.rstrip().split("\n")
    return len(wanted_lines) == len(said_lines) and all(
        _same_words(a.split(), b.split(), tolerance) for a, b in zip(wanted_lines, said_lines, strict=True)
    )


def _same_words(wanted: Sequence[str], said: Sequence[str], tolerance: float) -> bool:
    return len(wanted) == len(said) and all(
        a == b or (bool(DECIMAL.fullmatch(a) and NUMBER.fullmatch(b)) and _near(float(a), float(b), tolerance))
        for a, b in zip(wanted, said, strict=True)
    )


def _near(wanted: float, said: float, tolerance: float) -> bool:
    try:
        return wanted == said or (math.isfinite(said) and abs(wanted - said) <= tolerance * max(1.0, abs(wanted)))
    except OverflowError:  # an integer beyond every float
        return False


def same_value(wanted: Any, said: str, tolerance: float) -> bool:
    """Whether a function's value, as it came from the sandbox, is the wanted one: of the same types, but that a tuple
    is a list, as in JSON, and a float may differ by the tolerance. A list of one wanted value may stand for the value.
    """
    try:
        value = from_wire(json.loads(said))
    except (ValueError, TypeError, RecursionError, OverflowError):
        return False
    alone = isinstance(wanted, list) and len(wanted) == 1
    return _same(wanted, value, tolerance) or (alone and _same(wanted[0], value, tolerance))


def _same(wanted: Any, said: Any, tolerance: float) -> bool:
    if isinstance(wanted, bool) or isinstance(said, bool) or wanted is None or isinstance(wanted, str):
        return type(wanted) is type(said) and wanted == said
    if isinstance(wanted, int | float):
        exact = isinstance(wanted, int) and isinstance(said, int)
        return isinstance(said, int | float) and (wanted == said if exact else _near(wanted, said, tolerance))
    if isinstance(wanted, list | tuple):
        return (
            isinstance(said, list | tuple)
            and len(wanted) == len(said)
            and all(_same(a, b, tolerance) for a, b in zip(wanted, said, strict=True))
        )
    if isinstance(wanted, dict) and isinstance(said, dict) and len(wanted) == len(said):
        by_text = {str(key): value for key, value in said.items()}
        return all(str(key) in by_text and _same(value, by_text[str(key)], tolerance) for key, value in wanted.items())
    return type(wanted) is type(said) and wanted == said


_running: dict[str, Sandbox] = {}  # in each reward worker, by method: starting one costs an interpreter


def _sandbox(method: str, unsandboxed: str) -> Sandbox:
    method = method or _best(unsandboxed)
    return _running.setdefault(method, Sandbox(method))


@lru_cache(maxsize=2)
def _best(unsandboxed: str) -> str:
    return protection("code", unsandboxed)[0]
