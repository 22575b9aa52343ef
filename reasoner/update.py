"""The one update loop, for SFT and GRPO alike: cut by token budget, accumulate, divide once, clip, step.

It leaves out what a batch means: a batch is packed sequences with the counts of the whole step, a loss is a function
of a piece of it. No trainer
has a backward of its own, so splitting a batch, running out of memory, or adding ranks can't change a gradient.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from reasoner import world
from reasoner.config import Optim, build
from reasoner.errors import GuardTripped, OutOfMemory
from reasoner.models.adapted_linear import forget
from reasoner.models.joined import Stepped

Normalizer = Literal["tokens", "sequences", "constant"]
MAX_SKIPPED = 3  # non-finite steps in a row
TOKENS = "trained tokens"  # beside the metrics of a piece


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What a whole step trains, over all ranks, counted from whole sequences at collate and never from a
    micro-batch."""

    tokens: int  # trained tokens
    sequences: int  # completions with at least one trained token
    groups: int
    constant: float  # sequences x the longest completion allowed, in tokens

    def of(self, normalizer: Normalizer) -> float:
        """The number that a sum with this normalizer is divided by; at least 1, so that an empty step divides nothing
        by zero."""
        return max(float(getattr(self, normalizer)), 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """A loss over some sequences: a differentiable scalar sum, what the step divides it by, and metrics.

    `metrics` hold detached scalars: a name ending in `_max` is combined by max, every other is a sum over trained
    tokens.
    """

    sum: Tensor
    normalizer: Normalizer
    metrics: dict[str, Tensor]


class Batch(Protocol):
    """What the updater can cut: packed sequences with the counts of the whole step."""

    @property
    def token_ids(self) -> Tensor: ...

    @property
    def completion_mask(self) -> Tensor: ...

    @property
    def counts(self) -> StepCounts: ...

    def split(self, max_tokens: int) -> list[Self]:
        """Whole sequences in pieces that compute at most max_tokens (a longer sequence is a piece of its own)."""
        ...


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What one step did. `metrics` are means over the tokens that ran, or maxima; `grad_norm` is before clipping."""

    metrics: Mapping[str, float]
    grad_norm: float
    lr: float
    stepped: bool  # False: nothing to learn from, or a non-finite gradient


def learning_rate(optim: Optim, step: int, num_steps: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up over `warmup_steps`, then constant, linear or cosine decay to 0 at
    num_steps."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    if optim.decay == "constant":
        return optim.lr
    done = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
    left = 1 - done if optim.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.lr * max(0.0, left)


class Updater:
    """Owns the optimizer and turns a batch and a loss into one step of the trainable weights."""

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        optim: Optim,
        *,
        num_steps: int,
        tokens_per_micro_batch: int,
        say: Callable[[str], None],
        save_bad_batches_to: Path,
    ):
        self.parameters = dict(parameters)
        self.optim = optim
        self.num_steps = num_steps
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.say = say
        self.save_bad_batches_to = save_bad_batches_to
        self.stepped = Stepped(list(self.parameters.values()), optim.optimizer)
        self.optimizer: torch.optim.Optimizer = build(optim.optimizer, params=self.stepped.parameters, lr=optim.lr)
        self.step_index = 0
        self.num_skipped = 0

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps beside the optimizer's own state."""
        return {
            "step_index": self.step_index,
            "num_skipped": self.num_skipped,
            "tokens_per_micro_batch": self.tokens_per_micro_batch,
        }

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on where `state()` was taken; after running out of memory the smaller token budget stays."""
        self.step_index, self.num_skipped = state["step_index"], state["num_skipped"]
        self.tokens_per_micro_batch = min(self.tokens_per_micro_batch, state["tokens_per_micro_batch"])

    def run(self, batch: Any, loss: Callable[[Any], LossOutput]) -> UpdateResult:
        """One optimizer step of `loss` over the whole `batch`.

        `loss` is called for each micro-batch; its sum is divided by the whole step's count, so the gradient does not
        depend on the cut. Out of
        memory: the gradients are zeroed, the token budget halved and the whole step redone. A step without a
        sequence, or with a non-finite
        gradient, moves no weight. Raises GuardTripped after three non-finite steps in a row, OutOfMemory when one
        sequence alone is too much.
        """
        pieces = self._accumulate(batch, loss)
        lr = learning_rate(self.optim, self.step_index, self.num_steps)
        self.step_index += 1
        gradients = self.stepped.gather(everything=world.size() > 1)
        for gradient in gradients:  # a rank whose rows were all dropped still takes part, with zeros
            world.sum_over_ranks(gradient)
        total = self.stepped.norm()  # 0 without gradients; queued before anything is read
        metrics, norm = _means(pieces), float(total)
        if not gradients:
            return UpdateResult(metrics, 0.0, lr, stepped=False)
        if not math.isfinite(norm):
            self._skip(batch, norm)
            return UpdateResult(metrics, norm, lr, stepped=False)
        self.num_skipped = 0
        if norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.stepped.parameters, self.optim.max_grad_norm, total)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.stepped.spread()
            # Optimizers of other libraries write through bare pointers, which PyTorch does not see.
            torch.autograd.graph.increment_version(list(self.parameters.values()))
        self.stepped.drop()
        return UpdateResult(metrics, norm, lr, stepped=norm > 0)

    def _accumulate(self, batch: Any, loss: Callable[[Any], LossOutput]) -> list[dict[str, Tensor]]:
        while True:
            try:
                return self._pass(batch.split(self.tokens_per_micro_batch), loss)
            except torch.OutOfMemoryError:
                self.stepped.drop()
                forget()  # of the backward's recomputing; a forward does so itself
            # Out of the handler, so that the error no longer holds the activations of what failed.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            longest = max(piece.token_ids.numel() for piece in batch.split(1))
            if self.tokens_per_micro_batch <= longest:
                raise OutOfMemory(
                    f"out of memory with a single sequence of {longest} tokens: lower grpo.max_completion_tokens "
                    "or data.max_prompt_tokens, or set model.gradient_checkpointing=offload"
                )
            self.tokens_per_micro_batch = max(longest, self.tokens_per_micro_batch // 2)
            self.say(f"out of memory: the step is redone with tokens_per_micro_batch={self.tokens_per_micro_batch}")

    def _pass(self, pieces: list[Any], loss: Callable[[Any], LossOutput]) -> list[dict[str, Tensor]]:
        """Each piece's metrics and its number of trained tokens, still on the device."""
        found: list[dict[str, Tensor]] = []
        for piece in pieces:
            output = loss(piece)
            (output.sum / piece.counts.of(output.normalizer)).backward()
            num_tokens = piece.completion_mask.sum()
            # A loss of the user's may have made them on the host, or as vectors of one.
            metrics = {name: value.detach().to(num_tokens.device).reshape(()) for name, value in output.metrics.items()}
            found.append({**metrics, TOKENS: num_tokens})
        return found

    def _skip(self, batch: Any, norm: float) -> None:
        self.stepped.drop()
        self.num_skipped += 1
        path = self.save_bad_batches_to / f"bad-batch-{self.step_index - 1:06d}.safetensors"
        if world.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: getattr(batch, name) for name in ("token_ids", "completion_mask")}
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
        self.say(f"gradient norm {norm}: the step is skipped, its batch is in {path}")
        if self.num_skipped >= MAX_SKIPPED:
            raise GuardTripped(
                f"{MAX_SKIPPED} steps in a row had a gradient that is not finite: lower the stage's optim.lr; the "
                f"batches are in {path.parent}"
            )


def _means(pieces: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Sums of pieces -> means over the tokens of all ranks; maxima -> maxima over all ranks."""
    ranks = world.gather_over_ranks(_added(pieces))
    total = max(1.0, sum(values.get(TOKENS, 0.0) for values in ranks))
    means: dict[str, float] = {}
    for name in dict.fromkeys(name for values in ranks for name in values if name != TOKENS):
        found = [values[name] for values in ranks if name in values]
        means[name] = _largest(found) if name.endswith("_max") else sum(found) / total
    return means


def _largest(values: Sequence[float]) -> float:
    """NaN if one is; Python's max may lose it."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _added(pieces: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The pieces' numbers together. They come from the device in one copy, when all of the work is queued: a copy in
    between would have the device wait for Python's next piece."""
    numbers = [value.double() for piece in pieces for value in piece.values()]
    read = iter(torch.stack(numbers).tolist() if numbers else ())
    together: dict[str, float] = {}
    for piece in pieces:
        for name in piece:
            value = next(read)
            if name in together:
                both = together[name], value
                value = _largest(both) if name.endswith("_max") else sum(both)
            together[name] = value
    return together
