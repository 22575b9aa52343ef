"""Scores for completions: named reward functions, each called by parameter name in a worker process, summed with their
weights.

A reward is a plain function `score(completion, answer, **columns) -> float | None`, or one of the other kinds in
signatures.py. Each completion is scored on its own, so order, batch and number of workers change nothing. What fails
(an exception, NaN, a wrong type, a hang) is a failure in the record, never a 0. Left out: rewards that compare the
completions of a group.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from reasoner.config import Reward, RewardPart, checked
from reasoner.errors import RewardError
from reasoner.rewards.pool import Call, Failure, Named, Outcome, Pool, Setup
from reasoner.rewards.signatures import OWN_NAMES as OWN_NAMES  # what data must not name a column
from reasoner.rewards.signatures import Signature, signature_of
from reasoner.rewards.sources import BUILTINS, JUDGE, parameters_of, source_of
from reasoner.types import Completion, Prompt, Score

if TYPE_CHECKING:
    from reasoner.rewards.judge import Judge

MAX_DEFAULT_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Part:
    """One named reward, ready to be called."""

    name: str
    weight: float
    timeout_s: float
    options: Mapping[str, Any]
    signature: Signature
    imports: Mapping[str, str]
    judge: "Judge | None" = None  # what answers its calls, where that is not a worker

    def call(self, prompt: Prompt, completion: Completion) -> Call:
        """The call that scores this completion."""
        values = self.signature.arguments(prompt, completion, self.options)
        slow = self.imports.get(str(values.get("answer_kind")))
        return Call(self.name, values, self.timeout_s, (slow,) if slow else (), self.signature.returns)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A completion that is being judged."""

    prompt: Prompt
    completion: Completion
    parts: tuple[Part, ...]
    outcomes: tuple[Future[Outcome], ...]

    def score(self) -> Score:
        """Its Score, once every part has ended."""
        return _sum(self.parts, [outcome.result() for outcome in self.outcomes])


@dataclass(slots=True)
class Rewards:
    """The rewards of a run. Workers start with the first score; `close()` (or `with`) ends them."""

    parts: tuple[Part, ...]
    setup: Setup
    workers: int
    notices: tuple[str, ...] = ()  # what is to be said of them when a run starts
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
        waiting = [self.submit(p, c, only=only) for p, c in zip(prompts, completions, strict=True)]
        return [one.score() for one in waiting]

    def submit(self, prompt: Prompt, completion: Completion, *, only: str | None = None) -> Waiting:
        """The Score-to-be of one completion, which is being judged from now on."""
        parts = tuple(part for part in self.parts if only in (None, part.name))
        return Waiting(
            prompt, completion, parts, tuple(self._submit(part, part.call(prompt, completion)) for part in parts)
        )

    def collect(self, step: Sequence[Waiting]) -> list[Score]:
        """The Scores of what a step of training submitted, in its order."""
        return [one.score() for one in step]

    def _submit(self, part: Part, call: Call) -> Future[Outcome]:
        if part.judge:
            return part.judge.submit(call)
        if self._pool is None:
            self._pool = Pool(self.setup, self.workers)
        return self._pool.submit(call)

    def costs(self) -> list[str]:
        """A line on each judge: what it has asked so far."""
        return [f"the judge of reward part '{part.name}': {part.judge.cost}" for part in self.parts if part.judge]

    def close(self) -> None:
        """End the worker processes and the judges; a later score starts new ones."""
        for part in self.parts:
            if part.judge:
                part.judge.close()
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
    """Total = sum over the parts that apply and did not fail of weight x part; what came with a part stands beside it
    as `part.name` and adds nothing.
    """
    total, values, failures = 0.0, {}, {}
    for part, outcome in zip(parts, outcomes, strict=True):
        if isinstance(outcome, Named):
            values |= {f"{part.name}.{name}": number for name, number in outcome.numbers.items()}
            outcome = outcome.value
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
        if not _is_judge(part, functions)
    }
    # Appended: put first, a user's `math.py` or `dis.py` would stand in for the standard library's.
    folders = [str(Path(source[1]).parent) for source in sources.values() if source[0] == "file"]
    sys_path = dict.fromkeys([*sys.path, *folders, str(base_dir.resolve()), str(Path.cwd())])
    setup = Setup(sources, tuple(sys_path))
    parameters = parameters_of(setup, names) if sources else {}
    parts, notices = [], []
    for name, part in reward.parts.items():
        if _is_judge(part, functions):
            parts.append(_judged(name, part, columns))
            continue
        builtin = BUILTINS.get(part.fn) if part.fn not in (functions or {}) else None
        signature = signature_of(names[name], parameters[name], part.options, columns)
        imports = builtin.imports if builtin else {}
        options = part.options
        if builtin and builtin.prepares:
            further, notice = builtin.prepare(f"reward.parts.{name}", options, part.timeout_s)
            options = {**options, **further}
            notices.append(notice)
        parts.append(Part(name, part.weight, part.timeout_s, options, signature, imports))
    workers = reward.workers or min(MAX_DEFAULT_WORKERS, _cores())
    return Rewards(tuple(parts), setup, workers, tuple(notices))


def _is_judge(part: RewardPart, functions: Mapping[str, Callable[..., Any]] | None) -> bool:
    return part.fn == JUDGE and part.fn not in (functions or {})


def _judged(name: str, part: RewardPart, columns: set[str]) -> Part:
    """A part that a judge answers. Raises RewardError or ConfigError for what is wrong with its options."""
    from reasoner.rewards.judge import Judge, JudgeOptions  # with a client of HTTP, which other rewards don't need

    where = f"reward.parts.{name}.options"
    judge = Judge(where, checked(JudgeOptions, part.options, where))
    judge.rubric.check([*OWN_NAMES, *sorted(columns - set(OWN_NAMES))], f"{where}.rubric")
    names = judge.rubric.names
    signature = Signature("ours", named=names, wanted=names, messages=False)
    return Part(name, part.weight, part.timeout_s, {}, signature, {}, judge)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
