"""NF4 matrices made bfloat16, by our kernel and by bitsandbytes: time, speed of memory, the host's time, the same bits.

    python -m benchmarks.nf4 [--out FILE]     # one card, under a minute
    python -m benchmarks.readme               # then: its table in docs/performance.md
    python -m benchmarks.nf4 --cuts           # other cuts of the work beside it; nothing written
    python -m benchmarks.nf4 --trial          # a toy, on any machine: does it run?

The matrices are those of a layer of Qwen2.5-1.5B and 7B as a run has them (q, k, v and gate, up fused), random. As many
of a shape as make half a GiB lie beside one another, so that no cache holds one when its turn comes again, and a CUDA
graph has a call for each: what is timed is the card's time, the start of each kernel included, and not the host's. The
floor is a copy of as many bytes as are read and written, in the same rotation and the same kind of graph. Medians of
interleaved rounds, each in another order. The host's microseconds are those of `nf4.dequantize` on one small matrix,
where the card never waits. Without a card the trial's kernel is interpreted, in float16.
"""

import argparse
import math
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
from benchmarks.elementwise import Clock
from benchmarks.elementwise_ops import DEVICE, DTYPE
from reasoner.kernels import nf4 as kernel
from reasoner.models import nf4

RESULT = RESULTS / "nf4.json"
CARD = DEVICE.type == "cuda"
SHAPES = {
    "1.5B, q k v": (2048, 1536),
    "1.5B, o": (1536, 1536),
    "1.5B, gate up": (17_920, 1536),
    "1.5B, down": (1536, 8960),
    "7B, q k v": (4608, 3584),
    "7B, o": (3584, 3584),
    "7B, gate up": (37_888, 3584),
    "7B, down": (3584, 18_944),
}
TRIAL = {"a toy": (5, 128), "another": (64, 64)}
OUTPUT_BYTES = GIB // 2 if CARD else 1
LEAST = 3  # matrices of a shape
ROUNDS, HOST_CALLS, HOST_ROUNDS = (15, 200, 5) if CARD else (2, 2, 2)
CUTS = [(256, 2), (256, 4), (512, 8), (1024, 4), (1024, 8), (2048, 8)]  # words and warps


@dataclass(frozen=True, eq=False)
class Matrices:
    """Several of one shape, their numbers' places, and as many bytes to copy as each reads and writes."""

    packed: list[tuple[Tensor, Any]]
    outs: list[Tensor]
    source: Tensor
    target: Tensor

    @property
    def nbytes(self) -> int:
        """Read and written by one matrix."""
        return 2 * self.source[0].nbytes


