"""Whether an artefact, loaded from its files, says what the policy said: logprobs of the policy's own answers, and
held-out problems answered by both.

The policy's completions at temperature 1 are what logprobs are compared on: greedy ones are tokens near probability 1,
where a wrong model may agree. Left out: speed, and other programs' loaders.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from reasoner.evaluate import Evaluator, SetResult, paired_gain
from reasoner.intervals import wilson
from reasoner.models.policy import Policy
from reasoner.rollout.engine import Engine, Sampling
from reasoner.rollout.hf import HfEngine
from reasoner.rollout.tokens import Decode
from reasoner.types import Prompt

SHARE = 0.25  # of what the adapter changed; one that is lost, or whose scaling is, moves logprobs by half of it or more
EXACT = 1e-3  # nats: float32 sums in another order move the mean of a small model by 1e-6, a deep one's by 1e-4
ROUNDED = 0.05  # nats: twice what bfloat16 weights and sums moved a model of 135M parameters when this was set
# Of a GGUF file: nats, how far the adapter's share may be off, and points of accuracy that may be lost. Four bits are a
# loss that is chosen: conf=tiny paid 2.1 points (95% 0.2 to 4.1), and they round with a direction: they made 121% of an
# adapter that moved a model of 20,000 parameters by 0.09 nats.
QUANTIZED = {"f16": (0.01, SHARE, 0.0), "q8_0": (0.15, SHARE, 0.0), "q4_k_m": (0.5, 2 * SHARE, 3.0)}
ERRORS = 3  # standard errors that the adapter's share may be off beside SHARE

Drawn = list[tuple[Prompt, tuple[int, ...]]]  # problems with a completion each
Score = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What one model said: verdicts by set, and the logprob of every token of the rows that are compared."""

    sets: Mapping[str, SetResult]
    logprobs: Tensor  # float32 [T], on the CPU


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model that can be asked: `score` gives the logprobs of one sequence's tokens but the first."""

    engine: Engine
    score: Score


@dataclass(frozen=True, slots=True, eq=False)
class Examiner:
    """Asks models the same."""

    evaluator: Evaluator
    sets: Mapping[str, Sequence[Prompt]]
    decode: Decode
    max_context: int
    problems: int

    def draw(self, policy: Policy) -> Drawn:
        """Each problem with a completion that the policy samples at temperature 1."""
        prompts = self._prompts()
        sampling = Sampling(1.0, self._limit, 1, self.evaluator.stop_ids, self.evaluator.config.seed)
        drawn = self.subject(policy).engine.generate(prompts, sampling, policy_step=0)
        return [(prompt, one.token_ids) for prompt, (one,) in zip(prompts, drawn, strict=True)]

    def ask(self, subject: Subject, rows: Drawn) -> Answers:
        """Greedy verdicts on every set, and logprobs of the rows."""
        found = self.evaluator.run(
            subject.engine, self.sets, policy_step=0, progress=lambda line: None, problems=self.problems
        )
        return Answers(found, logprobs_of(subject.score, rows))

    def subject(self, policy: Policy) -> Subject:
        """A policy, asked through the hf engine."""
        policy.eval()
        width = self.evaluator.config.rollout.max_sequences
        engine = HfEngine(policy, self.decode, max_context=self.max_context, max_sequences=width)
        return Subject(engine, policy.score)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return max(len(prompt.token_ids) for prompt in self._prompts()) + self._limit

    @property
    def _limit(self) -> int:
        config = self.evaluator.config
        return config.evaluate.max_completion_tokens or config.grpo.max_completion_tokens

    def _prompts(self) -> list[Prompt]:
        return [prompt for rows in self.sets.values() for prompt in rows[: self.problems]]


def logprobs_of(score: Score, rows: Drawn) -> Tensor:
    """log p of every token of the completions, one after the other: float32 [T], on the CPU."""
    return torch.cat([score([*p.token_ids, *ids])[len(p.token_ids) - 1 :].float().cpu() for p, ids in rows])


@dataclass(frozen=True, slots=True)
class Limit:
    """How far the mean logprob gap may go, in nats; None: another base was asked for, so it is only told."""

    nats: float | None
    reason: str
    share: float = SHARE  # how far the adapter's share may be from 1
    points: float = 0.0  # of greedy accuracy that may be lost

    @classmethod
    def of(cls, *, rounded: bool, effect: float | None, original: bool) -> "Limit":
        """`effect`: the mean gap of policy and base, None for a model trained whole; `rounded`: something between the
        two is bfloat16."""
        if original:
            return cls(None, "base=original is not the base that was trained: the gap is told, not limited")
        if not rounded:
            return cls(EXACT, "all is float32, where only the order of sums differs")
        if effect is None or SHARE * effect < ROUNDED:
            return cls(ROUNDED, "what bfloat16 alone moves; more is another model")
        return cls(SHARE * effect, f"a quarter of the {effect:.2g} nats by which the adapter moved the base")

    @classmethod
    def of_gguf(cls, quant: str, effect: float | None, *, rounded: bool, original: bool) -> "Limit":
        """Of a GGUF file in `quant`; `effect` as in `of`; `rounded`: the policy computes in bfloat16."""
        if original:
            return cls.of(rounded=True, effect=effect, original=True)
        least, *rest = QUANTIZED[quant]
        least = max(least, ROUNDED) if rounded else least
        if effect is None or SHARE * effect < least:
            return cls(least, f"what {quant} alone may move; more is another model", *rest)
        return cls(SHARE * effect, f"a quarter of the {effect:.2g} nats by which the adapter moved the base", *rest)


