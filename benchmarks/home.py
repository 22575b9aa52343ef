"""What fits on a card at home, and how fast: whole GRPO steps of a 1.5B- and a 7B-shaped model at the `card=` settings.

    python -m benchmarks.home --tokenizer DIR_OR_HUB_ID --out FILE.json [--cases NAME ...] [--steps N]

The weights are random (speed and memory do not ask what a model knows), so every completion is as long as it may be;
the reward is a coin, so nearly every group is trained on. A case is MODEL-GIB: on a larger card another process holds
so much memory that GIB - 0.75 are free for this one, its CUDA context made; a card of that size is taken as it is.
Prints for each case whether it fits, or the line that says why not; seconds by part, the first step left out; tokens a
second; the most memory in use. FILE.json is written after each case. Left out: other trainers, and learning.
"""

import argparse
import random
import tempfile
import time
import traceback
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import (
    CONTEXT_GIB,
    GIB,
    DeviceMemory,
    Job,
    about,
    after_warm_up,
    leave_when_asked,
    median,
    read_json,
    run_and_leave,
    shown,
    table,
    write_json,
)
from benchmarks.practice import practice
from benchmarks.random_model import hf_config, random_policy
from reasoner.assembly import Parts
from reasoner.compose import compose_conf
from reasoner.config import Config, validate
from reasoner.console import Console
from reasoner.data.task import load_task
from reasoner.evaluate import Evaluator
from reasoner.memory import plan_memory
from reasoner.models import adapters
from reasoner.models.attention import PACKED
from reasoner.models.families import family_of
from reasoner.models.policy import Policy
from reasoner.models.stops import stop_ids
from reasoner.rewards.base import load_rewards
from reasoner.rollout.choice import choose, make_engine

# Model, GiB, settings. A row of conf/card is made for the 1.5B model unless it says otherwise: 7B goes in NF4.
CASES: dict[str, tuple[str, float, list[str]]] = {
    "1.5b-8": ("1.5b", 8, ["card=8"]),
    "1.5b-12": ("1.5b", 12, ["card=12"]),
    "1.5b-16": ("1.5b", 16, ["card=16"]),
    "1.5b-24": ("1.5b", 24, ["card=24"]),
    "7b-8": ("7b", 8, ["card=8"]),
    "7b-12": ("7b", 12, ["card=12", "model.quantize=nf4"]),
    "7b-16": ("7b", 16, ["card=16", "model.quantize=nf4"]),
    "7b-24": ("7b", 24, ["card=24_7b"]),
}
ROWS = 512
WORDS = (
    "a",
    "box",
    "holds",
    "red",
    "and",
    "blue",
    "marbles",
    "then",
    "Anna",
    "takes",
    "half",
    "of",
    "them",
    "to",
    "school",
)
PARTS = ("generate_s", "sync_s", "reward_s", "logprobs_s", "update_s", "step_s")
TRIAL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TRIAL_SETTINGS = ["rollout=hf", "model.quantize=none", "optim@grpo.optim=adamw", "grpo.prompts_per_step=2"]


class Turn:
    """Signals between the process that holds the memory and the one that is measured: files in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def tell(self, what: str) -> None:
        """Give a signal."""
        (self.folder / what).touch()

    def told(self, what: str) -> bool:
        """Whether it was given."""
        return (self.folder / what).exists()

    def wait(self, what: str) -> None:
        """Until it is given."""
        while not self.told(what):
            time.sleep(0.05)


def problems() -> list[dict[str, str]]:
    """Rows with questions of 40 to 160 words."""
    draws = random.Random(0)
    rows = (" ".join(draws.choices(WORDS, k=draws.randint(40, 160))) for _ in range(ROWS))
    return [{"question": f"{i}: {words}?", "answer": "1"} for i, words in enumerate(rows)]


def settings_of(case: str, more: list[str]) -> list[str]:
    """The case as settings of conf=gsm8k."""
    return [
        f"model.name={CASES[case][0]}",
        "stages=[grpo]",
        "evaluate.sets=null",
        "data.prompt='{question}'",
        "data.answer_pattern=null",
        "data.template=plain",
        "reward=benchmarks.rewards:coin",
        *CASES[case][2],
        *more,
    ]


def make_policy(config: Config) -> Policy:
    """The model with random weights; without a GPU a very small one, for a trial of this file."""
    model = config.model
    assert model.lora is not None
    if torch.cuda.is_available():
        nf4 = model.quantize == "nf4"
        return random_policy(model.name, nf4=nf4, lora=model.lora, recompute=model.gradient_checkpointing is True)
    small = hf_config(model.name, **TRIAL)
    base: Any = AutoModelForCausalLM.from_config(small, dtype=torch.float32, attn_implementation=PACKED)
    base.requires_grad_(False)
    return Policy(adapters.attach(base, model.lora, name=model.name, revision=None), family_of(small), revision=None)


def make_parts(config: Config, tokenizer_name: str, console: Console) -> Parts:
    """What `assemble` makes, around random weights."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    task = load_task(config, tokenizer, problems())
    rewards = load_rewards(config.reward, base_dir=Path.cwd(), columns=set(task.prompts[0].columns))
    policy = make_policy(config)
    stops = stop_ids(tokenizer, task.template, policy.model)
    name, chosen = choose(config, policy)
    console.say(chosen)
    context = int(hf_config(config.model.name).max_position_embeddings)
    plan = plan_memory(config, policy, max_context=context) if name == "vllm" else None
    for line in plan.lines() if plan else ():
        console.say(line)
    sizes: Any = {"max_context": context}
    if plan:
        sizes = {"max_context": plan.longest, "kv_bytes": plan.kv_bytes, "dequantize": plan.dequantized > 0}
    engine = make_engine(name, config, policy, task.template.decode, **sizes)
    return Parts(config, tokenizer, task, rewards, policy, engine, stops, Evaluator(config, rewards, stops), plan)


