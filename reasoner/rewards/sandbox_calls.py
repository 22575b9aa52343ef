"""Assertions about a program that run apart from it: the tests' process holds stand-ins for the program's functions,
and each call crosses a pipe to the process that runs the program. Only plain data comes back, so that the comparison is
the tests' own: an object that equals everything can't travel, and what the program does to its interpreter stays there.

Standard library only: both processes are in the sandbox. sandbox_tests.py runs the assertions themselves. Left out:
arguments that a call changes in place, and functions as arguments.
"""

import builtins
import json
import os
import select
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

MAX_REPLY_BYTES = 1 << 20
EXACT_INT = 1 << 53
SOLUTION = "solution"  # `from solution import f` in tests means the program


class Broken(BaseException):
    """The program ended, hung or sent what is no reply. No Exception: a test's own `except` must not take it."""


class Unfit(BaseException):
    """The tests can't be run here: the fault is the row's, not the program's."""


def to_wire(value: Any, keep: Callable[[Any], int] | None = None) -> Any:
    """Plain data as JSON's types. Other objects stay where they are, as the number that `keep` gives them.

    >>> to_wire((1, {2: "a"}))
    {'tuple': [1, {'dict': [[2, 'a']]}]}
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value) if abs(value) < EXACT_INT else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [to_wire(item, keep) for item in value]
    if isinstance(value, dict):
        return {"dict": [[to_wire(key, keep), to_wire(item, keep)] for key, item in value.items()]}
    for name, kind in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {name: [to_wire(item, keep) for item in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if keep is None:
        raise Unfit(f"the tests pass a {type(value).__name__} to the program: only plain data can be passed")
    return {"object": keep(value)}


def from_wire(data: Any, find: Callable[[int], Any] | None = None) -> Any:
    """What `to_wire` was given, in exactly the built-in types. Raises ValueError for what it never makes."""
    if isinstance(data, list):
        return [from_wire(item, find) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError("no value")
    [(name, inner)] = data.items()
    if name == "int":
        return int(inner, 16)
    if name == "dict":
        return {from_wire(key, find): from_wire(item, find) for key, item in inner}
    if name in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[name](from_wire(item, find) for item in inner)
    if name == "complex":
        return complex(*inner)
    if name == "bytes":
        return bytes.fromhex(inner)
    if name == "object" and find is not None:
        return find(inner)
    raise ValueError(f"no value: {name!r}")


def write_frame(descriptor: int, message: Any) -> None:
    """A message as JSON, its length before it."""
    blob = json.dumps(message).encode()
    view = memoryview(struct.pack(">I", len(blob)) + blob)
    while view:
        view = view[os.write(descriptor, view) :]


def read_exactly(descriptor: int, count: int, deadline: float | None = None) -> bytes:
    """So many bytes and not one more. Raises Broken at the end of the stream and after `deadline` (time.monotonic)."""
    found = bytearray()
    while len(found) < count:
        if deadline is not None and not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise Broken("no reply in time")
        piece = os.read(descriptor, min(count - len(found), 1 << 16))
        if not piece:
            raise Broken("the other side ended")
        found += piece
    return bytes(found)


def read_frame(descriptor: int, deadline: float | None = None, most: int = 1 << 30) -> Any:
    """The next message. Raises Broken where there is none, or none that can be one."""
    (length,) = struct.unpack(">I", read_exactly(descriptor, 4, deadline))
    if length > most:
        raise Broken("a reply that is too long")
    try:
        return json.loads(read_exactly(descriptor, length, deadline))
    except (ValueError, RecursionError):
        raise Broken("no reply") from None


def serve_calls(namespace: dict[str, Any], requests: int, replies: int) -> None:
    """Answer calls to the program whose names these are, until the tests end. Runs in the program's process."""
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    while True:
        try:
            request = read_frame(requests)
        except Broken:
            return
        try:
            arguments = from_wire(request["arguments"], kept.__getitem__)
            named = from_wire(request["named"], kept.__getitem__)
            target = request["of"]
            target = kept[target] if isinstance(target, int) else find(namespace, target)
            reply = {"value": to_wire(DO[request["do"]](target, *arguments, **named), keep)}
        except BaseException as error:  # noqa: BLE001  whatever the program raises is what the test is told
            reply = {"error": [type(error).__name__, str(error)[:1000]]}
        write_frame(replies, reply)


