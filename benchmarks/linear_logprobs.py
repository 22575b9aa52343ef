"""The loss head beside its rivals and its floor: time, memory beyond the outputs, and errors against float64.

    python -m benchmarks.linear_logprobs [--out FILE] [--seconds 140]     # one H100, under 150 s
    python -m benchmarks.readme                                           # then: its tables in docs/performance.md
    python -m benchmarks.linear_logprobs --trial                          # a toy, on any machine: does it run?

Hidden states and a frozen head, bfloat16; one random number a token arrives at its logprob, and the gradient of hidden
leaves. The floor is the two cuBLAS matmuls that no method can do without, in one region of the same rotation. Each
number is the median of interleaved runs, in another order each turn. Before each the card multiplies for 50 ms, as in
training a model's layers come before its head: a card at its power limit is slower than one that rested, and the
launches of a call are hidden as far as it does not wait for the card. "flat" rows are a random softmax of std 1; of
"peaked" rows 70% have one token 10 to 32 nats above the rest, mostly the target. Every finished case is written at
once, so that a run that is cut keeps what it measured; cases that no time is left for are listed.

Left out: a trained head, and gradients that arrive at entropy (both take the torch implementation's backward pass).
"""

import argparse
import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import GIB, RESULTS, about, read_json, shown, table, write_json
from benchmarks.loss_heads import BY_DATA, DEVICE, OURS, RIVALS, SLOW, Data, Floor, Method

RESULT = RESULTS / "linear_logprobs.json"
ROUNDS = 5
CHECKED_ROWS = 256
BUSY_MS = 50.0


@dataclass(frozen=True)
class Case:
    """One shape and kind of rows. `rivals` are timed where they say something that an earlier case did not."""

    width: int
    vocabulary: int
    kind: str
    rivals: bool


CASES = (
    Case(1536, 151_936, "peaked", True),
    Case(3584, 151_936, "peaked", True),
    Case(896, 151_936, "peaked", False),
    Case(2048, 128_256, "peaked", False),
    Case(640, 262_144, "peaked", False),
    Case(1536, 151_936, "flat", False),
    Case(3584, 151_936, "flat", False),
    Case(896, 151_936, "flat", False),
    Case(2048, 128_256, "flat", False),
    Case(640, 262_144, "flat", False),
)
TRIAL = (Case(32, 515, "peaked", True), Case(32, 515, "flat", False))


def make_data(case: Case, num_rows: int) -> Data:
    """Rows of the case's kind, the same for the same case."""
    draws = torch.Generator(DEVICE).manual_seed(case.width)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=DEVICE, generator=draws)

    weight = (normal(case.vocabulary, case.width) * 0.02).bfloat16()
    target_ids = torch.randint(case.vocabulary, (num_rows,), device=DEVICE, generator=draws)
    unit = 1 / (0.02 * math.sqrt(case.width))  # gives logits of std 1
    hidden = normal(num_rows, case.width)
    if case.kind == "flat":
        hidden *= unit
    else:
        place = torch.rand(num_rows, device=DEVICE, generator=draws)
        hidden *= torch.where(place < 0.7, 2 * unit, 3 * unit)[:, None]
        stranger = torch.randint(case.vocabulary, (num_rows,), device=DEVICE, generator=draws)
        toward = weight[torch.where(place < 0.6, target_ids, stranger)].float()
        height = torch.where(place < 0.7, 10 + 22 * torch.rand(num_rows, device=DEVICE, generator=draws), 0.0)
        hidden += height[:, None] * toward / toward.square().sum(1, keepdim=True)
    return Data(hidden.bfloat16(), weight, target_ids, normal(num_rows))


def milliseconds(method: Callable[[Data], Any], data: Data, work: Callable[[Data], Any], times: int) -> float:
    """One call, as the card's clock sees it, after `times` x `work`."""
    if DEVICE.type == "cpu":
        began = time.perf_counter()
        method(data)
        return 1e3 * (time.perf_counter() - began)
    for _ in range(times):
        work(data)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    method(data)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_beyond_outputs(method: Method, data: Data) -> float | None:
    """GiB that a call holds at most beside its inputs and what it hands back."""
    if DEVICE.type == "cpu":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = method(data)
    torch.cuda.synchronize()
    outputs = sum(part.nbytes for part in found if part is not None)
    return (torch.cuda.max_memory_allocated() - before - outputs) / GIB