def adapter_share(base: Tensor, policy: Tensor, artefact: Tensor) -> tuple[float, float]:
    """How much of the adapter is in the artefact, 1 if all of it, and the standard error of that.

    Least squares of (artefact - base) on (policy - base) over the tokens: rounding has no direction, so this sees an
    adapter that is lost or mis-scaled where it moves less than rounding does. An adapter that moves nothing: 1, 0.
    """
    moved, found = (policy - base).double(), (artefact - base).double()
    power = float(moved @ moved)
    if power == 0:
        return 1.0, 0.0
    share = float(moved @ found) / power
    return share, float((found - share * moved).square().mean().sqrt()) / power**0.5


def compare(before: Answers, after: Answers, limit: Limit, base: Tensor | None) -> tuple[dict[str, Any], list[str]]:
    """The numbers of export.json, and what is over a limit, a line each. `base`: its logprobs, None where a model was
    trained whole.

    Accuracy fails where the artefact is worse on the same problems by more than `limit.points` and chance explain (95%,
    and McNemar's test): fewer right answers of so few problems prove nothing.
    """
    gap = (after.logprobs - before.logprobs).abs()
    mean, largest = float(gap.mean()), float(gap.max())
    wrong = []
    if not torch.isfinite(gap).all():
        wrong.append("its logprobs are not finite")
    elif limit.nats is not None and mean > limit.nats:
        wrong.append(f"its logprobs are {mean:.2g} nats from the policy's, over {limit.nats:.2g} ({limit.reason})")
    adapter: dict[str, float] = {}
    if base is not None:
        share, error = adapter_share(base, before.logprobs, after.logprobs)
        effect = float((before.logprobs - base).abs().mean())
        adapter = {"adapter_effect": effect, "adapter_share": share, "adapter_share_error": error}
        if limit.nats is not None and abs(share - 1) > limit.share + ERRORS * error:
            wrong.append(f"{share:.0%} of what the adapter changed is in it, not 100%: it is lost or scaled otherwise")
    sets: dict[str, Any] = {}
    for name, old in before.sets.items():
        change = paired_gain(old.problems, after.sets[name].problems)
        if change.is_real and change.high < -limit.points:
            wrong.append(f"on {name} it is worse than the policy: {change}")
        same = sum(a.text == b.text for a, b in zip(old.problems, after.sets[name].problems, strict=True))
        sets[name] = {
            "problems": len(old.problems),
            "policy": _accuracy(old),
            "artefact": _accuracy(after.sets[name]),
            "same_completions": same,
        }
    numbers = {
        "tokens": len(gap),
        "mean_gap": mean,
        "largest_gap": largest,
        "limit": limit.nats,
        "limit_reason": limit.reason,
        **adapter,
        "sets": sets,
    }
    return numbers, wrong


def tokens_differ(
    folder: Path, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], texts: Sequence[str]
) -> list[str]:
    """What the folder's tokenizer or generation_config says other than ours, a line each: others who load it would ask
    other tokens, or not stop where we do."""
    own = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = []
    if own(list(texts)).input_ids != tokenizer(list(texts)).input_ids:
        found.append("its tokenizer cuts the prompts into other tokens")
    if own.chat_template != tokenizer.chat_template:
        found.append("its chat template is another")
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if {*(ends if isinstance(ends, list) else [ends])} != set(stops):
        found.append(f"its generation_config stops at {ends}, not at {list(stops)}")
    return found


def _accuracy(result: SetResult) -> dict[str, float]:
    low, high = wilson(result.num_right, len(result.problems))
    return {"greedy_accuracy": result.accuracy, "greedy_low": low, "greedy_high": high}


def sentence(numbers: Mapping[str, Any]) -> str:
    """The numbers in one line."""
    told = [
        f"logprobs of {numbers['tokens']:,} tokens are {numbers['mean_gap']:.2g} nats from the policy's in the mean, "
        f"{numbers['largest_gap']:.2g} at most"
    ]
    for name, one in numbers["sets"].items():
        new, old = one["artefact"], one["policy"]
        told.append(
            f"{name} {new['greedy_accuracy']:.1%} greedy (95% {new['greedy_low']:.1%} to {new['greedy_high']:.1%}) of "
            f"{one['problems']:,} problems, the policy {old['greedy_accuracy']:.1%}"
        )
    if "adapter_share" in numbers:
        told.insert(1, f"{numbers['adapter_share']:.0%} of what the adapter changed is in it")
    return "; ".join(told)
