"""The numbers of a step: their names and units, sums that don't depend on how a step was split, time and memory.

Left out: writing them (run_folder.py), showing them (console.py), sending them (tracking/).
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reasoner import world

# What a row of metrics.jsonl holds beside stage, stage_index, step (from 1 in each stage) and policy_step. More may
# follow, by the loss's and the reward parts' own names.
NAMES: Mapping[str, Mapping[str, str]] = {
    "sft": {
        "loss": "mean negative logprob of a trained token, nats",
        "examples": "worked examples in the step",
        "trained_tokens": "completion tokens in the step",
        "grad_norm": "before clipping",
        "lr": "learning rate of the step",
        "update_s": "seconds in forward, backward and optimizer",
        "step_s": "seconds of the whole step",
        "tokens_per_s": "tokens through the model, prompts too, a second",
        "peak_gib": "most memory held so far, GiB: of the GPU, or of the process where there is none",
    },
    "grpo": {
        "reward_mean": "mean total reward of the completions whose rewards did not fail",
        "solved_share": "share of them that the accuracy reward gives full marks",
        "useful_groups": "groups whose rewards differ",
        "groups": "groups in the step",
        "reward_failures": "completions with a failed reward",
        "completion_tokens_mean": "tokens a completion",
        "cut_share": "share of completions that hit grpo.max_completion_tokens",
        "entropy": "mean entropy of a trained token's distribution, nats",
        "kl": "mean KL to the reference a trained token, nats; 0 without one",
        "logprob_gap_mean": "mean |trainer's - engine's logprob| of a sampled token, nats",
        "logprob_gap_max": "the largest of these",
        "ratio_max": "largest ratio of current to old probability of a token",
        "grad_norm": "before clipping",
        "lr": "learning rate of the step",
        "generate_s": "seconds of sampling",
        "reward_s": "seconds of scoring after the last completion was sampled",
        "logprobs_s": "seconds of reference and old logprobs",
        "update_s": "seconds in forward, backward and optimizer",
        "sync_s": "seconds of handing the new weights to the engine",
        "step_s": "seconds of the whole step",
        "tokens_per_s": "sampled tokens a second of the whole step",
        "peak_gib": "most memory held so far, GiB: of the GPU, or of the process where there is none",
    },
}


def step_row(stage: str, stage_index: int, step: int, policy_step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """A row of metrics.jsonl: who and when, the stage's own numbers in the order of NAMES, then the others by name.

    A number that the step could not measure (the entropy where no group was live, say) is NaN, and null in the file.
    """
    names = NAMES[stage]
    extra = sorted(values.keys() - names.keys())
    who = {"stage": stage, "stage_index": stage_index, "step": step, "policy_step": policy_step}
    return {**who, **{name: values.get(name, math.nan) for name in (*names, *extra)}}


class Sums:
    """Numbers of one step, added up piece by piece; read once, over all pieces of all ranks.

    >>> sums = Sums()
    >>> sums.add("reward_mean", 3.0, 4)     # a mean is a sum with its count: never a mean of means
    >>> sums.add("reward_mean", 1.0, 1)
    >>> sums.count("useful_groups", 2)
    >>> sums.top("ratio_max", 1.3)
    >>> sums.values()
    {'reward_mean': 0.8, 'useful_groups': 2.0, 'ratio_max': 1.3}

    A mean over nothing is NaN. Values are Python floats, so that sums are float64.
    """

    def __init__(self) -> None:
        self._means: dict[str, tuple[float, float]] = {}
        self._counts: dict[str, float] = {}
        self._tops: dict[str, float] = {}

    def add(self, name: str, total: float, count: float) -> None:
        """Towards a mean: the sum of `count` more values."""
        before, number = self._means.get(name, (0.0, 0.0))
        self._means[name] = (before + float(total), number + float(count))

    def count(self, name: str, number: float) -> None:
        """Towards a plain sum."""
        self._counts[name] = self._counts.get(name, 0.0) + float(number)

    def top(self, name: str, value: float) -> None:
        """Towards a maximum."""
        self._tops[name] = max(self._tops.get(name, float("-inf")), float(value))

    def values(self) -> dict[str, float]:
        """Every number by name, the same on all ranks. Every rank calls it at the same place, whatever names it has."""
        ranks: list[Sums] = world.gather_over_ranks(self)
        whole = Sums()
        for rank in ranks:
            for name, (total, count) in rank._means.items():
                whole.add(name, total, count)
            for name, number in rank._counts.items():
                whole.count(name, number)
            for name, value in rank._tops.items():
                whole.top(name, value)
        means = {name: total / count if count else math.nan for name, (total, count) in whole._means.items()}
        return {**means, **whole._counts, **whole._tops}


class Stopwatch:
    """Seconds by the part of a step they went to, on a clock that no clock change moves.

    >>> watch = Stopwatch()
    >>> with watch.measure("generate_s"): ...
    >>> watch.seconds["generate_s"], watch.elapsed_s()
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.monotonic()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`; a GPU's queued work counts where it was queued, so it is waited for."""
        start = time.monotonic()
        try:
            yield
            _finish_gpu_work()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def elapsed_s(self) -> float:
        """Seconds since the watch was made."""
        return time.monotonic() - self._start


def peak_gib() -> float:
    """The most memory held so far, GiB: allocated on the GPU, else the process's resident set (NaN without /proc)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


def _finish_gpu_work() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
