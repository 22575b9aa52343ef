"""What sharing one base with vLLM costs and saves: memory, agreement, hand-over, sleep, speed. Needs a CUDA GPU.

    python -m benchmarks.shared_base --model smol|1.5b|7b --quantize nf4|none --out FILE

`smol` is SmolLM2-135M-Instruct (`make smol`); the other shapes have random weights. Figures are of one process, medians
where a thing is repeated.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import GIB, about, write_json
from benchmarks.random_model import random_policy
from reasoner import config
from reasoner.compose import compose_conf
from reasoner.config import validate
from reasoner.models import adapters, base_model
from reasoner.models.attention import Layout
from reasoner.models.loading import load_model, load_tokenizer
from reasoner.models.policy import OneSequence, Policy
from reasoner.rollout.engine import Sampling
from reasoner.rollout.vllm_engine import VllmEngine
from reasoner.types import Completion, Prompt

QUESTIONS = (
    "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many did she sell in all?",
    "Weng earns $12 an hour for babysitting. Yesterday she did 50 minutes of it. How much did she earn?",
    "Explain why the sky is blue.",
    "Write a short poem about rivers.",
    "What is the capital of France, and why is it famous?",
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts does it take in all?",
    "List three uses of copper.",
    "James runs 3 sprints of 60 meters 3 times a week. How many meters does he run a week?",
)
Rows = list[tuple[tuple[int, ...], Completion]]


def now() -> float:
    """Seconds, with the card's work done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def used_gib() -> float:
    """What the card holds, whoever holds it."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def timed(action: Callable[[], Any], times: int) -> dict[str, float]:
    """Milliseconds: the median and the slowest."""
    found = []
    for _ in range(times):
        began = now()
        action()
        found.append((now() - began) * 1e3)
    return {"median_ms": statistics.median(found), "slowest_ms": max(found), "times": times}


def make_policy(model: str, quantize: str, rank: int) -> tuple[Policy, list[tuple[int, ...]]]:
    """The policy, and eight prompts."""
    lora = config.Lora(r=rank, alpha=2 * rank)
    if model == "smol":
        overrides = [f"model.quantize={quantize}", f"model.lora.r={rank}", f"model.lora.alpha={2 * rank}"]
        settings = validate(compose_conf("smol", overrides).values).model
        tokenizer = load_tokenizer(settings)
        turns = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
        policy = load_model(settings, tokenizer, seed=0, engine_rows=True)
        return policy, [tuple(tokenizer(turn)["input_ids"]) for turn in turns]
    draws = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(3, 30_000, (40 + 3 * i,), generator=draws).tolist()) for i in range(8)]
    return random_policy(model, nf4=quantize == "nf4", lora=lora, engine_rows=True), prompts


@torch.no_grad()
def change(policy: Policy, seed: int, std: float) -> None:
    """Draw every B anew."""
    draws = torch.Generator("cuda").manual_seed(seed)
    for name, weight in policy.trainable().items():
        if adapters.place_of(name)[1] == "B":
            weight.copy_(torch.randn(weight.shape, generator=draws, device="cuda") * std)


def prompts_of(rows: Sequence[tuple[int, ...]]) -> list[Prompt]:
    """The rows as prompts."""
    return [Prompt(id=str(i), text="", answer="", columns={}, token_ids=ids) for i, ids in enumerate(rows)]


def sample(engine: VllmEngine, rows: Sequence[tuple[int, ...]], step: int, **how: Any) -> Rows:
    """(prompt's ids, completion) of each, 8 x 64 tokens at temperature 1 unless told; nothing ends early."""
    settings = {"temperature": 1.0, "max_tokens": 64, "num_completions": 8, "stop_ids": (), "seed": 0, **how}
    found = engine.generate(prompts_of(rows), Sampling(**settings), policy_step=step)
    return [(ids, completion) for ids, several in zip(rows, found, strict=True) for completion in several]


def scored(policy: Policy, rows: Rows) -> Tensor:
    """The policy's logprobs of the completions: [rows, tokens]."""
    found = [policy.score(ids + completion.token_ids)[len(ids) - 1 :].cpu() for ids, completion in rows]
    return torch.stack(found)


def apart(one: Tensor, other: Tensor) -> dict[str, float]:
    """How far two sides' logprobs of the same tokens are from each other, nats."""
    off = (one - other).double()
    ratio = off.neg().exp()
    return {
        "mean": float(off.abs().mean()),
        "p99": float(off.abs().flatten().quantile(0.99)),
        "max": float(off.abs().max()),
        "mean_ratio": float(ratio.mean()),
        "outside_share": float(((ratio < 0.9) | (ratio > 1.1)).double().mean()),
    }


def truth_of(policy: Policy) -> Policy:
    """The same model in float32 on the same (dequantized) weights, the adapter merged in float32."""
    weights = policy.weights
    assert weights is not None
    matrices = {adapters.place_of(name): weight.detach().float() for name, weight in policy.trainable().items()}

    def source():
        for name, tensor in weights.tensors.items():
            module = name.removesuffix(".weight")
            value = weights.matrix(module).float() if module in weights.states else tensor.float()
            if name.endswith(".weight") and (module, "A") in matrices:
                value = value + policy.adapter_scaling * matrices[module, "B"] @ matrices[module, "A"]
            yield name, value

    base, _ = base_model.build(policy.base.config, source(), device=policy.device, dtype=torch.float32, quantize=False)
    return Policy(base, policy.family, revision=None)


def measure_agreement(policy: Policy, engine: VllmEngine, prompts: list[tuple[int, ...]], std: float) -> dict[str, Any]:
    """Engine against trainer, and both against float32, with an active adapter."""
    change(policy, 1, std)
    engine.load_adapter(policy.trainable(), 1)
    rows = sample(engine, prompts, 1)
    sampled = torch.tensor([completion.sampling_logprobs for _, completion in rows])
    trainer = scored(policy, rows)
    found = {"engine_trainer": apart(sampled, trainer)}
    with policy.model.disable_adapter():  # pyright: ignore[reportCallIssue]
        found["adapter_effect"] = apart(trainer, scored(policy, rows))
    assert policy.weights is not None
    if policy.weights.nbytes < 4 * GIB:
        exact = scored(truth_of(policy), rows)
        found |= {"engine_truth": apart(sampled, exact), "trainer_truth": apart(trainer, exact)}
    found["same_again"] = {"bit_for_bit": float(rows == sample(engine, prompts, 1))}
    return found


def measure_hand_over(policy: Policy, engine: VllmEngine, prompts: list[tuple[int, ...]], std: float) -> dict[str, Any]:
    """Three adapters in a row: does each arrive, and what does the first token lose without a reset?"""
    long = [(ids * 8)[:200] for ids in prompts]
    found: dict[str, Any] = {"arrivals": []}
    for step in range(10, 13):
        sample(engine, long, engine.policy_step or 0, max_tokens=1, num_completions=1)
        change(policy, step, std)
        engine.adapter.load(policy.trainable())
        engine._cached = False  # as if it had been dropped
        stale = sample(engine, long, engine.policy_step or 0, max_tokens=1, num_completions=1)
        stale_off = apart(torch.tensor([c.sampling_logprobs for _, c in stale]), scored(policy, stale))["mean"]
        engine.load_adapter(policy.trainable(), step)
        fresh = sample(engine, long, step, max_tokens=16, num_completions=1)
        off = torch.tensor([c.sampling_logprobs for _, c in fresh]) - scored(policy, fresh)
        arrived = engine.reading.arrived if engine.reading else None
        found["arrivals"].append(
            {
                "mean": float(off.abs().mean()),
                "first_token": float(off[:, 0].abs().mean()),
                "first_token_without_reset": stale_off,
                "canary_arrived": arrived,
            }
        )
    state = policy.trainable()
    found["copy"] = timed(lambda: engine.adapter.load(state), 20)
    found["reset"] = timed(engine.llm.reset_prefix_cache, 20)
    found["canary"] = timed(lambda: policy.score(engine._probe), 5)
    found["copies_mib"] = engine.adapter.nbytes / 2**20
    return found


def measure_sleep(policy: Policy, engine: VllmEngine, prompts: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    """Three turns of training and sampling: seconds, GiB, and whether the bare base says the same."""
    change(policy, 0, 0.0)
    engine.load_adapter(policy.trainable(), 20)
    greedy = {"temperature": 0.0, "num_completions": 1, "max_tokens": 32}
    before, turns = sample(engine, prompts, 20, **greedy), []
    layout = Layout.of([512] * 4, policy.device)
    ids = torch.arange(2048, device=policy.device)
    for _ in range(3):
        gc.collect()
        torch.cuda.empty_cache()
        held, began = used_gib(), now()
        engine.sleep()
        down, low = now() - began, used_gib()
        policy.logprobs(OneSequence(ids, layout, layout.positions > 0), temperature=1.0).logprobs.sum().backward()
        for weight in policy.trainable().values():
            weight.grad = None
        torch.cuda.empty_cache()
        began = now()
        engine.wake()
        up = now() - began
        engine.load_adapter(policy.trainable(), 20)
        turns.append(
            {
                "down_s": down,
                "up_s": up,
                "freed_gib": held - low,
                "asleep_gib": low,
                "awake_gib": used_gib(),
                "base_bit_identical": sample(engine, prompts, 20, **greedy) == before,
            }
        )
    return turns


def measure_speed(engine: VllmEngine, prompts: list[tuple[int, ...]]) -> dict[str, Any]:
    """Tokens a second with logprobs and adapter, 128 + 128 tokens; three timings each."""
    found = {}
    for num in (64, 256):
        rows = [(*(prompts[i % 8] * 8)[:127], i + 3) for i in range(num)]
        sample(engine, rows, 20, num_completions=1, max_tokens=8)
        seconds = []
        for seed in range(3):
            began = now()
            sample(engine, rows, 20, num_completions=1, max_tokens=128, seed=seed)
            seconds.append(now() - began)
        found[f"tokens_per_s_{num}"] = num * 128 / statistics.median(seconds)
    return found


def policy_16_bits(policy: Policy) -> float:
    """GiB of the NF4 matrices in 16 bits."""
    assert policy.weights is not None
    return sum(2 * state.shape.numel() for state in policy.weights.states.values()) / GIB


def measure(model: str, quantize: str, rank: int, kv_gib: float, dequantize: bool) -> dict[str, Any]:
    """Everything, in one process."""
    torch.mm(*torch.ones(2, 64, 64, device="cuda"))  # CUDA and cuBLAS are up before the first figure
    empty = used_gib()
    began = now()
    policy, prompts = make_policy(model, quantize, rank)
    gc.collect()
    torch.cuda.empty_cache()
    assert policy.weights is not None
    loaded = used_gib()
    memory: dict[str, Any] = {
        "base_gib": policy.weights.nbytes / GIB,
        "loaded_gib": loaded - empty,
        "load_peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "load_s": now() - began,
    }
    checksum = policy.weights.checksum()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = now()
    sizes: Any = {"max_context": 1024, "kv_bytes": int(kv_gib * GIB), "dequantize": dequantize}
    engine = VllmEngine(policy, str, config.Rollout(), **sizes)
    gc.collect()
    memory |= {"start_s": now() - began, "start_peak_gib": torch.cuda.max_memory_allocated() / GIB}
    torch.cuda.empty_cache()
    memory |= {
        "module_peak_mib": engine.built.peak / 2**20,
        "module_left_mib": engine.built.left / 2**20,
        "beyond_kv_gib": used_gib() - loaded - kv_gib - (policy_16_bits(policy) if dequantize else 0),
        "kv_gib": kv_gib,
    }
    std = 0.02 if model == "smol" else 0.01
    found: dict[str, Any] = {"memory": memory, "agreement": measure_agreement(policy, engine, prompts, std)}
    found["hand_over"] = measure_hand_over(policy, engine, prompts, std)
    found["sleep"] = measure_sleep(policy, engine, prompts)
    found["speed"] = measure_speed(engine, prompts)
    found["base_unchanged"] = policy.weights.checksum() == checksum
    runner = type(engine.llm.collective_rpc(lambda worker: worker.model_runner)[0])
    found["model_runner"] = runner.__module__
    began = now()
    engine.close()
    found["close"] = {"seconds": now() - began, "left_gib": used_gib() - empty}
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smol", "1.5b", "7b"], required=True)
    parser.add_argument("--quantize", choices=["nf4", "none"], required=True)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--kv-gib", type=float, default=8.0)
    parser.add_argument("--dequantize", action="store_true", help="hold an NF4 base in 16 bits too while sampling")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where the checkout has no history")
    asked = parser.parse_args()
    command = f"python -m benchmarks.shared_base --model {asked.model} --quantize {asked.quantize} --rank {asked.rank}"
    command += " --dequantize" * asked.dequantize
    found = measure(asked.model, asked.quantize, asked.rank, asked.kv_gib, asked.dequantize)
    for part, figures in found.items():
        print(f"{part}: {figures}", flush=True)
    if asked.out:
        write_json(
            asked.out, {**about(command, asked.commit), "model": asked.model, "quantize": asked.quantize, **found}
        )


if __name__ == "__main__":
    main()
