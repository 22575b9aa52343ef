"""The longest sequence that a QLoRA update of a Llama-3.1-8B-shaped model takes on cards of 8, 12, 16 and 24 GiB.

    python -m benchmarks.long_context [--seconds 200] --out FILE.json      # one H100
    python -m benchmarks.long_context --trial                             # a toy with a made-up limit, on any machine

NF4, LoRA r=32 on the seven projections, random weights, 8-bit AdamW, layers' inputs on the host; SFT on one sequence
of which nine tenths are trained, and GRPO on completions that share a prompt of half their length, one sequence a
micro-batch. A card of GIB has GIB - 0.75 for the allocator, CUDA's context being the rest; it is made to keep to that.

A length is searched for with three of the layers and one completion, all weights in place and room for all gradients
held by an empty tensor: layers and micro-batches run one after the other, so that what these need at a time, all do.
Two lengths within 3% are the end of the search. Then the whole model does a whole update at that length, cheaper ones
first, which gives the tokens a second; a length that fails there is lowered by 3%. A group is of eight completions
where time allows, else of two. What no time is left for is said. FILE.json is written after each finding.
The allocator's segments are expandable, as PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True makes them.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import CONTEXT_GIB, GIB, about, shown, table, write_json
from benchmarks.random_model import DEVICE, hf_config, num_projection_weights, random_policy
from benchmarks.update_ours import everything_on, make_updater
from benchmarks.update_work import ALPHA, RANK, TARGETS, finish_gpu_work
from reasoner import config
from reasoner.errors import OutOfMemory
from reasoner.grpo.advantages import JudgedGroup
from reasoner.grpo.batch import TrainBatch, collate, loss_inputs, train_batch
from reasoner.grpo.losses import Dapo
from reasoner.models.adapted_linear import forget
from reasoner.models.loading import recompute_layers
from reasoner.models.policy import Policy
from reasoner.sft import SFTTrainer
from reasoner.types import Completion, Example, Group, Prompt, Score
from reasoner.update import LossOutput

CARDS = (8, 12, 16, 24)  # GiB
UNSLOTH = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475}  # its published table, batch 1, r=32
CLOSE = 1.03
GROUP, FEW = 8, 2  # completions of a group; where time is short, since each is a micro-batch like the others
SHARE_OF_TIME = 0.2  # of what is left, that a whole group may take
FEW_LAYERS = 3
AIM = 0.985  # of the limit, for a peak by a straight line: what is reserved is a little more than what is used
STEP = 64  # tokens that lengths are a multiple of
FIRST = 512
RATE = 3e14  # FLOP a second, until one is measured
TOY_TOKENS = 40  # a GiB, of the trial's made-up limit


class Trial:
    """One model, updated at one length after another, with all its layers or a few."""

    def __init__(self, shape: str):
        self.shape, self.logs = shape, Path(tempfile.mkdtemp(prefix="long-"))
        self.settings: Any = hf_config(shape)
        lora = config.Lora(r=RANK, alpha=ALPHA, targets=TARGETS)
        self.policy: Policy = random_policy(shape, nf4=True, lora=lora, recompute=True)
        if DEVICE.type == "cuda":
            recompute_layers(self.policy.base, shape, offload=True)
        self.policy.train_mode(dropout=False)
        optim = "adamw_8bit" if DEVICE.type == "cuda" else "adamw"
        self.updater = make_updater(self.policy, optim, FIRST, lambda _: None, self.logs)
        self.limit: float | None = None  # GiB of the card
        self.update("sft", STEP, 1)  # so that the optimizer's states are there

    def cap(self, gib: float | None) -> None:
        """Have the allocator keep to a card of this size; None: take what there is."""
        self.limit = gib
        if DEVICE.type == "cuda":
            free_up()
            total = torch.cuda.get_device_properties(DEVICE).total_memory
            share = 1.0 if gib is None else (gib - CONTEXT_GIB) * GIB / total
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))

    def update(self, stage: str, tokens: int, completions: int) -> None:
        """One update, its longest sequence of so many tokens. Raises OutOfMemory."""
        if DEVICE.type == "cpu" and self.limit is not None and tokens > self.limit * TOY_TOKENS:
            raise OutOfMemory(f"the trial's made-up limit is {self.limit * TOY_TOKENS} tokens")
        self.updater.tokens_per_micro_batch = tokens
        if stage == "sft":
            SFTTrainer(self.policy, self.updater).step([self._example(tokens)])
        else:
            self.updater.run(self._group(tokens, completions), self._objective)

    @contextmanager
    def few_layers(self) -> Iterator[None]:
        """Inside, the model has three layers, and the memory that all gradients take is held."""
        backbone: Any = self.policy.base.model
        layers = backbone.layers
        count = sum(weight.numel() for weight in self.policy.trainable().values())
        held = torch.empty(count, dtype=torch.float32, device=DEVICE)
        *others, last = layers  # which does not recompute
        backbone.layers = nn.ModuleList([*others[: FEW_LAYERS - 1], last])
        try:
            yield
        finally:
            backbone.layers = layers
            del held

    def reserve(self, tokens: int) -> None:
        """Have the host's memory for so many tokens page-locked, which is not what an update is timed for."""
        place = getattr(self.policy.base.model.layers[0]._gradient_checkpointing_func, "place", None)
        if place is not None:
            layers = self.settings.num_hidden_layers - 1  # all that recompute
            each = -(-tokens * self.settings.hidden_size * 2 // place.chunks.size) * place.chunks.size
            place.chunks.give_back(place.chunks.take(layers * each))

    def flop(self, tokens: int) -> float:
        """Of one sequence in an update: three passes of the weights, and attention forward twice and backward."""
        width = self.settings.hidden_size * self.settings.num_hidden_layers
        return 6 * tokens * num_projection_weights(self.settings) + 9.0 * tokens * tokens * width

    def _ids(self, count: int, seed: int) -> tuple[int, ...]:
        draws = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(3, self.settings.vocab_size, (count,), generator=draws).tolist())

    def _prompt(self, tokens: int) -> Prompt:
        return Prompt(id="0", text="", answer="", columns={}, token_ids=self._ids(tokens, 0))

    def _example(self, tokens: int) -> Example:
        return Example(self._prompt(tokens // 10), self._ids(tokens - tokens // 10, 1))

    def _group(self, tokens: int, completions: int) -> TrainBatch:
        length = tokens - tokens // 2
        several = tuple(
            Completion(self._ids(length, 1 + i), (True,) * length, (0.0,) * length, "", "stop", 0, 0)
            for i in range(completions)
        )
        group = Group(self._prompt(tokens // 2), several, tuple(Score(float(i % 2), {}) for i in range(completions)))
        judged = [JudgedGroup(group, tuple(1.0 if i % 2 else -1.0 for i in range(completions)), dead=False)]
        how: Any = {"mask_cut": False, "max_completion_tokens": length, "drop_dead": True, "device": DEVICE}
        rollout = collate(judged, share_prompts=self.policy.shares_prompts, **how)
        return train_batch(rollout, old_logprobs=None, ref_logprobs=None)

    def _objective(self, piece: TrainBatch) -> LossOutput:
        return Dapo()(loss_inputs(piece, self.policy.logprobs(piece, temperature=1.0)))


def free_up() -> None:
    """Give back what nobody holds."""
    forget()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def attempt(update: Callable[[], None]) -> tuple[float, float] | None:
    """Seconds and the allocator's peak in GiB (0.0 without a card) of an update; None where memory is too little."""
    free_up()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    finish_gpu_work()
    began = time.perf_counter()
    try:
        update()
    except (OutOfMemory, torch.OutOfMemoryError):
        return None
    finish_gpu_work()
    peak = torch.cuda.max_memory_allocated() / GIB if DEVICE.type == "cuda" else 0.0
    return time.perf_counter() - began, peak


Known = dict[int, float]
"""Peaks in GiB of lengths that fit."""


def search(fits: Callable[[int], float | None], start: int, limit_gib: float, known: Known) -> tuple[int, int]:
    """The longest length found to fit, and the shortest found not to, within 3% of each other or 64 tokens.

    `fits` gives the peak in GiB, or None where a length does not fit; `known` are peaks of earlier searches under lower
    limits, to which this one's are added. (0, length) if nothing fits, (length, 0) where `fits` raises OutOfTime before
    there is an upper bound.
    """
    low, high = 0, 0
    guess = following(known, max(known), 0, limit_gib) if len(known) >= 2 else start
    try:
        while guess >= STEP and (not high or (high > CLOSE * low and high - low > STEP)):
            peak = fits(guess)
            if peak is None:
                high = guess
            else:
                low, known[guess] = guess, peak
            guess = following(known, low, high, limit_gib)
    except OutOfTime:
        pass
    return low, high


def following(known: Known, low: int, high: int, limit_gib: float) -> int:
    """The next length to try. Up: where a straight line through the two longest known peaks meets the limit, else twice
    as long. Down, as long as nothing fits: by 3% from such a guess, else by half. Between two bounds: their middle."""
    straight = len(known) >= 2
    if not low:
        return rounded(int(high / (CLOSE if straight else 2)))
    if high:
        return rounded((low + high) // 2)
    if not straight:
        return 2 * low
    shorter, longer = sorted(known)[-2:]
    slope = (known[longer] - known[shorter]) / (longer - shorter)
    met = longer + int((AIM * limit_gib - known[longer]) / slope) if slope > 0 else 2 * low
    return rounded(max(met, int(CLOSE * low), low + STEP))


def rounded(tokens: int) -> int:
    """Down to a multiple of 64."""
    return tokens // STEP * STEP


class OutOfTime(Exception):
    """There is not enough left for a measurement."""


class Clock:
    """How much time is left, and how long an update is going to take."""

    def __init__(self, seconds: float):
        self.until = time.monotonic() + seconds
        self.rate = RATE

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def check(self, flop: float) -> None:
        """Raises OutOfTime where so much work does not fit."""
        if flop / self.rate > self.left:
            raise OutOfTime


class Table:
    """What was found so far."""

    def __init__(self, out: Path | None, command: str, commit: str | None):
        self.peaks: dict[str, Known] = {"sft": {}, "grpo": {}}
        self.out, self.found = out, {**about(command, commit), "rows": list[dict[str, Any]](), "unsloth_sft": UNSLOTH}

    def row(self, stage: str, gib: int) -> dict[str, Any]:
        """The row of a stage and card; a new one where there is none."""
        for row in self.found["rows"]:
            if (row["stage"], row["card_gib"]) == (stage, gib):
                return row
        row: dict[str, Any] = {"stage": stage, "card_gib": gib, "tokens": None, "confirmed": False, "tried": []}
        self.found["rows"].append(row)
        return row

    def write(self) -> None:
        """To the file, if there is one."""
        if self.out:
            write_json(self.out, self.found)

    def __str__(self) -> str:
        rows = []
        for row in self.found["rows"]:
            theirs = f"{UNSLOTH[row['card_gib']]:,}" if row["stage"] == "sft" else "-"
            said = "yes" if row["confirmed"] else row.get("why_not", "no")
            numbers = [shown(row.get("seconds"), 1), shown(row.get("tokens_per_s"), 0), shown(row.get("peak_gib"))]
            tokens = "-" if row["tokens"] is None else f"{row['tokens']:,}"
            rows.append([row["stage"], str(row["card_gib"]), tokens, theirs, said, *numbers])
        head = [
            "stage",
            "card, GiB",
            "tokens",
            "Unsloth's, published",
            "whole update done",
            "s",
            "tokens/s",
            "peak GiB",
        ]
        return table(head, rows)


def find(trial: Trial, clock: Clock, found: Table, stage: str, gib: int) -> None:
    """The longest length for a card, by a few layers."""
    row = found.row(stage, gib)
    peaks = found.peaks[stage]

    def fits(tokens: int) -> float | None:
        clock.check(trial.flop(tokens) * FEW_LAYERS / trial.settings.num_hidden_layers)
        got = attempt(lambda: trial.update(stage, tokens, 1))
        row["tried"].append({"tokens": tokens, "peak_gib": got[1] if got else None})
        return got[1] if got else None

    known = [one["tokens"] for one in found.found["rows"] if one["stage"] == "sft" and one["tokens"]]
    same = found.row("sft", gib)["tokens"]
    start = same if stage == "grpo" and same else max(known, default=FIRST)
    trial.cap(gib)
    try:
        with trial.few_layers():
            low, high = search(fits, start, gib - CONTEXT_GIB, peaks)
        row |= {"tokens": low or None, "not": high or None}
    except (OutOfMemory, torch.OutOfMemoryError):
        row["why_not"] = "the model alone does not fit"
    finally:
        trial.cap(None)
    if row["tokens"] is None and "why_not" not in row:
        row["why_not"] = "nothing fits" if row["tried"] else "no time left"
    found.write()
    print(f"{stage} {gib} GiB: {row['tokens']} tokens, {clock.left:.0f} s left", flush=True)


def confirm(trial: Trial, clock: Clock, found: Table, stage: str, gib: int) -> None:
    """A whole update at the length that was found, or a little below."""
    row = found.row(stage, gib)
    tokens = row["tokens"]
    while tokens and not row["confirmed"]:
        work = trial.flop(tokens)
        whole = GROUP * work / clock.rate < SHARE_OF_TIME * clock.left
        completions = 1 if stage == "sft" else GROUP if whole else FEW
        if completions * work / clock.rate > clock.left:
            row["why_not"] = "no time left"
            break
        trial.reserve(tokens)
        trial.cap(gib)
        got = attempt(lambda tokens=tokens, num=completions: trial.update(stage, tokens, num))
        trial.cap(None)
        if got is None:
            tokens = rounded(int(tokens / CLOSE))
            continue
        seconds, peak = got
        clock.rate = min(2 * RATE, completions * work / seconds) if tokens > 8 * STEP else clock.rate
        row |= {"confirmed": True, "tokens": tokens, "seconds": seconds, "peak_gib": peak, "completions": completions}
        row["tokens_per_s"] = completions * tokens / seconds
        row.pop("why_not", None)
    found.write()
    print(f"{stage} {gib} GiB: {row['tokens']} tokens, whole update: {row['confirmed']}", flush=True)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="nothing is written without it")
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--cards", type=int, nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--commit", help="where the checkout has no history")
    parser.add_argument("--trial", action="store_true", help="a toy with a made-up limit")
    given = parser.parse_args()
    if DEVICE.type == "cpu" and not given.trial:
        parser.error("needs a CUDA GPU; --trial runs anywhere")
    clock = Clock(given.seconds)
    if DEVICE.type == "cuda":
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    found = Table(given.out, f"python -m benchmarks.long_context --seconds {given.seconds:g}", given.commit)
    with everything_on():
        trial = Trial("trial" if given.trial else "8b")
        found.found["build_s"] = given.seconds - clock.left
        for stage in ("sft", "grpo"):
            for gib in given.cards:
                find(trial, clock, found, stage, gib)
        for row in sorted(
            found.found["rows"], key=lambda row: (row["tokens"] or 0) * (1 if row["stage"] == "sft" else 2)
        ):
            confirm(trial, clock, found, row["stage"], row["card_gib"])
    found.found["seconds"] = given.seconds - clock.left
    found.write()
    print(found)


if __name__ == "__main__":
    main()
