"""GRPO steps of this project one by one, for benchmarks that time them: the same parts, trainer and order as a run's,
without its stages, files and checkpoints.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from reasoner.assembly import Parts
from reasoner.console import Console
from reasoner.data.order import Order
from reasoner.grpo.trainer import GRPOTrainer, StepReport
from reasoner.run_folder import RunFolder
from reasoner.stages import make_trainer, make_updater


@dataclass(slots=True)
class Practice:
    """A GRPO stage, to be stepped by hand."""

    parts: Parts
    trainer: GRPOTrainer
    taken: int = 0  # steps

    def step(self) -> StepReport:
        """The next step, on the prompts that a run would take."""
        settings = self.parts.config.grpo
        order = Order(len(self.parts.task.prompts), self.parts.config.seed)
        numbers = order.take(self.taken * settings.prompts_per_step, settings.prompts_per_step)
        report = self.trainer.step([self.parts.task.prompts[i] for i in numbers], policy_step=self.taken)
        self.taken += 1
        return report

    def ignore_stops(self) -> None:
        """From now on every completion is as long as it may be."""
        self.trainer.sampling = replace(self.trainer.sampling, stop_ids=())


@contextmanager
def practice(make_parts: Callable[[Console], Parts]) -> Iterator[Practice]:
    """The GRPO stage of these parts, ready for its first step."""
    with (
        tempfile.TemporaryDirectory(prefix="practice-") as work,
        RunFolder.open(Path(work) / "run") as folder,
        Console() as console,
    ):
        parts = make_parts(console)
        try:
            updater = make_updater(parts, "grpo", console, folder)
            trainer = make_trainer(parts, updater)
            parts.policy.train_mode(dropout=False)
            parts.engine.load_adapter(parts.policy.trainable(), 0)
            yield Practice(parts, trainer)
        finally:
            parts.engine.close()
            parts.rewards.close()
