"""GRPO by this project and by TRL 1.16 (colocated vLLM) on one card, one after the other, the same work for both.

    python -m benchmarks.beside_trl --model DIR --data DIR --out FILE.json [--order NAME ...] [--natural N] [--fixed N]

`--model` is the folder that benchmarks/word_model.py made, `--data` that of benchmarks/word_data.py. The sides:

- trl-defaults: 64 completions a micro-batch, no gradient checkpointing, a fifth of the card for vLLM, no sleep
- trl-tuned: gradient checkpointing, sleep mode, `--kv-gib` for vLLM's cache, `--micro` completions a micro-batch
- bf16, nf4: this project, with that base

All get the same prompt ids in the same order, 32 x 8 completions a step of at most 200 tokens at temperature 1, the
same reward function, loss (DAPO's clips), learning rate, warm-up, gradient clip, LoRA and stop ids; TRL's vLLM gets the
CUDA graphs without inductor that are faster here. First `--natural` steps at natural lengths, then every held-out
problem answered greedily (one judge for all), then `--fixed` steps of completions that are all 200 tokens long, on our
side rewarded by a coin: groups of equal rewards cost this project no update, and TRL as much as any. Seconds are
medians after 3 steps of warm-up. Memory is the device's, seen every 20 ms. FILE.json is written after each side.

`start_s` says where the seconds from the process's start to the first answered prompts went. The first side also fills
the caches on disk: vLLM's, Triton's, and Python's bytecode, which the sides keep in a folder of their own where the
environment keeps none; without it every start compiles thousands of modules anew. Run twice, the second is warm.
"""

import argparse
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    GIB,
    DeviceMemory,
    Job,
    about,
    after_warm_up,
    bytecode_folder,
    judged,
    median,
    read_json,
    run_jobs,
    shown,
)
from benchmarks.common import table as markdown
from benchmarks.common import write_json as write
from benchmarks.word_problems import SETS, model_and_data
from reasoner.compose import compose_conf, quoted
from reasoner.config import validate
from reasoner.rewards.base import load_rewards

TRL = ("trl-defaults", "trl-tuned")
OURS = ("bf16", "nf4")
PROMPTS, COMPLETIONS, MAX_TOKENS, EVAL_TOKENS = 32, 8, 200, 256
PARTS = ("generate", "sync", "reward", "logprobs", "update", "seconds")
PHASES = ("natural", "fixed")


class Record:
    """What one side measured so far; every change is on disk at once."""

    def __init__(self, path: Path, born: float):
        self.path, self.born, self._marked = path, born, born
        self.memory = DeviceMemory()
        self.found: dict[str, Any] = {"steps": [], "peak_gib": {}, "kv_gib": None, "error": None, "start_s": {}}
        self.found["device_gib_before"] = self.memory.used_gib()

    def set(self, **values: Any) -> None:
        """Add values."""
        self.found |= values
        write(self.path, self.found)

    def mark(self, phase: str, *, late: float = 0.0) -> None:
        """A phase of the start ended, so many seconds ago: it has the time since the last mark."""
        ended = time.time() - late
        phases = self.found["start_s"]
        phases[phase] = phases.get(phase, 0.0) + ended - self._marked
        self._marked = ended

    def mark_after(self, owner: Any, function: str, phase: str) -> None:
        """Have a phase end whenever this function of the module ends."""
        original = getattr(owner, function)

        def marked(*arguments: Any, **named: Any) -> Any:
            given = original(*arguments, **named)
            self.mark(phase)
            return given

        setattr(owner, function, marked)

    def first_sampled(self, *, late: float = 0.0) -> None:
        """The first prompts of training were answered, so many seconds ago."""
        if "first_sample_s" not in self.found:
            self.mark("first sample", late=late)
            self.found["first_sample_s"] = self._marked - self.born

    def step(self, phase: str, **values: float) -> None:
        """A step is over. The peak of a phase is that of its steps alone."""
        self.found["steps"].append({"phase": phase, **values})
        self.found["peak_gib"][phase] = self.memory.peak_gib
        if torch.cuda.is_available():
            self.found[f"torch_peak_gib_{phase}"] = torch.cuda.max_memory_allocated() / GIB
        write(self.path, self.found)
        print(f"{phase} {len(self.found['steps'])} {values}", flush=True)

    def begin(self) -> None:
        """A phase begins."""
        self.memory.reset()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def heldout(self, name: str, texts: Sequence[str], golds: Sequence[str]) -> None:
        """A held-out set is answered."""
        self.found.setdefault("heldout", {})[name] = judged(texts, golds)
        write(self.path, self.found)


