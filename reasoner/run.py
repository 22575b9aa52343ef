"""A run that has all its parts: it goes through the stages in order, keeps checkpoints, and says what each stage
gained.

It knows of files and resuming; the stages know of learning. Left out: making the parts (assembly.py) and what ends a
run (pipeline.py).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasoner import checkpoint, signals, world
from reasoner.assembly import NO_CONTEXT_LIMIT, Parts
from reasoner.checkpoint import Progress
from reasoner.console import Console
from reasoner.data.drawn import UNFIT
from reasoner.data.order import Draw, Order
from reasoner.data.task import COUNTS, VALIDATION
from reasoner.errors import GuardTripped, Interrupted
from reasoner.evaluate import SetResult
from reasoner.grpo.ledger import RESTING
from reasoner.metrics import step_row
from reasoner.models.loading import load_saved
from reasoner.models.sources import context_limit
from reasoner.optimizer_state import load_optimizer, optimizer_tensors
from reasoner.results import Best, Results
from reasoner.rollout.choice import make_engine
from reasoner.rollout.engine import Engine, asleep
from reasoner.run_folder import CHECKPOINTS, RunFolder
from reasoner.stages import STAGES, TrainingStage
from reasoner.tracking.base import Tracker
from reasoner.types import Prompt
from reasoner.words import plural

LEFT_OUT = {**COUNTS, UNFIT: "that the template or the tokenizer can't carry", RESTING: "resting"}


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """A checkpoint that was read: where it stood, its tensors by name, and its JSON."""

    progress: Progress
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


@dataclass(slots=True, eq=False)
class Run:
    """One run under way."""

    parts: Parts
    folder: RunFolder
    console: Console
    trackers: Sequence[Tracker]
    results: Results
    stage_seconds: list[dict[str, Any]]  # grows by a row a finished stage
    callback: Callable[[Mapping[str, Any]], object] | None = None  # gets each row of metrics.jsonl
    policy_step: int = 0  # updates of the policy so far, over all stages

    def go_through(self, saved: Saved | None) -> None:
        """Every stage from the start, or from a checkpoint on."""
        first = 0
        if saved is not None:
            first, self.policy_step = saved.progress.stage_index, saved.progress.policy_step
            self.parts.policy.load_state(checkpoint.policy_of(saved.tensors))
        weights = self.parts.policy.weights
        checksum = weights.checksum() if weights else None
        stages = list(enumerate(self.parts.config.stages))
        for stage_index, stage in stages[first:]:
            began = time.monotonic()
            if stage in STAGES:
                self._train(stage_index, stage, saved if saved and stage_index == first else None)
            elif stage == "evaluate":
                self._evaluate(stage_index, self._row_name(stage_index), self.parts.engine)
            else:
                self._export(stage_index)
            seconds = time.monotonic() - began
            self.stage_seconds.append({"stage": stage, "stage_index": stage_index, "seconds": seconds})
        assert weights is None or weights.checksum() == checksum, "something wrote into the frozen base"

    def _train(self, stage_index: int, name: str, saved: Saved | None) -> None:
        stage = STAGES[name](self.parts, stage_index, self.console, self.folder)
        step, cursor, left_out = 0, 0, {}
        if saved is not None:
            step, cursor = saved.progress.step, saved.progress.cursor
            left_out = saved.state.get("left_out", {})  # runs of earlier versions have none
            load_optimizer(stage.updater.optimizer, saved.tensors, saved.state["optimizer"])
            stage.updater.load_state(saved.state["updater"])
            stage.load_state(saved.state.get("stage", {}))
        draw = Draw(Order(stage.num_rows, self.parts.config.seed), cursor, stage.why_not, left_out)
        if saved is None:
            self._save(stage, Progress(stage_index, name, step, self.policy_step, cursor), draw)
        engine = self.parts.engine
        if stage.samples:
            engine.load_adapter(self.parts.policy.trainable(), self.policy_step)
        with nullcontext() if stage.samples else asleep(engine):
            self._learn(stage, stage_index, step, draw)
        if draw.left_out:
            gone = ", ".join(f"{count:,} {LEFT_OUT[why]}" for why, count in draw.left_out.items())
            self.console.say(f"{name}: of {draw.cursor:,} rows drawn {draw.left_out.total():,} were left out ({gone})")
        for line in stage.ended():
            self.console.say(line)
        self._take_best(stage_index)
        engine.load_adapter(self.parts.policy.trainable(), self.policy_step)
        self.parts.policy.eval()

    def _learn(self, stage: TrainingStage, stage_index: int, step: int, draw: Draw) -> None:
        """Steps from `step` to the stage's last, with their rows, checkpoints and signals."""
        name = stage.name
        if self._is_measured(stage, step):
            self._measure(stage, stage_index, step)
        while step < stage.num_steps:
            torch.manual_seed(derived_seed(self.parts.config.seed, stage_index, step))
            values = stage.step(draw, step + 1, self.policy_step)
            step, self.policy_step = step + 1, self.policy_step + 1
            row = step_row(name, stage_index, step, self.policy_step, values)
            self._tell(stage, row)
            stopped = self._called_back(row)
            signal = signals.agreed()
            measured = self._is_measured(stage, step)
            if (
                step % self.parts.config.checkpoint.every == 0
                or step == stage.num_steps
                or measured
                or signal
                or stopped
            ):
                self._save(stage, Progress(stage_index, name, step, self.policy_step, draw.cursor), draw)
            if stopped:
                raise stopped
            if signal:
                raise Interrupted(signal, f"interrupted at {name} step {step}; {self.how_to_go_on()}")
            if measured:
                self._measure(stage, stage_index, step)

    def _called_back(self, row: Mapping[str, Any]) -> GuardTripped | None:
        """What the callback stops the run by, once this step is saved."""
        try:
            if self.callback:
                self.callback(row)
        except GuardTripped as stopped:
            return stopped
        return None

    def _is_measured(self, stage: TrainingStage, step: int) -> bool:
        """Whether the checkpoint of this step takes part in the choice of the best: also the first, which no step of
        GRPO may have bettered, and the last."""
        every = self.parts.config.grpo.eval_every if stage.name == "grpo" else None
        return every is not None and (step % every == 0 or step == stage.num_steps)

    def _measure(self, stage: TrainingStage, stage_index: int, step: int) -> None:
        """Held-out rows of a checkpoint that was just saved, and whether it is the best so far."""
        began, row = time.monotonic(), Progress(stage_index, stage.name, step, 0, 0).name
        limit = self.parts.config.grpo.eval_problems
        chooses = self.parts.task.validation
        found = self._answers(row, {VALIDATION: chooses} if chooses else self.parts.task.sets, limit)
        self._keep(row, stage_index, found, step=step)
        best = self.results.best(stage_index)
        assert best is not None
        scores = " · ".join(f"{name} {result.accuracy:.1%}" for name, result in found.items())
        place = "the best so far" if best.step == step else f"the best is step {best.step} with {best.score:.1%}"
        self.console.say(f"held out at {stage.name} step {step}: {scores} greedy, {place}; {_seconds(began)}")

    def _take_best(self, stage_index: int) -> None:
        """Put back the weights of the best checkpoint, so that everything after the stage has them."""
        best = self.results.best(stage_index)
        if best is None:
            return
        progress, tensors, _ = checkpoint.load(self.folder.path / CHECKPOINTS / best.name)
        self.parts.policy.load_state(checkpoint.policy_of(tensors))
        self.policy_step = progress.policy_step
        self.console.say(f"going on with {best}")

    def _best(self) -> Best | None:
        """The checkpoint whose weights the policy has, where one was chosen."""
        trained = [index for index, stage in enumerate(self.parts.config.stages) if stage in STAGES]
        return self.results.best(trained[-1]) if trained else None

    def _tell(self, stage: TrainingStage, row: dict[str, Any]) -> None:
        self.folder.append_metrics(row)
        self.console.progress(row, stage.num_steps)
        for tracker in self.trackers:
            tracker.log(stage.name, row["step"], row)
            if stage.shown and self.parts.config.track_completions:
                tracker.table(stage.name, row["step"], stage.shown)

    def _save(self, stage: TrainingStage, progress: Progress, draw: Draw) -> None:
        if world.is_main():
            tensors, optimizer = optimizer_tensors(stage.updater.optimizer)
            tensors |= {f"{checkpoint.POLICY}{name}": tensor for name, tensor in self.parts.policy.state().items()}
            state = {"optimizer": optimizer, "updater": stage.updater.state(), "stage": stage.state()}
            state["left_out"] = dict(draw.left_out)
            best = self.results.best(progress.stage_index)
            keep = self.parts.config.checkpoint.keep
            checkpoint.save(self.folder.path, progress, tensors, state, keep=keep, best=best.name if best else None)
            stage.saved()
        world.barrier()

    def _evaluated(self, row: str, line: str) -> None:
        self.console.status(f"evaluate {row} · {line}")
        # This process's own: ranks have unequal shares, so they can't agree here. torchrun signals all of them.
        signal = signals.requested()
        if signal:
            raise Interrupted(signal, f"interrupted; {self.how_to_go_on()}")

    def how_to_go_on(self) -> str:
        """What to type, or that there is nothing to go on from."""
        if checkpoint.newest_whole(self.folder.path) is None:
            return "nothing was trained yet, so there is nothing to go on from"
        return f"go on with: python -m reasoner resume={self.folder.path}"

    def _row_name(self, stage_index: int) -> str:
        trained = [stage for stage in self.parts.config.stages[:stage_index] if stage in STAGES]
        return trained[-1] if trained else "base"

    def _evaluate(self, stage_index: int, row: str, engine: Engine, artefact: Path | None = None) -> None:
        found = self._answers(row, self.parts.task.sets, None, engine)
        self._keep(row, stage_index, found, artefact=artefact)
        for name, result in found.items():
            problems = plural(len(result.problems), "problem")
            self.console.status(f"evaluate {row} · {name} {result.accuracy:.1%} greedy of {problems}", last=True)
        self.results.evaluations.append((row, found))

    def _answers(
        self, row: str, sets: Mapping[str, Sequence[Prompt]], limit: int | None, engine: Engine | None = None
    ) -> dict[str, SetResult]:
        return self.parts.evaluator.run(
            engine or self.parts.engine,
            sets,
            policy_step=self.policy_step,
            progress=lambda line: self._evaluated(row, line),
            problems=limit,
        )

    def _keep(
        self,
        row: str,
        stage_index: int,
        found: Mapping[str, SetResult],
        *,
        artefact: Path | None = None,
        step: int | None = None,
    ) -> None:
        """Write what was measured into eval_problems.jsonl and eval.json."""
        for name, result in found.items():
            removed = self.parts.task.overlap_removed.get(name, 0)
            told = str(artefact) if artefact else None
            self.results.rows.append(result.row(row, stage_index, overlap_removed=removed, artefact=told, step=step))
            self.folder.append_eval_problems(result.problem_rows(row, stage_index, step))
        self.folder.write_eval(self.results.rows)

    def _export(self, stage_index: int) -> None:
        """Save what was trained, load it again, and measure that."""
        config = self.parts.config
        artefact = self.folder.path / ("adapter" if config.model.lora else "model")
        if world.is_main():
            self.parts.policy.save(artefact, self.parts.tokenizer, stop_ids=self.parts.stop_ids)
        world.barrier()
        if config.model.lora:
            self.parts.policy.reload(artefact)
            self.parts.engine.load_adapter(self.parts.policy.trainable(), self.policy_step)
            self._evaluate(stage_index, "export", self.parts.engine, artefact)
        else:
            policy = load_saved(artefact, config.model, self.parts.tokenizer)
            decode = self.parts.task.template.decode
            limit = context_limit(config.model) or NO_CONTEXT_LIMIT
            engine = make_engine("hf", config, policy, decode, max_context=limit, kv_bytes=0)
            self._evaluate(stage_index, "export", engine, artefact)
            engine.close()
        best = self._best()
        self.console.say(f"saved: {artefact}" + (f", which is {best}" if best else ""))


def _seconds(began: float) -> str:
    return f"{time.monotonic() - began:.1f} s"


def derived_seed(seed: int, stage_index: int, step: int) -> int:
    """A seed for torch's global generator that depends on where the run stands alone, so that no generator's state
    has to be kept."""
    return int.from_bytes(blake2b(f"{seed}/{stage_index}/{step}".encode(), digest_size=7).digest())
