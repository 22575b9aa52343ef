"""The tests of a program, in a process apart from it: which there are in a row's text, and whether each passes.

Their names for the program's functions are stand-ins (sandbox_calls.py). Standard library only, as this runs in the
sandbox. Left out: fixtures and parameters of pytest, and tests that are asynchronous.
"""

import ast
import builtins
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from reasoner.rewards.sandbox_calls import SOLUTION, Broken, Line, Remote, Unfit


def run_tests(tests: Mapping[str, Any], line: Line) -> Iterator[bool]:
    """Whether each test passes, one after another. Runs in the tests' process.

    `tests` has `statements`, each a test unless it defines some, `setup` before them, `entry` (the function that
    `check(candidate)` is called with, or "") and `helpers` (further names of the program that the tests may use).
    Raises Unfit for tests that can't be run here.
    """
    namespace = _namespace(tests, line)
    for code in [_compiled(text) for text in tests["statements"]]:
        before = set(namespace)
        line.start()
        passed = _passes(lambda code=code: exec(code, namespace), line)
        functions = _functions(namespace, before, tests["entry"], line)
        if not functions or not passed:
            yield passed
        for function in functions if passed else ():
            line.start()
            yield _passes(function, line)
    if not line.asked:
        raise Unfit("the tests never ask the program anything, so that every program would pass them")


def _functions(namespace: dict[str, Any], before: set[str], entry: str, line: Line) -> list[Callable[[], Any]]:
    """The tests that a text has just defined: `check`, called with a stand-in for the entry, functions test_..., and
    the methods test_... of classes, each on an object of its own. Raises Unfit for those that can't be called so.
    """
    if "check" in namespace and "check" not in before:
        if not entry:
            raise Unfit("the test defines check(candidate): give the candidate's name in a column entry_point")
        return [lambda: namespace["check"](Remote(line, entry))]
    made = {name: value for name, value in namespace.items() if name not in before}
    found = [_plain(value, name) for name, value in made.items() if name.startswith("test_") and callable(value)]
    for kind in made.values():
        if isinstance(kind, type) and kind.__module__ == namespace["__name__"]:
            found += [_method(kind, name) for name in dir(kind) if name.startswith("test_")]
    return found


def _plain(function: Callable[..., Any], name: str, given: int = 0) -> Callable[..., Any]:
    """The function, which takes no argument beside the `given` ones and is through when it returns."""
    if isinstance(function, Remote):
        return function
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise Unfit(f"the test {name} is asynchronous or yields: a test must be a plain function")
    parameters = inspect.signature(function).parameters.values()
    if sum(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters) > given:
        raise Unfit(f"the test {name} takes arguments, which nothing here gives it")
    return function


def _method(kind: type, name: str) -> Callable[[], Any]:
    """A method of a class of tests, unittest's or pytest's, with what the class has done before and after each."""
    _plain(getattr(kind, name), f"{kind.__name__}.{name}", given=1)
    of_unittest = hasattr(kind, "setUp")
    names = ("setUpClass", "setUp", "tearDown") if of_unittest else ("setup_class", "setup_method", "teardown_method")

    def run() -> None:
        getattr(kind, names[0], lambda: None)()
        tests = kind(name) if of_unittest else kind()
        for step in (names[1], name, names[2]):
            getattr(tests, step, lambda: None)()

    return run


def _passes(run: Callable[[], Any], line: Line) -> bool:
    try:
        run()
    except (ImportError, NameError) as error:
        # What the program gives may leave a name unset, as a loop over nothing does.
        if getattr(error, "of_the_program", False) or (line.asked and isinstance(error, NameError)):
            return False
        raise Unfit(f"the tests can't be run: {type(error).__name__}: {error}") from None
    except (Exception, Broken, SystemExit):  # noqa: BLE001  whatever an assertion raises, it does not hold
        return False
    return True


def _compiled(text: str) -> types.CodeType:
    try:
        return compile(text, "<test>", "exec")
    except (SyntaxError, ValueError) as error:
        raise Unfit(f"a test is no Python: {error}: {text[:80]!r}") from None


def _namespace(tests: Mapping[str, Any], line: Line) -> dict[str, Any]:
    """What the tests see: their setup, standard modules that they name without importing, and stand-ins for the
    program's names that they use.
    """
    module = types.ModuleType(SOLUTION)
    module.__getattr__ = lambda name: _stand_in(line, name)  # type: ignore[method-assign]
    sys.modules[SOLUTION] = module
    text = "\n".join([tests["setup"], *tests["statements"]])
    free, called = _free_names(text), _called_names(text)
    entry, helpers = tests["entry"], tests["helpers"]
    namespace: dict[str, Any] = {"__name__": "tests"}
    for name in sorted(free):
        if name in sys.stdlib_module_names and name not in (entry, *helpers) and name not in called:
            namespace[name] = importlib.import_module(name)
        elif entry and name not in (entry, *helpers):
            raise Unfit(
                f"the tests use '{name}', which they don't define: to take it from the program, which may define it in "
                f"its own favour, set options.helpers=[{name}]"
            )
        else:
            namespace[name] = Remote(line, name)
    line.start()
    setup = _compiled(tests["setup"])
    try:
        exec(setup, namespace)
    except Exception as error:  # noqa: BLE001  a row's own code, which calls the program: whatever it raises
        if line.asked:
            raise Broken("the program failed in the tests' setup") from None
        raise Unfit(f"the tests' setup fails: {type(error).__name__}: {error}") from None
    return namespace


def _stand_in(line: Line, name: str) -> Remote:
    if name.startswith("__"):
        raise AttributeError(name)
    return Remote(line, name)


def _free_names(text: str) -> set[str]:
    """Names that the code uses and neither makes nor finds among Python's own."""
    used, made = set[str](), set[str](dir(builtins))
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            made.add(node.name)
    return used - made - {"__name__", "__file__"}


def _called_names(text: str) -> set[str]:
    """Names that the code calls, which no module is."""
    calls = [node.func for node in ast.walk(_parsed(text)) if isinstance(node, ast.Call)]
    return {function.id for function in calls if isinstance(function, ast.Name)}


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise Unfit(f"the tests are no Python: {error}") from None
