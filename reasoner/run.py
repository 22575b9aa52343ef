"""A run that has all its parts: it goes through the stages in order, keeps checkpoints, and says what each stage
gained.

It knows of files and resuming; the stages know of learning. Left out: making the parts (assembly.py) and what ends a
run (pipeline.py).
"""

import time
from collections.abc import Mapping
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
from reasoner.data.order import Draw, Order
from reasoner.errors import Interrupted
from reasoner.metrics import step_row
from reasoner.models.loading import load_saved
from reasoner.models.sources import context_limit
from reasoner.optimizer_state import load_optimizer, optimizer_tensors
from reasoner.results import Results
from reasoner.rollout.choice import make_engine
from reasoner.rollout.engine import Engine, asleep
from reasoner.run_folder import RunFolder
from reasoner.stages import STAGES, TrainingStage
from reasoner.tracking.base import Tracker


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
    trackers: list[Tracker]
    results: Results
    stage_seconds: list[dict[str, Any]]  # grows by a row a finished stage
    policy_step: int = 0  # updates of the policy so far, over all stages

    def go_through(self, saved: Saved | None) -> None:
        """Every stage from the start, or from a checkpoint on."""
        first = 0
        if saved is not None:
            first, self.policy_step = saved.progress.stage_index, saved.progress.policy_step
            prefix = "policy."
            self.parts.policy.load_state(
                {name.removeprefix(prefix): tensor for name, tensor in saved.tensors.items() if name.startswith(prefix)}
            )
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
        step, cursor = 0, 0
        if saved is None:
            self._save(stage, Progress(stage_index, name, step, self.policy_step, cursor))
        else:
            step, cursor = saved.progress.step, saved.progress.cursor
            load_optimizer(stage.updater.optimizer, saved.tensors, saved.state["optimizer"])
            stage.updater.load_state(saved.state["updater"])
        draw = Draw(Order(stage.num_rows, self.parts.config.seed), cursor)
        engine = self.parts.engine
        if stage.samples:
            engine.load_adapter(self.parts.policy.trainable(), self.policy_step)
        with nullcontext() if stage.samples else asleep(engine):
            self._learn(stage, stage_index, step, draw)
        engine.load_adapter(self.parts.policy.trainable(), self.policy_step)
        self.parts.policy.eval()

    def _learn(self, stage: TrainingStage, stage_index: int, step: int, draw: Draw) -> None:
        """Steps from `step` to the stage's last, with their rows, checkpoints and signals."""
        name = stage.name
        while step < stage.num_steps:
            torch.manual_seed(derived_seed(self.parts.config.seed, stage_index, step))
            values = stage.step(draw, step + 1, self.policy_step)
            step, self.policy_step = step + 1, self.policy_step + 1
            self._tell(stage, step_row(name, stage_index, step, self.policy_step, values))
            signal = signals.agreed()
            if step % self.parts.config.checkpoint.every == 0 or step == stage.num_steps or signal:
                self._save(stage, Progress(stage_index, name, step, self.policy_step, draw.cursor))
            if signal:
                raise Interrupted(signal, f"interrupted at {name} step {step}; {self.how_to_go_on()}")

    def _tell(self, stage: TrainingStage, row: dict[str, Any]) -> None:
        self.folder.append_metrics(row)
        self.console.progress(row, stage.num_steps)
        for tracker in self.trackers:
            tracker.log(stage.name, row["step"], row)

    def _save(self, stage: TrainingStage, progress: Progress) -> None:
        if world.is_main():
            tensors, optimizer = optimizer_tensors(stage.updater.optimizer)
            tensors |= {f"policy.{name}": tensor for name, tensor in self.parts.policy.state().items()}
            state = {"optimizer": optimizer, "updater": stage.updater.state()}
            checkpoint.save(self.folder.path, progress, tensors, state, keep=self.parts.config.checkpoint.keep)
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
        found = self.parts.evaluator.run(
            engine,
            self.parts.task.sets,
            policy_step=self.policy_step,
            progress=lambda line: self._evaluated(row, line),
        )
        for name, result in found.items():
            removed = self.parts.task.overlap_removed.get(name, 0)
            told = str(artefact) if artefact else None
            self.results.rows.append(result.row(row, stage_index, overlap_removed=removed, artefact=told))
            self.folder.append_eval_problems(result.problem_rows(row, stage_index))
            accuracy, n = result.num_right / len(result.problems), len(result.problems)
            self.console.status(f"evaluate {row} · {name} {accuracy:.1%} greedy of {n:,} problems", last=True)
        self.results.evaluations.append((row, found))
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
        self.console.say(f"saved: {artefact}")


def derived_seed(seed: int, stage_index: int, step: int) -> int:
    """A seed for torch's global generator that depends on where the run stands alone, so that no generator's state
    has to be kept."""
    return int.from_bytes(blake2b(f"{seed}/{stage_index}/{step}".encode(), digest_size=7).digest())