def settings(given: argparse.Namespace, quantize: str) -> list[str]:
    """The work as settings of conf=smol."""
    names = [name for name in SETS if (given.data / f"{name}.jsonl").exists()]
    return [
        *model_and_data(given.model, given.data),
        *(f"evaluate.sets.{name}.path={quoted(str(given.data / f'{name}.jsonl'))}" for name in names),
        "stages=[grpo,evaluate]",
        f"model.quantize={quantize}",
        "rollout=" + ("hf" if given.trial else "vllm"),
        f"rollout.kv_gib={given.kv_gib}",
        f"grpo.prompts_per_step={given.prompts}",
        f"grpo.completions_per_prompt={COMPLETIONS}",
        f"grpo.max_completion_tokens={given.max_tokens}",
        "evaluate.samples=0",
        f"evaluate.max_completion_tokens={EVAL_TOKENS if not given.trial else given.max_tokens}",
        *([f"evaluate.problems={given.problems}"] if given.problems else []),
    ]


def our_side(given: argparse.Namespace, record: Record) -> None:
    """This project's steps."""
    from benchmarks.practice import practice
    from reasoner import assembly
    from reasoner.rollout import vllm_engine, vllm_start

    record.mark("imports")
    for owner, function, phase in (
        (assembly, "load_task", "data"),
        (assembly, "_rehearse", "rewards"),
        (assembly, "load_model", "model"),
        (assembly, "plan_memory", "rehearsal"),
        (vllm_start, "import_vllm", "vLLM's imports"),
        (vllm_engine, "start", "vLLM"),
    ):
        record.mark_after(owner, function, phase)
    typed = settings(given, "nf4" if given.side == "nf4" else "none")
    record.set(settings=[setting for setting in typed if "path=" not in setting and "name=" not in setting])
    conf = compose_conf("smol", typed)
    how: dict[str, Any] = {"base_dir": conf.folder, "functions": {}, "rows": None}
    with (
        ExitStack() as closing,
        practice(lambda console: assembly.assemble(validate(conf.values), console=console, **how)) as run,
    ):
        record.mark("other")
        memory = run.parts.memory
        record.set(kv_gib=memory.kv_bytes / GIB if memory else None, parts_gib=memory.parts_gib() if memory else None)
        for phase, steps in (("natural", given.natural), ("fixed", given.fixed)):
            record.begin()
            for _ in range(steps):
                report = run.step()
                record.first_sampled(late=report.values["step_s"] - report.values["generate_s"])
                record.step(phase, **our_numbers(report.values, COMPLETIONS * given.prompts))
            if phase == "natural":
                found = run.parts.evaluator.run(
                    run.parts.engine, run.parts.task.sets, policy_step=run.taken, progress=lambda line: None
                )
                for name, result in found.items():
                    golds = {prompt.id: prompt.answer for prompt in run.parts.task.sets[name]}
                    answered = result.problems
                    record.heldout(name, [one.text for one in answered], [golds[one.id] for one in answered])
                run.ignore_stops()
                coins = validate(compose_conf("smol", [*typed, "reward=benchmarks.rewards:coin"]).values).reward
                closing.callback(run.trainer.rewards.close)
                run.trainer.rewards = load_rewards(coins, base_dir=conf.folder, columns=set())


def our_numbers(values: Mapping[str, float], completions: int) -> dict[str, float]:
    """A step's numbers under the names that both sides share."""
    named = {part: values[f"{part}_s"] for part in PARTS[:-1]}
    return {
        **named,
        "seconds": values["step_s"],
        "tokens": values["completion_tokens_mean"] * completions,
        "reward_mean": values["reward_mean"],
        "gap": values["logprob_gap_mean"],
    }


def run_side(given: argparse.Namespace) -> None:
    """One side in this process; what it measured before an error stays."""
    record = Record(given.work, given.born)
    try:
        if given.side in TRL:
            from benchmarks.trl_side import trl_side

            trl_side(given, record)
        else:
            our_side(given, record)
    except BaseException as error:
        traceback.print_exc()
        record.set(error=f"{type(error).__name__}: {error}"[:600])
        raise
    record.set(seconds=time.time() - given.born)


def summary(side: Mapping[str, Any]) -> dict[str, Any]:
    """A side's medians by phase, and memory beside the cache."""
    found: dict[str, Any] = {}
    for phase in PHASES:
        steps = after_warm_up([step for step in side.get("steps", []) if step["phase"] == phase])
        if not steps:
            continue
        row = {name: median(step.get(name) for step in steps) for name in (*PARTS, "tokens")}
        row["tokens_per_s"] = row["tokens"] / row["seconds"] if row["tokens"] and row["seconds"] else None
        peak, kv = side["peak_gib"].get(phase), side.get("kv_gib")
        row |= {"steps": len(steps), "peak_gib": peak, "kv_gib": kv}
        row["peak_without_kv_gib"] = peak - kv if peak is not None and kv is not None else None
        found[phase] = row
    return found


