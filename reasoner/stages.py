"""The two training stages as the pipeline sees them: rows, steps, and what one step does with some of the rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from reasoner import world
from reasoner.assembly import Parts, make_ledger
from reasoner.console import Console
from reasoner.data.drawn import Drawn
from reasoner.data.order import Draw
from reasoner.grpo.advantages import JudgedGroup
from reasoner.grpo.ledger import visits
from reasoner.grpo.trainer import GRPOTrainer
from reasoner.rollout.tokens import Decode, token_logprobs
from reasoner.run_folder import RunFolder
from reasoner.sft import SFTTrainer
from reasoner.types import Prompt
from reasoner.update import Updater


class TrainingStage(Protocol):
    """A stage that learns step by step."""

    name: str
    samples: bool  # whether its steps need the engine awake
    shown: list[dict[str, Any]]  # of the last step: rows of completions.jsonl for trackers to show
    updater: Updater
    num_rows: int
    num_steps: int
    why_not: (
        Callable[[int], str | None] | None
    )  # of a row by its number: why a draw passes over it; none: it never does

    def state(self) -> dict[str, Any]:
        """What decides the next draws and is in no other part of a checkpoint, as JSON can say it."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state()` gave."""
        ...

    def saved(self) -> None:
        """A checkpoint was just written: what is kept outside of it is written now. The main rank alone calls it."""
        ...

    def ended(self) -> list[str]:
        """What is to be said when the steps are done."""
        ...

    def step(self, draw: Draw, step: int, policy_step: int) -> dict[str, float]:
        """Learn from the next rows, one update of the policy; the step's numbers, named as in `metrics.NAMES`. Steps
        count from 1."""
        ...


def make_updater(parts: Parts, stage: str, console: Console, folder: RunFolder) -> Updater:
    """A stage's updater with an optimizer of its own: GRPO does not inherit the momentum of SFT."""
    settings = getattr(parts.config, stage)
    return Updater(
        parts.policy.trainable(),
        settings.optim,
        num_steps=settings.steps,
        tokens_per_micro_batch=settings.tokens_per_micro_batch,
        say=console.say,
        save_bad_batches_to=folder.path / "bad_batches",
    )


class SftStage:
    """Worked examples in seeded order. Its draws depend on order and cursor alone, so it has no state."""

    name = "sft"
    samples = False
    shown: list[dict[str, Any]] = []  # noqa: RUF012 - it says nothing, ever

    def __init__(self, parts: Parts, stage_index: int, console: Console, folder: RunFolder):
        self.examples = parts.task.examples
        self.num_rows = len(self.examples)
        self.why_not = self.examples.why_not if isinstance(self.examples, Drawn) else None
        self.rows_per_step = parts.config.sft.examples_per_step
        self.num_steps = parts.config.sft.steps
        self.updater = make_updater(parts, self.name, console, folder)
        self.trainer = SFTTrainer(parts.policy, self.updater)
        parts.policy.train_mode(dropout=True)

    def step(self, draw: Draw, step: int, policy_step: int) -> dict[str, float]:
        """See TrainingStage."""
        mine = draw.take(self.rows_per_step)[world.rank() :: world.size()]
        return self.trainer.step([self.examples[i] for i in mine])

    def state(self) -> dict[str, Any]:
        """See TrainingStage."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See TrainingStage."""

    def saved(self) -> None:
        """See TrainingStage."""

    def ended(self) -> list[str]:
        """See TrainingStage."""
        return []


