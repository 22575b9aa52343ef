"""Tokens a second that vLLM samples on the trainer's base: with adapter (r=32) and logprobs, prompts of 128, 256 new
tokens each, none ends early. Needs a CUDA GPU with vLLM.

    python -m benchmarks.rollout [--rows NAME ...] [--repeats 3] [--out FILE]

Rows: SHAPE-BASE[-OTHER], shapes of random weights; the base is `bf16`, `nf4` (dequantized for every token) or `nf4-16`
(held in 16 bits while sampling, rollout.dequantize); `-single` asks vLLM's scheduler before every token, as vLLM itself
does, where the others ask it once a burst; `-apart` keeps no rows for the adapter's A's below a 16-bit base, so that
they are products of their own. Every row is an engine of its own in this process; numbers are medians of `--repeats`
calls after one to warm up, and are written after each row.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import GIB, about, run_and_leave, shown, table, write_json
from benchmarks.random_model import random_policy
from benchmarks.shared_base import policy_16_bits, prompts_of
from reasoner import config
from reasoner.rollout import vllm_bursts
from reasoner.rollout.engine import Sampling
from reasoner.rollout.vllm_engine import VllmEngine

ROWS = (
    *("135m-bf16-single", "135m-bf16-apart", "135m-bf16", "135m-nf4-16"),
    *("1.5b-bf16-apart", "1.5b-bf16", "1.5b-nf4-single", "1.5b-nf4", "1.5b-nf4-16"),
)
PROMPT, NEW, SEQUENCES = 128, 256, (64, 256)


def measure(row: str, repeats: int, kv_gib: float) -> dict[str, Any]:
    """A row's tokens a second by the number of sequences, and its memory in GiB."""
    shape, base, *_ = row.split("-")
    single, dequantize = row.endswith("-single"), row.endswith("-16")
    together = not row.endswith("-apart")
    policy = random_policy(shape, nf4=base == "nf4", lora=config.Lora(r=32, alpha=64), engine_rows=together)
    began = time.perf_counter()
    sizes: Any = {"max_context": PROMPT + NEW, "kv_bytes": int(kv_gib * GIB), "dequantize": dequantize}
    bursts = vllm_bursts.BURST, vllm_bursts.BURST_WHILE_OTHERS_WAIT
    engine = VllmEngine(policy, lambda ids: "", config.Rollout(), **sizes)
    found: dict[str, Any] = {"start_s": time.perf_counter() - began, "in_16_bits_gib": policy_16_bits(policy)}
    try:
        if single:
            vllm_bursts.BURST = vllm_bursts.BURST_WHILE_OTHERS_WAIT = 1
        engine.load_adapter(policy.trainable(), 0)
        for sequences in SEQUENCES:
            seconds = [_seconds(engine, sequences, seed) for seed in range(repeats + 1)][1:]
            found[f"tokens_per_s_{sequences}"] = sequences * NEW / statistics.median(seconds)
            found[f"seconds_{sequences}"] = seconds
    finally:
        vllm_bursts.BURST, vllm_bursts.BURST_WHILE_OTHERS_WAIT = bursts
        engine.close()
    return found


def _seconds(engine: VllmEngine, sequences: int, seed: int) -> float:
    draws = torch.Generator().manual_seed(seed)
    rows = [tuple(torch.randint(3, 30_000, (PROMPT,), generator=draws).tolist()) for _ in range(sequences)]
    sampling = Sampling(temperature=1.0, max_tokens=NEW, num_completions=1, stop_ids=(), seed=seed)
    began = time.perf_counter()
    engine.generate(prompts_of(rows), sampling, policy_step=0)
    return time.perf_counter() - began


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kv-gib", type=float, default=8)
    parser.add_argument("--out", type=Path, help="nothing is written without it")
    parser.add_argument("--commit", help="where the checkout has no history")
    asked = parser.parse_args()
    command = f"python -m benchmarks.rollout --rows {' '.join(asked.rows)} --repeats {asked.repeats}"
    result = about(command, asked.commit) | {"prompt": PROMPT, "new": NEW, "rows": {}}
    for row in asked.rows:
        found = result["rows"][row] = measure(row, asked.repeats, asked.kv_gib)
        if asked.out:
            write_json(asked.out, result)
        print(row, {name: value for name, value in found.items() if "seconds" not in name}, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    names = [f"tokens_per_s_{sequences}" for sequences in SEQUENCES]
    rows = [[row, *(shown(found[name], 0) for name in names)] for row, found in result["rows"].items()]
    print(table(["tokens a second", *(f"{sequences} sequences" for sequences in SEQUENCES)], rows))


if __name__ == "__main__":
    run_and_leave(main)
