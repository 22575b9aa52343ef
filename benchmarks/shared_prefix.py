"""What a group's prompt computed once saves of an update: time, tokens, memory, and how far the gradient is.

    python -m benchmarks.shared_prefix [--shape 1.5b|7b] [--out FILE]   # a CUDA GPU
    python -m benchmarks.shared_prefix --trial                          # a toy of the same, on any machine

One step's batch, 16 prompts of 128 tokens with 8 completions of 256 each, is learnt from in both forms in turn: the
prompt once a group, and before every completion. NF4 base, an adapter on seven projections, layers that run again in
the backward, dapo's loss, micro-batches that both forms fill evenly. An update is forward and backward of all of them;
the pass without gradient is that of old or reference logprobs. Medians of five. Left out: sampling, and the optimizer.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import GIB, RESULTS, about, shown, table, write_json
from benchmarks.random_model import DEVICE, hf_config, random_policy
from reasoner import config
from reasoner.grpo.advantages import judge
from reasoner.grpo.batch import RolloutBatch, collate, loss_inputs, train_batch
from reasoner.grpo.losses import Dapo
from reasoner.models.policy import Policy
from reasoner.types import Completion, Group, Prompt, Score

B_STD = 0.01  # of the adapter's B, so that A has a gradient too
FORMS = ("shared", "unshared")
Learnt = tuple[Tensor, Tensor]  # logprobs [N], the gradient as one vector


@dataclass(frozen=True)
class Work:
    """One step: so many groups, of so many completions, in tokens."""

    shape: str = "1.5b"
    groups: int = 16
    completions: int = 8
    prompt: int = 128
    completion: int = 256
    micro_batch: int = 24_576  # two of 64 sequences with their own prompts
    rank: int = 32

    def batch(self, *, shared: bool) -> RolloutBatch:
        """Random tokens, half of the completions better than the others; the same for both forms."""
        draws = torch.Generator().manual_seed(1)
        most = min(40_000, hf_config(self.shape).vocab_size)

        def draw(count: int) -> tuple[int, ...]:
            return tuple(torch.randint(3, most, (count,), generator=draws).tolist())

        def completion() -> Completion:
            length = self.completion
            return Completion(draw(length), (True,) * length, (0.0,) * length, "", "stop", 0, 0)

        groups = [
            Group(
                Prompt(str(n), "", "", {}, draw(self.prompt)),
                tuple(completion() for _ in range(self.completions)),
                tuple(Score(float(i % 2), {}) for i in range(self.completions)),
            )
            for n in range(self.groups)
        ]
        judged = judge(groups, advantage="group", scale="none")
        how: Any = {"mask_cut": False, "max_completion_tokens": self.completion, "drop_dead": True, "device": DEVICE}
        return collate(judged, share_prompts=shared, **how)


TRIAL = Work("trial", groups=2, completions=4, prompt=24, completion=16, micro_batch=160, rank=4)


def make_policy(work: Work) -> Policy:
    """A random model of the shape, in training mode, whose adapter does something."""
    lora = config.Lora(r=work.rank, alpha=2 * work.rank)
    policy = random_policy(work.shape, nf4=True, lora=lora, recompute=True)
    draws = torch.Generator(DEVICE).manual_seed(2)
    with torch.no_grad():
        for name, weight in policy.trainable().items():
            if ".lora_B." in name:
                weight.copy_(torch.randn(weight.shape, generator=draws, device=DEVICE) * B_STD)
    policy.train_mode(dropout=False)
    return policy


def update(policy: Policy, batch: RolloutBatch, micro_batch: int) -> list[Tensor]:
    """Forward and backward of a step; the pieces' logprobs. Gradients stay."""
    loss, found = Dapo(), []
    for piece in train_batch(batch, old_logprobs=None, ref_logprobs=None).split(micro_batch):
        logprobs = policy.logprobs(piece, temperature=1.0)
        output = loss(loss_inputs(piece, logprobs))
        (output.sum / piece.counts.of(output.normalizer)).backward()
        found.append(logprobs.logprobs.detach())
    return found


@torch.no_grad()
def look(policy: Policy, batch: RolloutBatch, micro_batch: int) -> None:
    """The pass without gradient."""
    for piece in batch.split(micro_batch):
        policy.logprobs(piece, temperature=1.0)


def forget_gradients(policy: Policy) -> None:
    """As an optimizer's step leaves it."""
    for weight in policy.trainable().values():
        weight.grad = None


def learnt(policy: Policy, batch: RolloutBatch, micro_batch: int) -> Learnt:
    """What an update gives."""
    logprobs = torch.cat(update(policy, batch, micro_batch))[batch.completion_mask]
    gradient = torch.cat([w.grad.double().flatten() for w in policy.trainable().values() if w.grad is not None])
    forget_gradients(policy)
    return logprobs, gradient