def tables(result: Mapping[str, Any]) -> str:
    """The sides as Markdown: seconds and memory, then accuracy."""
    speed, accuracy, starts = [], [], []
    for name, side in result["sides"].items():
        if side.get("error"):
            speed.append([name, f"failed: {side['error']}"[:120], *[""] * 11])
        for phase, row in side.get("summary", {}).items():
            numbers = [shown(row[part]) for part in PARTS]
            memory = [shown(row[key]) for key in ("peak_gib", "kv_gib", "peak_without_kv_gib")]
            rate = shown(row["tokens_per_s"], 0)
            speed.append([name, phase, *numbers, rate, *memory, shown(side.get("first_sample_s"), 1)])
        for told, found in side.get("heldout", {}).items():
            cells = [f"{found[k]['accuracy']:.1f} ({found[k]['low']:.1f}-{found[k]['high']:.1f})" for k in KINDS]
            accuracy.append([name, told, str(found["problems"]), *cells])
        starts += [[name, phase, shown(seconds, 1)] for phase, seconds in side.get("start_s", {}).items()]
    head = ["side", "lengths", *PARTS[:-1], "s a step", "tok/s", "peak GiB", "KV GiB", "less KV", "to 1st sample s"]
    told = markdown(["side", "set", "problems", "strict %", "lenient %"], accuracy)
    return f"{markdown(head, speed)}\n\n{told}\n\n{markdown(['side', 'of the start', 's'], starts)}"


KINDS = ("strict", "lenient")


def run_all(given: argparse.Namespace) -> dict[str, Any]:
    """Every side in turn."""
    command = (
        f"python -m benchmarks.beside_trl --model DIR --data DIR --order {' '.join(given.order)} --natural "
        f"{given.natural} --fixed {given.fixed} --kv-gib {given.kv_gib:g} --micro {given.micro}"
    )
    result = about(command, given.commit) | {"sides": {}}

    def arguments(name: str) -> list[str]:
        born = ["--born", str(time.time())]
        return ["-m", "benchmarks.one_side", *given.passed, "--side", name, "--work", str(work(name)), *born]

    def work(name: str) -> Path:
        return given.logs / f"{name}.json"

    def finished(job: Job) -> None:
        side: dict[str, Any] = read_json(work(job.name)) or {"steps": []}
        side["error"] = side.get("error") or job.problem()
        side["summary"] = summary(side)
        for found in side.get("heldout", {}).values():
            found.pop("verdicts", None)
        result["sides"][job.name] = side
        write(given.out, result)
        print(f"{job.name}: {side['error'] or 'done'} after {time.monotonic() - job.began:.0f} s", flush=True)

    for name in given.order:
        work(name).unlink(missing_ok=True)
    kept = bytecode_folder()
    result["bytecode"] = "kept in a folder of the benchmark's" if kept else "kept by Python"
    jobs = [Job(n, lambda n=n: arguments(n), given.logs / f"{n}.log", given.limit) for n in given.order]
    for job in jobs:
        job.environment = kept
    run_jobs(jobs, 1, finished)
    return result


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "beside_trl.json")
    parser.add_argument("--logs", type=Path, default=Path("outputs/beside_trl-logs"))
    parser.add_argument(
        "--order", nargs="+", choices=(*TRL, *OURS), default=["trl-defaults", "bf16", "trl-tuned", "nf4"]
    )
    parser.add_argument("--natural", type=int, default=28, help="steps at natural lengths")
    parser.add_argument("--fixed", type=int, default=8, help="steps of completions that are all 200 tokens long")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a side may take")
    parser.add_argument("--kv-gib", type=float, default=4)
    parser.add_argument("--micro", type=int, default=64, help="completions a micro-batch of trl-tuned")
    parser.add_argument("--problems", type=int, help="of each held-out set, the first ones")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help=argparse.SUPPRESS)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--trial", action="store_true", help="a trial without a GPU: transformers samples on both sides"
    )
    parser.add_argument("--commit", help="where the checkout has no history")
    parser.add_argument("--side", choices=(*TRL, *OURS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--born", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = ("model", "data", "natural", "fixed", "kv_gib", "micro", "problems", "prompts", "max_tokens")
    pairs = [(f"--{name.replace('_', '-')}", getattr(given, name)) for name in names]
    given.passed = [str(one) for flag, value in pairs if value is not None for one in (flag, value)]
    given.passed += ["--trial"] if given.trial else []
    return given


if __name__ == "__main__":
    print(tables(run_all(read_arguments())))
