"""Held-out accuracy, the same way for every row of a run: greedy with its interval, sampled, pass@k, length; and
paired gains between rows.

One code path serves base, sft, grpo and the exported artefact, so that rows differ by the weights alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reasoner import world
from reasoner.config import Config
from reasoner.rewards.base import Rewards
from reasoner.rollout.engine import Engine, Sampling
from reasoner.types import Completion, Prompt

REFILLS = 8  # rounds of sequences in one call, where the engine takes the next as one ends
Z95 = 1.959963984540054
PASS_AT = 8


@dataclass(frozen=True, slots=True)
class ProblemResult:
    """One problem of one row, as `eval_problems.jsonl` keeps it: greedy verdict and how many of `samples` at
    `temperature` were right."""

    id: str
    right: bool
    cut: bool
    tokens: int
    sampled_right: int
    samples: int
    text: str


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
    def sampled_accuracy(self) -> float | None:
        """Mean share of right samples; None if none were drawn."""
        drawn = [problem for problem in self.problems if problem.samples]
        return sum(p.sampled_right / p.samples for p in drawn) / len(drawn) if drawn else None

    @property
    def pass_at_8(self) -> float | None:
        """Mean unbiased pass@8; None with fewer than 8 samples a problem."""
        drawn = [p for p in self.problems if p.samples >= PASS_AT]
        return sum(pass_at_k(p.samples, p.sampled_right, PASS_AT) for p in drawn) / len(drawn) if drawn else None

    def row(self, name: str, stage_index: int, *, overlap_removed: int, artefact: str | None) -> dict[str, Any]:
        """A row of `eval.json`; accuracies and shares from 0 to 1, lengths in tokens."""
        n = len(self.problems)
        low, high = wilson(self.num_right, n)
        return {
            "row": name,
            "stage_index": stage_index,
            "set": self.name,
            "problems": n,
            "greedy_accuracy": self.num_right / n,
            "greedy_low": low,
            "greedy_high": high,
            "sampled_accuracy": self.sampled_accuracy,
            "pass_at_8": self.pass_at_8,
            "mean_tokens": sum(p.tokens for p in self.problems) / n,
            "cut_share": sum(p.cut for p in self.problems) / n,
            "overlap_removed": overlap_removed,
            "artefact": artefact,
        }

    def problem_rows(self, name: str, stage_index: int) -> list[dict[str, Any]]:
        """The lines of `eval_problems.jsonl`."""
        return [{"row": name, "stage_index": stage_index, "set": self.name, **asdict(p)} for p in self.problems]


@dataclass(frozen=True, slots=True)
class Gain:
    """The change of greedy accuracy between two rows on the same problems, in points, with its 95% interval."""

    points: float
    low: float
    high: float
    problems: int

    def __str__(self) -> str:
        verdict = "" if self.low > 0 or self.high < 0 else " (can't tell from 0)"
        return f"{self.points:+.1f} points, 95% {self.low:.1f} to {self.high:.1f}, {self.problems:,} problems{verdict}"


def wilson(num_right: int, num_problems: int) -> tuple[float, float]:
    """95% interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927): right also near 0 and 1 and for few problems."""
    if num_problems == 0:
        return 0.0, 1.0
    share, z2 = num_right / num_problems, Z95**2 / num_problems
    centre = (share + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(share * (1 - share) / num_problems + z2 / (4 * num_problems)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased chance that one of k samples is right: 1 - C(n - c, k) / C(n, k), arXiv:2107.03374 eq. 1."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def paired_gain(before: Sequence[ProblemResult], after: Sequence[ProblemResult]) -> Gain:
    """Mean and 95% interval of the difference on each problem; pairing leaves out what makes problems hard or easy
    for both."""
    verdicts = {problem.id: problem.right for problem in before}
    differences = [float(p.right) - float(verdicts[p.id]) for p in after if p.id in verdicts]
    n = len(differences)
    assert n > 1, "two rows of one run share their problems"
    mean = sum(differences) / n
    half = Z95 * math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return Gain(100 * mean, 100 * (mean - half), 100 * (mean + half), n)


class Evaluator:
    """Answers held-out sets with an engine and judges them with one part of the rewards."""

    def __init__(self, config: Config, rewards: Rewards, stop_ids: tuple[int, ...]):
        self.config = config
        self.rewards = rewards
        self.stop_ids = stop_ids
        self.part = accuracy_part(config)

    def run(
        self, engine: Engine, sets: Mapping[str, Sequence[Prompt]], *, policy_step: int, progress: Callable[[str], None]
    ) -> dict[str, SetResult]:
        """The result of every set. Each rank answers its share of the problems; all get the whole result.

        `progress` is called with how far it is after every piece; what it raises ends the evaluation.
        """
        results = {}
        for name, all_prompts in sets.items():
            prompts = all_prompts[: self.config.evaluate.problems]
            mine = prompts[world.rank() :: world.size()]
            found = self._answer(engine, mine, policy_step, lambda done, name=name: progress(f"{name} {done}"))
            by_id = {problem.id: problem for share in world.gather_over_ranks(found) for problem in share}
            results[name] = SetResult(name, tuple(by_id[prompt.id] for prompt in prompts))
        return results

    def _answer(
        self, engine: Engine, prompts: Sequence[Prompt], policy_step: int, progress: Callable[[str], None]
    ) -> list[ProblemResult]:
        samples = self.config.evaluate.samples
        at_once = self.config.rollout.max_sequences * (REFILLS if engine.capabilities.continuous else 1)
        width = max(1, at_once // max(1, samples))
        results: list[ProblemResult] = []
        for start in range(0, len(prompts), width):
            piece = prompts[start : start + width]
            greedy = [one for (one,) in self._generate(engine, piece, 0.0, 1, policy_step)]
            drawn: list[list[Completion]] = [[] for _ in piece]
            if samples:
                drawn = self._generate(engine, piece, self.config.evaluate.temperature, samples, policy_step)
            results += self._judge(piece, greedy, drawn)
            progress(f"{len(results)}/{len(prompts)}")
        return results

    def _generate(
        self, engine: Engine, prompts: Sequence[Prompt], temperature: float, num: int, policy_step: int
    ) -> list[list[Completion]]:
        limit = self.config.evaluate.max_completion_tokens or self.config.grpo.max_completion_tokens
        sampling = Sampling(temperature, limit, num, self.stop_ids, self.config.seed)
        return engine.generate(prompts, sampling, policy_step=policy_step)

    def _judge(
        self, prompts: Sequence[Prompt], greedy: Sequence[Completion], drawn: Sequence[Sequence[Completion]]
    ) -> list[ProblemResult]:
        pairs = list(zip(prompts, greedy, strict=True))
        pairs += [(p, c) for p, several in zip(prompts, drawn, strict=True) for c in several]
        scores = self.rewards.score([p for p, _ in pairs], [c for _, c in pairs], only=self.part)
        right = [score.parts.get(self.part) == 1.0 for score in scores]
        results, at = [], len(prompts)
        for i, (prompt, completion) in enumerate(zip(prompts, greedy, strict=True)):
            num = len(drawn[i])
            cut = completion.finish_reason == "length"
            tokens = len(completion.token_ids)
            results.append(
                ProblemResult(prompt.id, right[i], cut, tokens, sum(right[at : at + num]), num, completion.text)
            )
            at += num
        return results


def accuracy_part(config: Config) -> str:
    """The reward part that says right (1) or wrong: evaluate.accuracy, else the one named `accuracy`, else the
    first."""
    names = list(config.reward.parts)
    if config.evaluate.accuracy is not None:
        return config.evaluate.accuracy
    return "accuracy" if "accuracy" in names else names[0]
