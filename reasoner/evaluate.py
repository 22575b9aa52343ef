"""Held-out accuracy, the same way for every row of a run: greedy with its interval, sampled, pass@k, length; and
paired gains between rows.

One code path serves base, sft, grpo and the exported artefact, so that rows differ by the weights alone.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any

from reasoner import world
from reasoner.config import Config
from reasoner.errors import GuardTripped
from reasoner.intervals import Gain, majority_at_k, pass_at_k, wilson
from reasoner.rewards.answers import after_thinking, final_answer, number, plain
from reasoner.rewards.base import Rewards
from reasoner.rollout.engine import Engine, Sampling
from reasoner.types import Completion, Prompt

AT = (8,)  # samples of which one (pass@k) or the most frequent answer (maj@k) must be right
MAX_ANSWER_CHARS = 100  # a longer text without a marked answer is prose, which has no vote
MAX_CELL_CHARS = 100  # of a column that is kept with the verdicts: a level or subject, not a question


@dataclass(frozen=True, slots=True)
class ProblemResult:
    """One problem of one row, as `eval_problems.jsonl` keeps it: greedy verdict and how many of `samples` at
    `temperature` were right.

    `problem` is a hash of the row itself, the same in every run that asks it; `columns` has the row's short cells;
    `answers` and `verdicts` are what each sample answered (None: nothing marked as an answer) and whether it was right.
    """

    id: str
    right: bool
    cut: bool
    tokens: int
    sampled_right: int
    samples: int
    text: str
    prompt: str = ""
    answer: str = ""
    problem: str = ""
    answers: tuple[str | None, ...] = ()
    verdicts: tuple[bool, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SetResult:
    """Every problem of one held-out set, answered by one set of weights."""

    name: str
    problems: tuple[ProblemResult, ...]

    @property
    def num_right(self) -> int:
        """Problems whose greedy completion is right."""
        return sum(problem.right for problem in self.problems)

    @property
    def accuracy(self) -> float:
        """Share of problems whose greedy completion is right."""
        return self.num_right / len(self.problems)

    @property
    def sampled_accuracy(self) -> float | None:
        """Mean share of right samples; None if none were drawn."""
        drawn = [problem for problem in self.problems if problem.samples]
        return sum(p.sampled_right / p.samples for p in drawn) / len(drawn) if drawn else None

    def pass_at(self, k: int) -> float | None:
        """Mean unbiased pass@k; None with fewer than k samples a problem."""
        drawn = [p for p in self.problems if p.samples >= k]
        return sum(pass_at_k(p.samples, p.sampled_right, k) for p in drawn) / len(drawn) if drawn else None

    def majority_at(self, k: int) -> float | None:
        """Mean accuracy of the most frequent answer of k samples; None with fewer samples a problem."""
        drawn = [p for p in self.problems if len(p.answers) >= k]
        return sum(majority_at_k(p.answers, p.verdicts, k) for p in drawn) / len(drawn) if drawn else None

    def row(
        self,
        name: str,
        stage_index: int,
        *,
        overlap_removed: int = 0,
        artefact: str | None = None,
        step: int | None = None,
        at: Sequence[int] = AT,
    ) -> dict[str, Any]:
        """A row of `eval.json`; accuracies and shares from 0 to 1, lengths in tokens; `step` where a stage was under
        way."""
        n = len(self.problems)
        low, high = wilson(self.num_right, n)
        return {
            "row": name,
            "stage_index": stage_index,
            **({} if step is None else {"step": step}),
            "set": self.name,
            "problems": n,
            "greedy_accuracy": self.accuracy,
            "greedy_low": low,
            "greedy_high": high,
            "sampled_accuracy": self.sampled_accuracy,
            **{f"pass_at_{k}": self.pass_at(k) for k in at},
            **{f"maj_at_{k}": self.majority_at(k) for k in at},
            "mean_tokens": sum(p.tokens for p in self.problems) / n,
            "cut_share": sum(p.cut for p in self.problems) / n,
            "overlap_removed": overlap_removed,
            "artefact": artefact,
        }

    def problem_rows(self, name: str, stage_index: int, step: int | None = None) -> list[dict[str, Any]]:
        """The lines of `eval_problems.jsonl`."""
        at = {"row": name, "stage_index": stage_index, **({} if step is None else {"step": step}), "set": self.name}
        return [{**at, **asdict(problem)} for problem in self.problems]


def paired_gain(before: Sequence[ProblemResult], after: Sequence[ProblemResult]) -> Gain:
    """The change of greedy accuracy over the problems that both have, by id; pairing leaves out what makes problems
    hard or easy for both."""
    verdicts = {problem.id: problem.right for problem in before}
    pairs = [(verdicts[problem.id], problem.right) for problem in after if problem.id in verdicts]
    return Gain.of(pairs.count((False, True)), pairs.count((True, False)), len(pairs))


def problem_hash(prompt: Prompt) -> str:
    """What names a row apart from the run that asks it: its cells and its gold answer, whatever the template, the
    model, and the set's name."""
    cells = {name: cell for name, cell in prompt.columns.items() if name != "answer_kind"}
    text = json.dumps([prompt.answer, cells], sort_keys=True, default=str)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def short_cells(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The cells that can group problems: numbers and short texts, also one level down (a task's difficulty)."""
    kept: dict[str, Any] = {}
    for name, cell in columns.items():
        if isinstance(cell, Mapping):
            inner = {key: value for key, value in short_cells(cell).items() if not isinstance(value, Mapping)}
            kept |= {name: inner} if inner else {}
        elif isinstance(cell, bool | int | float) or (isinstance(cell, str) and len(cell) <= MAX_CELL_CHARS):
            kept[name] = cell
    return kept


def answer_of(text: str, kind: object) -> str | None:
    """What a completion answers, in the form in which samples are counted; None where it marks no answer and is too
    long to be one itself."""
    said = final_answer(text)
    if said is None:
        whole = (after_thinking(text) or "").strip()
        said = whole if len(whole) <= MAX_ANSWER_CHARS else None
    if not said:
        return None
    value = number(said) if kind == "number" else None
    return plain(said)[:MAX_ANSWER_CHARS] if value is None else str(value)


class Evaluator:
    """Answers held-out sets with an engine and judges them with one part of the rewards."""

    def __init__(self, config: Config, rewards: Rewards, stop_ids: tuple[int, ...]):
        self.config = config
        self.rewards = rewards
        self.stop_ids = stop_ids
        self.part = accuracy_part(config)

    def run(
        self,
        engine: Engine,
        sets: Mapping[str, Sequence[Prompt]],
        *,
        policy_step: int,
        progress: Callable[[str], None],
        problems: int | None = None,
    ) -> dict[str, SetResult]:
        """The result of every set. Each rank answers its share of the problems; all get the whole result.

        `progress` is called with how far it is after every piece; what it raises ends the evaluation. Of each set at
        most `problems` are answered, and at most evaluate.problems. Raises GuardTripped where too many rewards failed:
        a failure is no verdict, and is counted as wrong.
        """
        results = {}
        for name, all_prompts in sets.items():
            prompts = all_prompts[: self.config.evaluate.problems][:problems]
            mine = prompts[world.rank() :: world.size()]
            found = self._answer(engine, mine, policy_step, lambda done, name=name: progress(f"{name} {done}"))
            shares = world.gather_over_ranks(found)
            by_id = {problem.id: problem for share, _ in shares for problem in share}
            self._guard(name, list(by_id.values()), [reason for _, reasons in shares for reason in reasons])
            results[name] = SetResult(name, tuple(by_id[prompt.id] for prompt in prompts))
        return results

    def _answer(
        self, engine: Engine, prompts: Sequence[Prompt], policy_step: int, progress: Callable[[str], None]
    ) -> tuple[list[ProblemResult], list[str]]:
        """The results, and why completions could not be judged, a reason each."""
        samples = self.config.evaluate.samples
        # No more at once than fit: steps that admit new ones beside those under way run without a CUDA graph.
        width = max(1, self.config.rollout.max_sequences // max(1, samples))
        results: list[ProblemResult] = []
        failures: list[str] = []
        for start in range(0, len(prompts), width):
            piece = prompts[start : start + width]
            greedy = [one for (one,) in self._generate(engine, piece, 0.0, 1, policy_step)]
            drawn: list[list[Completion]] = [[] for _ in piece]
            if samples:
                drawn = self._generate(engine, piece, self.config.evaluate.temperature, samples, policy_step)
            results += self._judge(piece, greedy, drawn, failures)
            progress(f"{len(results)}/{len(prompts)}")
        return results, failures

    def _guard(self, name: str, results: Sequence[ProblemResult], failures: Sequence[str]) -> None:
        judged, limit = sum(1 + problem.samples for problem in results), self.config.reward.max_failed_share
        if failures and len(failures) > limit * judged:
            raise GuardTripped(
                f"{len(failures) / judged:.0%} of the verdicts of '{self.part}' on the set {name} failed, more than "
                f"reward.max_failed_share={limit}: its accuracy would say nothing; the first: {failures[0]}"
            )

    def _generate(
        self, engine: Engine, prompts: Sequence[Prompt], temperature: float, num: int, policy_step: int
    ) -> list[list[Completion]]:
        limit = self.config.evaluate.max_completion_tokens or self.config.grpo.max_completion_tokens
        sampling = Sampling(temperature, limit, num, self.stop_ids, self.config.seed)
        return engine.generate(prompts, sampling, policy_step=policy_step)

    def _judge(
        self,
        prompts: Sequence[Prompt],
        greedy: Sequence[Completion],
        drawn: Sequence[Sequence[Completion]],
        failures: list[str],
    ) -> list[ProblemResult]:
        pairs = list(zip(prompts, greedy, strict=True))
        pairs += [(p, c) for p, several in zip(prompts, drawn, strict=True) for c in several]
        scores = self.rewards.score([p for p, _ in pairs], [c for _, c in pairs], only=self.part)
        failures += [reason for score in scores for reason in score.failures.values()]
        right = [score.parts.get(self.part) == 1.0 for score in scores]
        results, at = [], len(prompts)
        for i, (prompt, completion) in enumerate(zip(prompts, greedy, strict=True)):
            verdicts = tuple(right[at : at + len(drawn[i])])
            at += len(verdicts)
            kind = prompt.columns.get("answer_kind")
            results.append(
                ProblemResult(
                    id=prompt.id,
                    right=right[i],
                    cut=completion.finish_reason == "length",
                    tokens=len(completion.token_ids),
                    sampled_right=sum(verdicts),
                    samples=len(verdicts),
                    text=completion.text,
                    prompt=prompt.text,
                    answer=prompt.answer,
                    problem=problem_hash(prompt),
                    answers=tuple(answer_of(prompt.prefill + one.text, kind) for one in drawn[i]),
                    verdicts=verdicts,
                    columns=short_cells(prompt.columns),
                )
            )
        return results


def accuracy_part(config: Config) -> str:
    """The reward part that says right (1) or wrong: evaluate.accuracy, else the one named `accuracy`, else the
    first."""
    names = list(config.reward.parts)
    if config.evaluate.accuracy is not None:
        return config.evaluate.accuracy
    return "accuracy" if "accuracy" in names else names[0]