def run_case(given: argparse.Namespace) -> None:
    """One case in this process, once it is its turn; what it measured is on disk after every step."""
    turn = Turn(given.work)
    if torch.cuda.is_available() and find_spec("vllm"):
        import vllm  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]  (slow, so before its turn)
    turn.tell("imported")
    turn.wait("context")
    memory = DeviceMemory()
    turn.tell("ready")
    turn.wait("go")
    memory.reset()
    more = [*given.set, *([] if torch.cuda.is_available() else TRIAL_SETTINGS)]
    typed = settings_of(given.case, more)
    found: dict[str, Any] = {"settings": typed, "steps": []}
    began = time.monotonic()
    try:
        config = validate(compose_conf("gsm8k", typed).values)
        with practice(lambda console: make_parts(config, given.tokenizer, console)) as run:
            found |= {"start_s": time.monotonic() - began, "engine": run.parts.engine.capabilities.name}
            found["parts_gib"] = run.parts.memory.parts_gib() if run.parts.memory else None
            for _ in range(given.steps):
                found["steps"].append(run.step().values)
                found["most_used_gib"] = memory.peak_gib
                write_json(given.work / "found.json", found)
                print(found["steps"][-1], flush=True)
    except BaseException as error:
        found |= {"error": f"{type(error).__name__}: {error}"[:800], "most_used_gib": memory.peak_gib}
        write_json(given.work / "found.json", found)
        traceback.print_exc()
        raise


class Ballast:
    """Device memory held so that a card looks smaller to another process."""

    def __init__(self, free_gib: float):
        self._held: torch.Tensor | None = None
        if torch.cuda.is_available():
            num = int(torch.cuda.mem_get_info()[0] - free_gib * GIB)
            self._held = torch.empty(num, dtype=torch.uint8, device="cuda") if num > 0 else None
            self.free_gib = torch.cuda.mem_get_info()[0] / GIB

    def release(self) -> None:
        """Give it back."""
        self._held = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(job: Job, case: str, turn: Turn) -> dict[str, Any]:
    """Let a process that is started have its turn, and read what it measured."""

    def wait(what: str) -> None:
        while not turn.told(what) and not job.done():
            time.sleep(0.05)

    wait("imported")
    turn.tell("context")
    wait("ready")
    cap = CASES[case][1]
    ballast = Ballast(cap - CONTEXT_GIB)
    turn.tell("go")
    job.began = time.monotonic()
    while not job.done():
        time.sleep(0.1)
    found: dict[str, Any] = read_json(turn.folder / "found.json") or {"steps": []}
    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1] / GIB
        found |= {"free_at_start_gib": ballast.free_gib, "cap_gib": cap}
        if found.get("most_used_gib"):
            found["peak_gib"] = min(cap, total) - (total - found["most_used_gib"])
    ballast.release()
    found["error"] = found.get("error") or job.problem()
    found["fits"] = bool(found["steps"]) and not found["error"]
    steps = after_warm_up(found["steps"], 1)
    found["median"] = {name: median(step.get(name) for step in steps) for name in (*PARTS, "tokens_per_s")}
    return found


def run_all(given: argparse.Namespace) -> dict[str, Any]:
    """Every case in turn; the next one's imports run meanwhile."""
    command = f"python -m benchmarks.home --tokenizer DIR --cases {' '.join(given.cases)} --steps {given.steps}"
    result: dict[str, Any] = about(command, given.commit) | {"cases": {}}
    work = Path(tempfile.mkdtemp(prefix="home-"))
    more = [one for setting in given.set for one in ("--set", setting)]

    def job_of(case: str) -> Job:
        passed = ["--tokenizer", given.tokenizer, "--steps", str(given.steps), *more]
        command = ["-m", "benchmarks.home", *passed, "--case", case, "--work", str(work / case)]
        return Job(case, lambda: command, given.logs / f"{case}.log", given.limit)

    jobs = [job_of(case) for case in given.cases]
    leave_when_asked()
    try:
        for i, job in enumerate(jobs):
            for one in jobs[i : i + 2]:
                if one.process is None:
                    one.start()
            found = measure(job, job.name, Turn(work / job.name))
            result["cases"][job.name] = found
            write_json(given.out, result)
            print(f"{job.name}: {'fits' if found['fits'] else found['error']}", flush=True)
    finally:
        for job in jobs:
            job.kill()
    return result


def tables(result: Mapping[str, Any]) -> str:
    """The cases as Markdown."""
    rows = []
    for name, found in result["cases"].items():
        numbers = [shown(found["median"][part], 3 if part == "sync_s" else 2) for part in PARTS]
        rate, peak = shown(found["median"]["tokens_per_s"], 0), shown(found.get("peak_gib"))
        fits = "fits" if found["fits"] else str(found["error"])[:160]
        rows.append([name, fits, *numbers, rate, peak, shown(found.get("start_s"), 1)])
    parts = [part.removesuffix("_s") for part in PARTS[:-1]]
    return table(["model-GiB", "at its card=", *parts, "s a step", "tok/s", "peak GiB", "start s"], rows)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="of a Qwen2.5 model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "home.json")
    parser.add_argument("--logs", type=Path, default=Path("outputs/home-logs"))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--limit", type=float, default=240, help="seconds that a case may take")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one more setting of all cases")
    parser.add_argument("--commit", help="where the checkout has no history")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    asked = read_arguments()
    if asked.case:
        run_and_leave(lambda: run_case(asked))
    print(tables(run_all(asked)))
