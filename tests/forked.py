"""Programs in processes of their own, forked from one that has imported the package: each costs what it does, not the
10 s of imports before it.

They share their parent's hash seed and random state; what must not depend on these is held against a process that was
started anew.
"""

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path


def start_forked(code: str, *arguments: str, said: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """`python -c CODE ARGUMENTS`, begun; what it prints goes to said.out and said.err, after what is there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reasoner.__main__", "reasoner.pipeline"])
    run = context.Process(target=_run, args=(code, arguments, said, environment or {}))
    run.start()
    return run


def _run(code: str, arguments: tuple[str, ...], said: Path, environment: Mapping[str, str]) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        with said.with_suffix(suffix).open("ab") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
