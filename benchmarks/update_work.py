"""The work of benchmarks/update.py: the same sequences for every trainer, what they cost at least, and a timed row.

Left out: any trainer.
"""

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig

from benchmarks.common import GIB
from benchmarks.random_model import DEVICE, hf_config, num_projection_weights

RANK, ALPHA = 32, 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LR = 1e-4
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}  # bfloat16, dense, of the SXM cards


@dataclass(frozen=True)
class Work:
    """Sequences of one update: `num` of `shortest` to `longest` tokens, `tokens` together, a tenth of each its prompt.

    >>> Work("1.5b").lengths
    (317, 318, 340, ...)  # 24 of them, shortest first, as every trainer that sorts by length would have them
    """

    shape: str
    tokens: int = 16_384
    num: int = 24
    shortest: int = 256
    longest: int = 1024

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Of the sequences, shortest first; the same for the same work."""
        draws = random.Random(0)
        lengths = [draws.randint(self.shortest, self.longest) for _ in range(self.num)]
        while (missing := self.tokens - sum(lengths)) != 0:
            step = 1 if missing > 0 else -1
            free = [i for i, n in enumerate(lengths) if self.shortest <= n + step <= self.longest]
            for i in draws.sample(free, min(len(free), abs(missing))):
                lengths[i] += step
        return tuple(sorted(lengths))

    @cached_property
    def ids(self) -> list[list[int]]:
        """Random tokens of each sequence."""
        draws = random.Random(1)
        most = min(40_000, self.config.vocab_size)
        return [[draws.randrange(3, most) for _ in range(length)] for length in self.lengths]

    @property
    def prompts(self) -> list[int]:
        """Tokens of each that are not trained."""
        return [length // 10 for length in self.lengths]

    @property
    def num_trained(self) -> int:
        """Tokens that are."""
        return self.tokens - sum(self.prompts)

    @cached_property
    def config(self) -> PretrainedConfig:
        """transformers' config of the model."""
        return hf_config(self.shape)

    @property
    def useful_flop(self) -> float:
        """Three passes of 2 N P over the projections' weights, and two of 2 N V D over the trained rows' head."""
        body = 3 * 2 * self.tokens * num_projection_weights(self.config)
        return body + 2 * 2 * self.num_trained * self.config.vocab_size * self.config.hidden_size

    def mfu(self, seconds: float) -> float | None:
        """The share of the card's peak that is useful work; None where the peak is not known."""
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        peaks = [peak for card, peak in PEAK_TFLOPS.items() if card in name]
        return self.useful_flop / seconds / (peaks[0] * 1e12) if peaks else None


@dataclass(slots=True)
class Row:
    """One way to do the update. `run(warm_up, timed)` does so many and gives the timed ones' seconds; `facts` are what
    it says of itself (micro-batch, loss), filled in as it runs."""

    name: str
    run: Callable[[int, int], list[float]]
    facts: dict[str, Any] = field(default_factory=dict)


def finish_gpu_work() -> None:
    """Wait for it."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def stepped(update: Callable[[], None]) -> Callable[[int, int], list[float]]:
    """A row's `run` from a function that does one update."""

    def run(warm_up: int, timed: int) -> list[float]:
        for _ in range(warm_up):
            update()
        found = []
        for _ in range(timed):
            finish_gpu_work()
            began = time.perf_counter()
            update()
            finish_gpu_work()
            found.append(time.perf_counter() - began)
        return found

    return run


def used_gib() -> float | None:
    """What is in use on the device, whoever uses it."""
    if DEVICE.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def empty() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measured(row: Row, warm_up: int, timed: int, others: float | None) -> dict[str, Any]:
    """Run the row: seconds, the allocator's peak, and what the device holds for this process when it is over.

    The allocator gives nothing back while an update runs, so that what the device holds at the end is its peak.
    `others`: GiB that other processes hold.
    """
    empty()
    try:
        seconds = row.run(warm_up, timed)
    except torch.OutOfMemoryError:
        return {"not_run": "out of memory"}
    found: dict[str, Any] = {"seconds": seconds, **row.facts}
    if DEVICE.type == "cuda":
        used = used_gib()
        assert used is not None
        found["allocator_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["device_gib"] = None if others is None else used - others
    return found