DO: dict[str, Callable[..., Any]] = {
    "call": lambda target, *arguments, **named: target(*arguments, **named),
    "get": getattr,
    "set": setattr,
    "list": list,
    "len": len,
    "item": lambda target, key: target[key],
}


def find(namespace: Mapping[str, Any], name: str) -> Any:
    """The program's own `name`, or the method of that name of its class Solution."""
    name = name.removeprefix("Solution().")
    if name not in namespace and "Solution" in namespace:
        return getattr(namespace["Solution"](), name)
    if name not in namespace:
        raise NameError(f"name '{name}' is not defined")
    return namespace[name]


class Line:
    """The way from the tests to the program. `limit_s` bounds each test; it begins with `start`. A program that was
    late once is not asked again: its late reply would be taken for the next one.
    """

    def __init__(self, requests: int, replies: int, limit_s: float):
        self._requests, self._replies, self._limit_s = requests, replies, limit_s
        self._deadline, self._broken = 0.0, False
        self.asked = False  # anything at all

    def start(self) -> None:
        """A new test begins."""
        self._deadline = time.monotonic() + self._limit_s

    def ask(self, do: str, of: str | int, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None) -> Any:
        """What the program gives, or the exception that it raised, as the built-in one of that name."""
        request = {"do": do, "of": of, "arguments": _sent(list(arguments)), "named": _sent(dict(named or {}))}
        reply = self._reply(request)
        try:
            if "error" in reply:
                kind, text = reply["error"]
                raise _raised(str(kind), str(text))
            return from_wire(reply["value"], lambda number: Remote(self, int(number)))
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            if getattr(error, "of_the_program", False):
                raise
            raise Broken("no reply") from None

    def _reply(self, request: Any) -> Any:
        self.asked = True
        if self._broken:
            raise Broken("the program failed before")
        self._broken = True
        try:
            write_frame(self._requests, request)
        except BrokenPipeError:
            raise Broken("the program ended") from None
        reply = read_frame(self._replies, self._deadline, MAX_REPLY_BYTES)
        self._broken = False
        return reply


def _sent(value: Any) -> Any:
    if isinstance(value, Remote):
        return {"object": value._target}
    if isinstance(value, list | tuple | dict) and type(value) in (list, tuple, dict):
        if isinstance(value, dict):
            return {"dict": [[_sent(key), _sent(item)] for key, item in value.items()]}
        sent = [_sent(item) for item in value]
        return sent if isinstance(value, list) else {"tuple": sent}
    return to_wire(value)


def _raised(kind: str, text: str) -> Exception:
    found = getattr(builtins, kind, None)
    if isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, UnicodeError):
        error = found(text)
    else:
        error = RuntimeError(f"{kind}: {text}")
    error.of_the_program = True  # type: ignore[attr-defined]
    return error


class Remote:
    """A stand-in, in the tests' process, for one of the program's functions or objects. It equals only itself."""

    __slots__ = ("_line", "_target")

    def __init__(self, line: Line, target: str | int):
        object.__setattr__(self, "_line", line)
        object.__setattr__(self, "_target", target)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._line.ask("call", self._target, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._line.ask("get", self._target, [name])

    def __setattr__(self, name: str, value: Any) -> None:
        self._line.ask("set", self._target, [name, value])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._line.ask("list", self._target))

    def __len__(self) -> int:
        return self._line.ask("len", self._target)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self._line.ask("item", self._target, [key])