def apart(one: Learnt, other: Learnt) -> dict[str, float]:
    """How far two updates are: of the gradients the norm of the difference over the norm, of logprobs in nats."""
    off = (one[0] - other[0]).abs()
    gradient = float((one[1] - other[1]).norm() / other[1].norm())
    return {"gradient": gradient, "logprob_mean": float(off.mean()), "logprob_max": float(off.max())}


def timed(action: Callable[[], Any]) -> tuple[float, float | None]:
    """Milliseconds, and the allocator's peak in GiB."""
    on_card = DEVICE.type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if on_card:
        torch.cuda.synchronize()
    took = 1e3 * (time.perf_counter() - began)
    return took, torch.cuda.max_memory_allocated() / GIB if on_card else None


def measure(work: Work, rounds: int) -> dict[str, Any]:
    """Both forms in turn, in an order that turns around, and their differences."""
    policy = make_policy(work)
    batches = {form: work.batch(shared=form == "shared") for form in FORMS}
    found: dict[str, Any] = {form: facts(batches[form], work.micro_batch) for form in FORMS}
    first = {form: learnt(policy, batches[form], work.micro_batch) for form in FORMS}  # warms up too
    found["apart"] = {
        "shared from unshared": apart(first["shared"], first["unshared"]),
        "unshared again": apart(learnt(policy, batches["unshared"], work.micro_batch), first["unshared"]),
        "unshared, smaller micro-batches": apart(
            learnt(policy, batches["unshared"], work.micro_batch // 2), first["unshared"]
        ),
    }
    del first
    times: dict[str, list[float]] = {f"{form} {what}": [] for form in FORMS for what in ("update", "pass")}
    for i in range(rounds):
        for form in FORMS if i % 2 == 0 else FORMS[::-1]:
            ms, peak = timed(lambda form=form: update(policy, batches[form], work.micro_batch))
            forget_gradients(policy)
            times[f"{form} update"].append(ms)
            found[form]["peak_gib"] = max(peak, found[form].get("peak_gib", 0.0)) if peak is not None else None
            times[f"{form} pass"].append(timed(lambda form=form: look(policy, batches[form], work.micro_batch))[0])
    for form in FORMS:
        for what in ("update", "pass"):
            found[form] |= {f"{what}_ms": statistics.median(times[f"{form} {what}"])}
            found[form] |= {f"all_{what}_ms": times[f"{form} {what}"]}
    found["saved"] = {
        what: 1 - found["shared"][what] / found["unshared"][what] for what in ("update_ms", "pass_ms", "tokens")
    }
    return found


def facts(batch: RolloutBatch, micro_batch: int) -> dict[str, Any]:
    """What a form computes, counted."""
    pieces = batch.split(micro_batch)
    own = [sum(piece.layout.lengths) - sum(piece.layout.shared) for piece in pieces]
    return {"tokens": sum(own), "micro_batches": own, "trained_tokens": int(batch.completion_mask.sum())}


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """The table's rows."""
    rows = [
        [
            form,
            f"{found[form]['tokens']:,}",
            shown(found[form]["update_ms"], 0),
            shown(found[form]["pass_ms"], 0),
            shown(found[form]["peak_gib"]),
        ]
        for form in FORMS
    ]
    saved = found["saved"]
    return [*rows, ["saved", *(f"{saved[name]:.1%}" for name in ("tokens", "update_ms", "pass_ms")), ""]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["1.5b", "7b"], default="1.5b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/shared_prefix-SHAPE.json")
    parser.add_argument("--trial", action="store_true", help="a toy, on any machine; writes only with --out")
    typed = parser.parse_args(arguments)
    if not typed.trial and DEVICE.type != "cuda":
        parser.error("this needs a CUDA GPU: --trial runs a toy without")
    work = TRIAL if typed.trial else Work(typed.shape)
    found = measure(work, 1 if typed.trial else typed.rounds)
    head = ["prompts", "tokens computed", "update, ms", "pass without gradient, ms", "peak GiB"]
    print(table(head, rows_of(found)))
    off = [
        [name, *(f"{values[key]:.1e}" for key in ("gradient", "logprob_mean", "logprob_max"))]
        for name, values in found["apart"].items()
    ]
    print("\n" + table(["difference", "gradient, relative", "logprobs, mean", "largest"], off))
    out = typed.out or (None if typed.trial else RESULTS / f"shared_prefix-{work.shape}.json")
    if out is not None:
        command = f"python -m benchmarks.shared_prefix {'--trial' if typed.trial else f'--shape {work.shape}'}"
        sizes = {"groups": work.groups, "completions": work.completions, "prompt": work.prompt}
        sizes |= {"completion": work.completion, "micro_batch": work.micro_batch, "rank": work.rank}
        write_json(out, {**about(command), "shape": work.shape, **sizes, **found})
        print(f"\nwritten: {out}")


if __name__ == "__main__":
    main()
