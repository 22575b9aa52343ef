"""What a layer does between its matmuls, beside plain transformers, one-kernel torch and Liger: time, memory, errors.

    python -m benchmarks.elementwise [--out FILE]     # one card, about a minute
    python -m benchmarks.readme                       # then: its tables in docs/performance.md
    python -m benchmarks.elementwise --trial          # a toy, on any machine: does it run?

bfloat16, N = 16,384 tokens, a frozen norm. Forward and backward are timed apart, each the median of interleaved runs,
behind a pass over 1 GiB, which empties the cache and lets the host run ahead. The floor is the bytes that have to be
read and written, at the speed of a copy of 1 GiB in the same rotation. The host's microseconds are those of a call
forward and one backward on 64 tokens, where the card never waits. Errors are norm-wise against
float64, on 1,024 tokens. Without a card the trial's kernels are interpreted.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import GIB, RESULTS, about, read_json, shown, table, write_json
from benchmarks.elementwise_ops import DEVICE, Case, Op, Sizes, gated_cases, norm_cases, other_norm_cases, rotary_case
from benchmarks.linear_logprobs import failures

RESULT = RESULTS / "elementwise.json"
TRIAL = Sizes(tokens=24, width=40, inner=60, heads=3, kv_heads=1, head=16)
ROUNDS = 9
HOST_TOKENS, HOST_CALLS = 64, 100 if DEVICE.type == "cuda" else 2
CHECKED_TOKENS = 1024


class Clock:
    """Milliseconds of an action on this device, behind a pass over 1 GiB."""

    def __init__(self) -> None:
        size = GIB if DEVICE.type == "cuda" else 1024
        self.large, self.copied = (torch.zeros(size // 2, dtype=torch.float16, device=DEVICE) for _ in range(2))

    def __call__(self, action: Callable[[], Any]) -> tuple[float, Any]:
        """The time, and what the action returned."""
        self.large.zero_()
        if DEVICE.type == "cpu":
            began = time.perf_counter()
            found = action()
            return 1e3 * (time.perf_counter() - began), found
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        found = action()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), found

    def bytes_per_ms(self) -> float:
        """Of a copy, read and write counted."""
        found, _ = self(lambda: self.copied.copy_(self.large))
        return 2 * self.large.nbytes / found


@dataclass(frozen=True, eq=False)
class Data:
    """Inputs, and a gradient for each output."""

    inputs: list[Tensor]
    upstream: list[Tensor]

    def leaves(self) -> list[Tensor]:
        """Inputs to differentiate by, that may be overwritten."""
        return [one.clone().requires_grad_() for one in self.inputs]

    def doubled(self) -> "Data":
        return Data(*([one.double() for one in side] for side in (self.inputs, self.upstream)))


def outputs_of(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def constants_of(case: Case, tokens: int) -> list[Tensor]:
    """Those of so many tokens: angles [1, N, R] have a row each."""
    return [one[:, :tokens] if one.ndim == 3 else one for one in case.constants]


def make_data(case: Case, tokens: int) -> Data:
    torch.manual_seed(0)
    inputs = case.inputs(tokens)
    found = outputs_of(case.exact(*inputs, *constants_of(case, tokens)))
    return Data(inputs, [torch.randn_like(one) for one in found])


def both_ways(op: Op, data: Data) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = data.leaves()
    found = outputs_of(op(*leaves))
    kept = [one.detach().clone() for one in found]
    return [*kept, *torch.autograd.grad(found, leaves, data.upstream)]


def errors(found: list[Tensor], truth: list[Tensor], outputs: int) -> dict[str, float]:
    """Norm-wise, of the worst output and of the worst gradient."""
    off = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
    return {"output_error": max(off[:outputs]), "gradient_error": max(off[outputs:])}


def host_us(op: Op, data: Data) -> float:
    """A call forward and one backward, until the host has both behind it."""
    pairs = [data.leaves() for _ in range(HOST_CALLS)]
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for leaves in pairs:
        torch.autograd.grad(outputs_of(op(*leaves)), leaves, data.upstream)
    return 1e6 * (time.perf_counter() - began) / len(pairs)


def peak_gib(op: Op, data: Data) -> float | None:
    """At most beside the inputs and their gradients' givers, forward and backward."""
    if DEVICE.type == "cpu":
        return None
    leaves = data.leaves()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(outputs_of(op(*leaves)), leaves, data.upstream)
    return (torch.cuda.max_memory_allocated() - before) / GIB