@dataclass(frozen=True, eq=False)
class Truth:
    """Float64, for some rows: logprobs, and the gradient of hidden."""

    rows: Tensor
    logprobs: Tensor
    gradient: Tensor


def truth_of(data: Data) -> Truth:
    """From logits against the target, without cancellation: d logp / d h = S / (1 + S) * (w_t - sum_j o_j w_j / S)."""
    draws = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(data.hidden), generator=draws)[:CHECKED_ROWS].to(DEVICE)
    weight = data.weight.double()
    logprobs, gradients = [], []
    for part in rows.split(64):
        ids = data.target_ids[part, None]
        logits = data.hidden[part].double() @ weight.T
        odds = (logits - logits.gather(1, ids)).exp_().scatter_(1, ids, 0.0)
        total = odds.sum(1, keepdim=True)
        factor = (total * weight[ids[:, 0]] - odds @ weight) / (1 + total)
        logprobs.append(-total[:, 0].log1p())
        gradients.append(factor * data.upstream[part, None].double())
    return Truth(rows, torch.cat(logprobs), torch.cat(gradients))


def errors(found: tuple[Tensor | None, Tensor | None], truth: Truth) -> dict[str, float]:
    """Of the gradient over all rows and in the worst one, relative norms; of logprobs, relative to max(1, |logp|)."""
    logprobs, gradient = found
    result = {}
    if logprobs is not None:
        off = (logprobs[truth.rows].double() - truth.logprobs).abs()
        result["logprob_error"] = float((off / truth.logprobs.abs().clamp(min=1)).max())
        if gradient is not None:
            miss = gradient[truth.rows].double() - truth.gradient
            result["gradient_error"] = float(miss.norm() / truth.gradient.norm())
            rows = miss.norm(dim=1) / truth.gradient.norm(dim=1).clamp(min=1e-300)
            result["gradient_error_worst_row"] = float(rows.max())
    return result


def failures() -> tuple[type[Exception], ...]:
    """What a method that can't run here may raise; each is a row that says so."""
    kinds = (RuntimeError, ImportError, TypeError, ValueError, AttributeError, AssertionError)
    if find_spec("triton") is None:
        return kinds
    from triton.errors import TritonError

    return (*kinds, TritonError)


def prepared(make: Callable[[], Method], data: Data, truth: Truth) -> tuple[Method | None, dict[str, Any]]:
    """The method, run twice to compile and to see that it repeats; or what keeps it from running."""
    try:
        method = make()
        found, again = method(data), method(data)
        same = all(torch.equal(one, other) for one, other in zip(found, again, strict=True) if one is not None)
        about_it = {"repeats_bit_by_bit": same, **errors(found, truth)}
        del found, again
        return method, {**about_it, "peak_gib": peak_beyond_outputs(method, data)}
    except ModuleNotFoundError as error:
        return None, {"not_run": f"{error.name} is not installed"}
    except torch.OutOfMemoryError:
        return None, {"not_run": "out of memory"}
    except failures() as error:
        return None, {"not_run": f"{type(error).__name__}: {error}"[:200]}


def measured(case: Case, num_rows: int, stop_at: float) -> dict[str, Any]:
    """One case: every method's milliseconds, memory and errors."""
    data = make_data(case, num_rows)
    truth = truth_of(data)
    makers = {**OURS, **(RIVALS if case.rivals else {name: RIVALS[name] for name in BY_DATA})}
    rows: dict[str, dict[str, Any]] = {}
    methods: dict[str, Callable[[Data], Any]] = {}
    for name, make in makers.items():
        began = time.monotonic()
        method, rows[name] = prepared(make, data, truth)
        rows[name]["prepare_s"] = time.monotonic() - began
        if method is not None:
            methods[name] = method
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    floors = Floor(data).methods()
    methods |= floors
    times: dict[str, list[float]] = {name: [] for name in methods}
    work = floors["floor: two matmuls"]
    warm = [milliseconds(method, data, work, 0) for method in (*floors.values(), work)]
    order = random.Random(0)
    for turn in range(ROUNDS):
        for name, method in order.sample(sorted(methods.items()), len(methods)):
            if (name in SLOW and turn >= 2) or (turn and time.monotonic() > stop_at and not name.startswith("floor")):
                continue
            times[name].append(milliseconds(method, data, work, math.ceil(BUSY_MS / warm[-1])))
    for name, found in times.items():
        rows.setdefault(name, {}).update(
            ms=statistics.median(found), least=min(found), most=max(found), runs=len(found)
        )
    return {**vars(case), "rows": num_rows, "methods": with_ratios(rows)}


