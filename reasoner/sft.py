"""The warm-up: learn from worked examples, through the same logprob op and update loop as GRPO.

Prompt ids and completion ids were made apart (data/examples.py); prompts are masked by position; the loss is the sum
over the step's trained
tokens of -logprob, divided by their count, whatever the split. Left out: a validation loss, since held-out accuracy
is measured instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reasoner import world
from reasoner.grpo.batch import PackedBatch, trained_sequences
from reasoner.grpo.losses import LossInputs, Nll
from reasoner.metrics import Stopwatch, Sums, peak_gib
from reasoner.models.attention import Layout
from reasoner.models.policy import Policy
from reasoner.types import Example
from reasoner.update import LossOutput, StepCounts, Updater


@dataclass(frozen=True, slots=True, eq=False)
class ExampleBatch(PackedBatch):
    """Packed worked examples with the counts of the whole step, over all ranks."""

    counts: StepCounts


def collate_examples(examples: Sequence[Example], device: torch.device | str | None = None) -> ExampleBatch:
    """The examples side by side; completion tokens are trained, the stop id among them. Every rank has to call."""
    ids = [id for example in examples for id in (*example.prompt.token_ids, *example.completion_ids)]
    mask = [
        trained
        for example in examples
        for trained in (False,) * len(example.prompt.token_ids) + (True,) * len(example.completion_ids)
    ]
    shares = world.gather_over_ranks((sum(mask), len(examples)))
    tokens, sequences = (sum(share) for share in zip(*shares, strict=True))
    return ExampleBatch(
        token_ids=torch.tensor(ids, dtype=torch.int64).to(device),
        layout=Layout.of([len(e.prompt.token_ids) + len(e.completion_ids) for e in examples], device),
        completion_mask=torch.tensor(mask, dtype=torch.bool).to(device),
        counts=StepCounts(tokens=tokens, sequences=sequences, groups=0, constant=float(sequences)),
    )


class SFTTrainer:
    """Supervised steps on worked examples, at temperature 1."""

    def __init__(self, policy: Policy, updater: Updater):
        self.policy = policy
        self.updater = updater
        self.loss = Nll()

    def step(self, examples: Sequence[Example]) -> dict[str, float]:
        """One update from this rank's examples; the step's numbers over all ranks, named as in `metrics.NAMES`."""
        watch = Stopwatch()
        with watch.measure("update_s"):
            batch = collate_examples(examples, self.policy.device)
            update = self.updater.run(batch, self._objective)
        sums = Sums()
        sums.count("packed", batch.token_ids.numel())
        step_s = watch.elapsed_s()
        return {
            "loss": update.metrics.get("nll", float("nan")),
            "examples": float(batch.counts.sequences),
            "trained_tokens": float(batch.counts.tokens),
            "grad_norm": update.grad_norm,
            "lr": update.lr,
            "update_s": watch.seconds["update_s"],
            "step_s": step_s,
            "tokens_per_s": sums.values()["packed"] / step_s,
            "peak_gib": peak_gib(),
        }

    def _objective(self, piece: ExampleBatch) -> LossOutput:
        logprobs = self.policy.logprobs(piece, temperature=1.0)
        return self.loss(
            LossInputs.supervised(
                piece.trained(logprobs.logprobs),
                piece.trained(logprobs.entropy),
                trained_sequences(piece),
                piece.layout.num_sequences,
            )
        )