def measured(case: Case, sizes: Sizes, clock: Clock, rounds: int) -> dict[str, Any]:
    """Every way of one operation."""
    data, small, checked = (make_data(case, min(n, sizes.tokens)) for n in (sizes.tokens, HOST_TOKENS, CHECKED_TOKENS))
    constants = [one.double() for one in constants_of(case, min(CHECKED_TOKENS, sizes.tokens))]
    truth = both_ways(lambda *inputs: case.exact(*inputs, *constants), checked.doubled())
    rows: dict[str, dict[str, Any]] = {}
    ops: dict[str, Op] = {}
    for name, make in case.ways.items():
        try:
            op = make()
            rows[name] = errors(both_ways(op, checked), truth, len(data.upstream))
            rows[name] |= {
                "peak_gib": peak_gib(op, data),
                "host_us": statistics.median(host_us(op, small) for _ in "123"),
            }
            ops[name] = op
        except ModuleNotFoundError as error:
            rows[name] = {"not_run": f"{error.name} is not installed"}
        except failures() as error:
            rows[name] = {"not_run": f"{type(error).__name__}: {error}"[:200]}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ops}
    speeds = []
    for turn in range(rounds):
        speeds.append(clock.bytes_per_ms())
        begin = turn % max(len(ops), 1)
        for name, op in [*list(ops.items())[begin:], *list(ops.items())[:begin]]:
            leaves = data.leaves()
            forward, found = clock(lambda op=op, leaves=leaves: outputs_of(op(*leaves)))
            backward, _ = clock(lambda found=found, leaves=leaves: torch.autograd.grad(found, leaves, data.upstream))
            times[name][0].append(forward)
            times[name][1].append(backward)
            del found, leaves
    size, speed = data.inputs[0].element_size() * sizes.tokens, statistics.median(speeds)
    floors = size * case.forward_numbers / speed, size * case.backward_numbers / speed
    for name, (forward, backward) in times.items():
        rows[name] |= {"forward_ms": statistics.median(forward), "backward_ms": statistics.median(backward)}
        rows[name] |= {"forward_ratio": rows[name]["forward_ms"] / floors[0]}
        rows[name] |= {"backward_ratio": rows[name]["backward_ms"] / floors[1], "runs": len(forward)}
    floor = {"forward_ms": floors[0], "backward_ms": floors[1]}
    return {"operation": case.name, "floor": floor, "copy_gb_per_s": speed / 1e6, "ways": rows}


def printed(result: dict[str, Any]) -> str:
    """The operation as a table."""
    columns = ["forward_ms", "forward_ratio", "backward_ms", "backward_ratio", "peak_gib", "host_us"]
    head = [result["operation"], "forward ms", "x floor", "backward ms", "x floor", "peak GiB", "host us", "errors"]
    lines = []
    for name, row in result["ways"].items():
        if "not_run" in row:
            lines.append([name, row["not_run"], *["-"] * 6])
            continue
        off = f"{row['output_error']:.1e}, {row['gradient_error']:.1e}"
        digits = [3, 2, 3, 2, 2, 0]
        lines.append([name, *(shown(row[key], n) for key, n in zip(columns, digits, strict=True)), off])
    floor = result["floor"]
    lines.append(["floor", shown(floor["forward_ms"], 3), "1", shown(floor["backward_ms"], 3), "1", *["-"] * 3])
    return table(head, lines)


def overview() -> str:
    """The kept result's tables."""
    return "\n\n".join(printed(one) for one in read_json(RESULT)["operations"])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--commit", help="where the history is not there")
    parser.add_argument("--trial", action="store_true", help="toy sizes, nothing written")
    args = parser.parse_args()
    if DEVICE.type == "cpu" and not args.trial:
        parser.error("needs a CUDA GPU; --trial runs anywhere")
    if DEVICE.type == "cpu" and "TRITON_INTERPRET" not in os.environ:  # which Triton reads when it is imported
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.elementwise", *sys.argv[1:]], environment)
    sizes, clock, began = TRIAL if args.trial else Sizes(), Clock(), time.monotonic()
    result: dict[str, Any] = {**about("python -m benchmarks.elementwise", args.commit), **vars(sizes), "operations": []}
    for case in [*norm_cases(sizes), *other_norm_cases(sizes), rotary_case(sizes), *gated_cases(sizes)]:
        result["operations"].append(measured(case, sizes, clock, 2 if args.trial else ROUNDS))
        result["seconds"] = time.monotonic() - began
        print(f"{printed(result['operations'][-1])}\n", flush=True)
        if not args.trial:
            write_json(args.out, result)
    print(f"[{result['seconds']:.0f} s]")


if __name__ == "__main__":
    main()