def with_ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each method's time over its floor's, the faster of two ways to do it."""
    floors = {
        count: min(row["ms"] for name, row in rows.items() if name.startswith(f"floor: {count}"))
        for count in ("one", "two")
    }
    for name, row in rows.items():
        if "ms" in row:
            row["ratio"] = row["ms"] / floors["one" if "no gradient" in name or "one" in name else "two"]
    return rows


def printed(case: dict[str, Any]) -> str:
    """The case as a table."""
    head_row = [title(case), "ms", "x floor", "GiB beyond outputs", "gradient", "worst row", "logprob", "repeats"]
    lines = []
    for name, row in case["methods"].items():
        if "not_run" in row:
            lines.append([name, row["not_run"], *["-"] * 6])
            continue
        small = [row.get(key) for key in ("gradient_error", "gradient_error_worst_row", "logprob_error")]
        lines.append(
            [name, shown(row["ms"]), shown(row["ratio"]), shown(row.get("peak_gib"), 3)]
            + ["-" if value is None else f"{value:.1e}" for value in small]
            + [{True: "yes", False: "no"}.get(row.get("repeats_bit_by_bit"), "-")]  # pyright: ignore[reportArgumentType]
        )
    return table(head_row, lines)


def title(case: dict[str, Any]) -> str:
    """The case in a few words."""
    return f"D={case['width']:,} V={case['vocabulary']:,} N={case['rows']:,} {case['kind']}"


def overview() -> str:
    """Of the kept result, ours in every case."""
    head_row = ["", "floor, ms", "ours, ms", "x floor", "GiB", "gradient", "worst row", "logprob"]
    head_row += ["one matmul, ms", "no gradient, ms", "x one matmul", "GiB"]
    lines = []
    for case in read_json(RESULT)["cases"]:
        ours, plain = (case["methods"][name] for name in ("ours", "ours, no gradient"))
        small = (ours[key] for key in ("gradient_error", "gradient_error_worst_row", "logprob_error"))
        both = [
            [shown(way["ms"] / way["ratio"]), shown(way["ms"]), shown(way["ratio"]), shown(way["peak_gib"])]
            for way in (ours, plain)
        ]
        lines.append([title(case), *both[0], *(f"{value:.1e}" for value in small), *both[1]])
    return table(head_row, lines)


def beside_rivals() -> str:
    """Of the kept result, the cases that rivals were measured in."""
    return "\n\n".join(printed(case) for case in read_json(RESULT)["cases"] if case["rivals"])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--seconds", type=float, default=140)
    parser.add_argument("--commit", help="where the history is not there")
    parser.add_argument("--trial", action="store_true", help="toy sizes, nothing written")
    args = parser.parse_args()
    if DEVICE.type == "cpu" and not args.trial:
        parser.error("needs a CUDA GPU; --trial runs anywhere")
    began = time.monotonic()
    result: dict[str, Any] = {**about("python -m benchmarks.linear_logprobs", args.commit), "cases": [], "no_time": []}
    for case in TRIAL if args.trial else CASES:
        used = time.monotonic() - began
        if used > args.seconds - 8:
            result["no_time"].append(vars(case))
            continue
        result["cases"].append(measured(case, 64 if args.trial else args.rows, began + args.seconds - 5))
        result["seconds"] = time.monotonic() - began
        print(f"{printed(result['cases'][-1])}\n[{result['seconds']:.0f} s]\n", flush=True)
        if not args.trial:
            write_json(args.out, result)
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    for case in result["no_time"]:
        print(f"no time left for {case}")


if __name__ == "__main__":
    main()
