"""Scores for completions: named reward functions, each called by parameter name in a worker process, summed with their
weights.

A reward is a plain function `score(completion, answer, **columns) -> float | None`. Each completion is scored on its
own, so order, batch and number of workers change nothing. What fails (an exception, NaN, a wrong type, a hang) is a
failure in the record, never a 0. Left out: rewards that compare the completions of a group, and async functions.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from reasoner.config import Reward, nearest
from reasoner.errors import RewardError
from reasoner.rewards.pool import Call, Failure, Outcome, Pool, Setup
from reasoner.rewards.sources import BUILTINS, parameters_of, source_of
from reasoner.types import Completion, Prompt, Score

OWN_NAMES = ("completion", "answer", "prompt", "finish_reason", "num_tokens")
MAX_DEFAULT_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Part:
    """One named reward, ready to be called. `wanted` are the names its function takes; None: all there are."""

    name: str
    weight: float
    timeout_s: float
    options: Mapping[str, Any]
    wanted: frozenset[str] | None
    imports: Mapping[str, str]

    def call(self, prompt: Prompt, completion: Completion) -> Call:
        """The call that scores this completion. Our own names come before options, and options before columns."""
        values: dict[str, Any] = {
            **prompt.columns,
            **self.options,
            "completion": prompt.prefill + completion.text,
            "answer": prompt.answer,
            "prompt": prompt.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.token_ids),
        }
        if self.wanted is not None:
            values = {name: value for name, value in values.items() if name in self.wanted}
        slow = self.imports.get(str(values.get("answer_kind")))
        return Call(self.name, values, self.timeout_s, imports=(slow,) if slow else ())


@dataclass(slots=True)
class Rewards:
    """The rewards of a run. Workers start with the first score; `close()` (or `with`) ends them."""

    parts: tuple[Part, ...]
    setup: Setup
    workers: int
    _pool: Pool | None = field(default=None, init=False)

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the parts, in the conf's order."""
        return tuple(part.name for part in self.parts)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], *, only: str | None = None
    ) -> list[Score]:
        """A Score for each completion; `prompts[i]` is the prompt of `completions[i]`. With `only`, of that part alone.

        A failing reward raises nothing: see Score.
        """
        if self._pool is None:
            self._pool = Pool(self.setup, self.workers)
        pairs = list(zip(prompts, completions, strict=True))
        parts = [part for part in self.parts if only in (None, part.name)]
        outcomes = self._pool.run([part.call(prompt, completion) for prompt, completion in pairs for part in parts])
        n = len(parts)
        return [_sum(parts, outcomes[i * n : (i + 1) * n]) for i in range(len(pairs))]

    def close(self) -> None:
        """End the worker processes; a later score starts new ones."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _sum(parts: Sequence[Part], outcomes: Sequence[Outcome]) -> Score:
    """Total = sum over the parts that apply and did not fail of weight x part."""
    total, values, failures = 0.0, {}, {}
    for part, outcome in zip(parts, outcomes, strict=True):
        if isinstance(outcome, Failure):
            failures[part.name] = outcome.reason
        elif outcome is not None:
            values[part.name] = outcome
            total += part.weight * outcome
    return Score(total, values, failures)


def load_rewards(
    reward: Reward,
    *,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    base_dir: Path,
    columns: set[str],
) -> Rewards:
    """The rewards that a conf's section `reward` describes, each one found, loaded once in a worker and its parameters
    checked.

    `functions` holds Python functions by the name that a part's `fn` gives them; files are looked for in `base_dir`
    (the conf's folder), then in the working directory; `columns` are the columns of the rows. Raises RewardError (what,
    where, what to do) before any model loads, MissingExtra if a built-in needs a package that isn't installed.
    """
    if not reward.parts:
        raise RewardError("reward.parts is empty: give a reward, e.g. reward=my_reward.py:score")
    names = {name: f"reward.parts.{name}.fn={part.fn}" for name, part in reward.parts.items()}
    sources = {
        name: source_of(f"reward.parts.{name}.fn", part.fn, functions or {}, base_dir)
        for name, part in reward.parts.items()
    }
    # Appended: put first, a user's `math.py` or `dis.py` would stand in for the standard library's.
    folders = [str(Path(source[1]).parent) for source in sources.values() if source[0] == "file"]
    sys_path = dict.fromkeys([*sys.path, *folders, str(base_dir.resolve()), str(Path.cwd())])
    setup = Setup(sources, tuple(sys_path))
    parameters = parameters_of(setup, names)
    parts = []
    for name, part in reward.parts.items():
        builtin = BUILTINS.get(part.fn) if part.fn not in (functions or {}) else None
        wanted = _wanted(names[name], parameters[name], part.options, columns)
        parts.append(Part(name, part.weight, part.timeout_s, part.options, wanted, builtin.imports if builtin else {}))
    return Rewards(tuple(parts), setup, reward.workers or min(MAX_DEFAULT_WORKERS, _cores()))


def _wanted(
    where: str, parameters: Mapping[str, Any], options: Mapping[str, Any], columns: set[str]
) -> frozenset[str] | None:
    """The names to call the function with. Raises RewardError for a parameter that nothing fills and an option that
    nothing takes.
    """
    where = f"{where} (line {parameters['line']})" if parameters["line"] else where
    known = [*OWN_NAMES, *sorted(options), *sorted(columns - set(OWN_NAMES))]
    for option in options:
        if option in OWN_NAMES:
            raise RewardError(
                f"{where}: the option '{option}' is an argument that every reward gets: choose another name"
            )
        if not parameters["takes_all"] and option not in parameters["required"] + parameters["optional"]:
            raise RewardError(
                f"{where} takes no option '{option}'{nearest(option, parameters['required'] + parameters['optional'])}"
            )
    for name in parameters["required"]:
        if name not in known:
            close = nearest(name, known)
            there = "" if close.startswith(";") else f" There are: {', '.join(known)}"
            raise RewardError(
                f"{where} asks for '{name}', which is no argument of a reward, no option and no column{close}{there}"
            )
    if parameters["takes_all"]:
        return None
    return frozenset(parameters["required"] + parameters["optional"])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