class GrpoStage:
    """Prompts in seeded order; every completion is kept in completions.jsonl, a group is shown every few steps."""

    name = "grpo"
    samples = True

    def __init__(self, parts: Parts, stage_index: int, console: Console, folder: RunFolder):
        self.stage_index = stage_index
        self.prompts = parts.task.prompts
        self.num_rows = len(self.prompts)
        self.settings = parts.config.grpo
        self.accuracy_part = parts.evaluator.part
        self.ledger = make_ledger(parts.config)
        self.unfit = self.prompts.why_not if isinstance(self.prompts, Drawn) else None
        self.why_not = self._why_not if self.ledger else self.unfit
        self.rows_per_step = self.settings.prompts_per_step
        self.num_steps = self.settings.steps
        self.console = console
        self.folder = folder
        self.updater = make_updater(parts, self.name, console, folder)
        self.trainer = make_trainer(parts, self.updater)
        self.decode = parts.task.template.decode
        self.shown: list[dict[str, Any]] = []
        parts.policy.train_mode(dropout=False)
        if self.settings.kl_coef > 0 and not parts.policy.has_reference:
            parts.policy.freeze_reference()

    def step(self, draw: Draw, step: int, policy_step: int) -> dict[str, float]:
        """See TrainingStage."""
        mine = draw.take(self.rows_per_step)[world.rank() :: world.size()]
        report = self.trainer.step(
            [self.prompts[i] for i in mine], policy_step=policy_step, more=lambda count: self._fresh(draw, count)
        )
        if self.ledger:
            told = world.gather_over_ranks(visits(report.judged, self.accuracy_part))
            self.ledger.note(visit for share in told for visit in share)
        at = {"stage": self.name, "stage_index": self.stage_index, "step": step, "policy_step": policy_step}
        rows = [row for judged in report.judged for row in completion_rows(judged, at)]
        show_tokens(rows, report.judged, self.decode)
        self.folder.append_completions([row for share in world.gather_over_ranks(rows) for row in share])
        self.shown = rows if step % self.settings.show_every == 0 else []
        if self.shown:
            self.console.samples(step, [judged.group for judged in report.judged])
        return report.values

    def state(self) -> dict[str, Any]:
        """See TrainingStage."""
        return {"ledger": self.ledger.state()} if self.ledger else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See TrainingStage."""
        if self.ledger and "ledger" in state:
            self.ledger.load_state(state["ledger"])

    def saved(self) -> None:
        """See TrainingStage."""
        if self.ledger:
            self.ledger.write()

    def ended(self) -> list[str]:
        """See TrainingStage."""
        return self.ledger.lines() if self.ledger else []

    def _why_not(self, row: int) -> str | None:
        why = self.unfit(row) if self.unfit else None
        return why if why or not self.ledger else self.ledger.turn(self.prompts[row])

    def _fresh(self, draw: Draw, count: int) -> list[Prompt]:
        """This rank's next `count` prompts, while the other ranks take theirs."""
        counts = world.gather_over_ranks(count)
        begin = sum(counts[: world.rank()])
        return [self.prompts[i] for i in draw.take(sum(counts))[begin : begin + count]]


def make_trainer(parts: Parts, updater: Updater) -> GRPOTrainer:
    """The trainer of the GRPO stage."""
    return GRPOTrainer(
        parts.config,
        policy=parts.policy,
        engine=parts.engine,
        rewards=parts.rewards,
        updater=updater,
        stop_ids=parts.stop_ids,
        accuracy_part=parts.evaluator.part,
        loss=parts.loss,
    )


STAGES = {"sft": SftStage, "grpo": GrpoStage}


def completion_rows(judged: JudgedGroup, at: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of completions.jsonl of one group: what was asked, said and scored, and all else that its rewards saw
    but token ids, so that they can be asked again."""
    prompt = judged.group.prompt
    triples = zip(judged.group.completions, judged.group.scores, judged.advantages, strict=True)
    return [
        {
            **at,
            "id": prompt.id,
            "prompt": prompt.text,
            "messages": prompt.messages,
            "prefill": prompt.prefill,
            "answer": prompt.answer,
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "tokens": len(completion.token_ids),
            "reward": None if score.failed else score.total,
            "parts": score.parts,
            "failures": score.failures,
            "advantage": advantage,
            "columns": prompt.columns,
        }
        for completion, score, advantage in triples
    ]


def show_tokens(rows: list[dict[str, Any]], judged: Sequence[JudgedGroup], decode: Decode) -> None:
    """Give two of the step's rows `token_logprobs`: the best and the worst completion of the group whose rewards differ
    most.

    Only two, as tokens with their logprobs take twice the bytes of the text. `rows` are those of `judged`, in order.
    """
    completions = [completion for one in judged for completion in one.group.completions]
    spans, start = [], 0
    for one in judged:
        totals = [score.total for score in one.group.scores]
        low, high = min(totals), max(totals)
        spans.append((high - low, start + totals.index(high), start + totals.index(low)))
        start += len(totals)
    _, best, worst = max(spans, key=lambda span: span[0], default=(0, None, None))
    for index in dict.fromkeys(i for i in (best, worst) if i is not None):
        found = token_logprobs(completions[index], decode)
        if found is not None:
            rows[index]["token_logprobs"] = found