def make(rows: int, columns: int, many: int) -> Matrices:
    """Random bytes, and scales of about 1."""
    numbers = rows * columns
    data = torch.randint(0, 256, (many, numbers // 2, 1), dtype=torch.uint8, device=DEVICE)
    absmax = torch.rand(many, numbers // nf4.BLOCK, device=DEVICE) + 0.5
    packed = [(one, nf4.make_state(scales, rows, columns)) for one, scales in zip(data, absmax, strict=True)]
    for _, state in packed:
        state.dtype = DTYPE
    outs = list(torch.empty(many, rows, columns, dtype=DTYPE, device=DEVICE))
    moved = (numbers // 2 + 4 * numbers // nf4.BLOCK + 2 * numbers) // 2
    return Matrices(packed, outs, *torch.empty(2, many, moved, dtype=torch.uint8, device=DEVICE))


def by_bitsandbytes(data: Tensor, state: Any, out: Tensor) -> None:
    """Its operation, to where we want it; its CPU's has no such place."""
    given = data, state.absmax, nf4.BLOCK, state.quant_type, state.shape, state.dtype
    if CARD:
        torch.ops.bitsandbytes.dequantize_4bit.out(*given, out=out)
    else:
        out.copy_(torch.ops.bitsandbytes.dequantize_4bit.default(*given))


def by_kernel(cut: tuple[int, int] | None = None) -> Callable[[Tensor, Any, Tensor], None]:
    """Ours, in its own cut or another."""
    from reasoner.kernels import nf4_triton

    own = nf4_triton.CUT if cut is None else nf4_triton.Cut(*cut)
    return lambda data, state, out: nf4_triton.dequantize(data, state.absmax, state.code, out, cut=own)


def ways(cuts: bool) -> dict[str, Callable[[Tensor, Any, Tensor], None]]:
    """By name."""
    found = {"bitsandbytes": by_bitsandbytes, "kernel": by_kernel()}
    return found | {f"{words} words, {warps} warps": by_kernel((words, warps)) for words, warps in CUTS if cuts}


def graphed(action: Callable[[], None]) -> Callable[[], None]:
    """The action as one CUDA graph, on a card; it was done once before."""
    action()
    if not CARD:
        return action
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def measured(name: str, shape: tuple[int, int], clock: Clock, *, cuts: bool) -> dict[str, Any]:
    """Microseconds a matrix of every way, and of the copy."""
    torch.manual_seed(0)
    matrices = make(*shape, many=max(OUTPUT_BYTES // (2 * math.prod(shape)), LEAST))
    calls: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, Any]] = {}
    expected = None
    for way, dequantize in ways(cuts).items():

        def each(dequantize=dequantize) -> None:
            for (data, state), out in zip(matrices.packed, matrices.outs, strict=True):
                dequantize(data, state, out)

        calls[way] = graphed(each)
        last = matrices.outs[-1].view(torch.int16)
        expected = last.clone() if expected is None else expected
        rows[way] = {"same_bits": torch.equal(last, expected)}
        last.zero_()

    def copies() -> None:
        for source, target in zip(matrices.source, matrices.target, strict=True):
            target.copy_(source)

    calls["copy"], rows["copy"] = graphed(copies), {}
    times: dict[str, list[float]] = {way: [] for way in calls}
    order = list(calls)
    for turn in range(ROUNDS):
        begin = turn % len(order)
        for way in [*order[begin:], *order[:begin]]:
            times[way].append(clock(calls[way])[0])
    for way, found in times.items():
        rows[way]["us"] = 1e3 * statistics.median(found) / len(matrices.outs)
        rows[way]["gb_per_s"] = 1e-3 * matrices.nbytes / rows[way]["us"]
    for way in rows:
        rows[way]["ratio"] = rows[way]["us"] / rows["copy"]["us"]
    return {"matrix": name, "shape": list(shape), "matrices": len(matrices.outs), "runs": ROUNDS, "ways": rows}


def host_us() -> dict[str, float]:
    """Of a call as a layer makes it, with room for its result, until the host has it behind it."""
    ((data, state),) = make(64, 64, many=1).packed
    times: dict[str, list[float]] = {"bitsandbytes": [], "kernel": []}
    own = kernel.PREFER_TRITON
    for _ in range(HOST_ROUNDS):
        for way, found in times.items():
            kernel.PREFER_TRITON = way == "kernel"
            nf4.dequantize(data, state)
            if CARD:
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(HOST_CALLS):
                nf4.dequantize(data, state)
            found.append(1e6 * (time.perf_counter() - began) / HOST_CALLS)
    kernel.PREFER_TRITON = own
    return {way: statistics.median(found) for way, found in times.items()}


def printed(result: dict[str, Any]) -> str:
    """The table, and the host's time."""
    names = [name for name in result["matrices"][0]["ways"] if name != "copy"]
    head = ["matrix", "rows x columns", "floor, us", *(f"{name}, us | GB/s | x floor" for name in names), "same bits"]
    lines = []
    for one in result["matrices"]:
        found = [one["ways"][name] for name in names]
        parts = [f"{shown(row['us'], 1)} | {shown(row['gb_per_s'], 0)} | {shown(row['ratio'], 2)}" for row in found]
        same = "yes" if all(row["same_bits"] for row in found) else "no"
        shape = " x ".join(f"{size:,}" for size in one["shape"])
        lines.append([one["matrix"], shape, shown(one["ways"]["copy"]["us"], 1), *parts, same])
    columns = " | ".join(head).split(" | ")
    host = ", ".join(f"{name} {shown(us, 1)}" for name, us in result["host_us"].items())
    return f"{table(columns, lines)}\n\nThe host's microseconds a call: {host}."


def overview() -> str:
    """The kept result's table."""
    return printed(read_json(RESULT))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--commit", help="where the history is not there")
    parser.add_argument("--cuts", action="store_true", help="other cuts of the work too, nothing written")
    parser.add_argument("--trial", action="store_true", help="toy sizes, nothing written")
    args = parser.parse_args()
    if not CARD and not args.trial:
        parser.error("needs a CUDA GPU; --trial runs anywhere")
    if not CARD and "TRITON_INTERPRET" not in os.environ:  # which Triton reads when it is imported
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.nf4", *sys.argv[1:]], environment)
    nf4.check_installed("benchmarks.nf4")
    began, clock = time.monotonic(), Clock()
    shapes = TRIAL if args.trial else SHAPES
    result: dict[str, Any] = about("python -m benchmarks.nf4", args.commit)
    result |= {"host_us": host_us(), "matrices": []}
    for name, shape in shapes.items():
        result["matrices"].append(measured(name, shape, clock, cuts=args.cuts))
        result["seconds"] = time.monotonic() - began
        if not (args.trial or args.cuts):
            write_json(args.out, result)
    print(f"{printed(result)}\n\n[{result['seconds']:.0f} s]")


if __name__ == "__main__":
    main()
