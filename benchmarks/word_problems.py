"""Does GRPO teach SmolLM2-135M easy word problems, by its reward and nothing else? Start: the model after SFT on GSM8K.

    python -m benchmarks.word_problems --model DIR --data DIR --out FILE.json [--runs NAME ...] [--steps N]

`--model` is the folder that benchmarks/word_model.py made, `--data` that of benchmarks/word_data.py. The runs, each a
process of its own, `--at-once` of them side by side (accuracy needs no clock):

- nf4-0, nf4-1, nf4-2, bf16-0: GRPO with the exact number as reward; the number is the seed
- format-0: the same, but the reward is 1 for ending in `#### number`, whichever number
- shuffled-0: the same, with the right rewards dealt out at random over the step
- sft-0: SFT on the same problems' worked equations, for as many seconds as the first finished GRPO run trained

Greedy accuracy on every held-out set before and after, strict (an answer is marked) and lenient (else the last number
counts), with 95% intervals and paired gains. FILE.json is written anew after each run; a run that failed has its error
there, and what it had measured. `asdiv_one_number` is asdiv without the rows that word_data.py marks as loose.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Job, about, after_warm_up, gain, judged, median, read_json, run_jobs, shown, table
from benchmarks.common import write_json as write
from benchmarks.tiny import shuffled
from benchmarks.word_data import jsonl
from reasoner.compose import compose_conf, quoted
from reasoner.config import validate
from reasoner.pipeline import Pipeline
from reasoner.run_folder import EVAL_PROBLEMS, METRICS, SUMMARY, read_rows

RUNS = ("nf4-0", "nf4-1", "nf4-2", "bf16-0", "format-0", "shuffled-0", "sft-0")
QUANTIZE = {"nf4": "nf4", "bf16": "none", "format": "nf4", "shuffled": "nf4", "sft": "nf4"}
SETS = ("svamp", "asdiv", "mawps", "gsm8k", "gym_gsm_symbolic", "gym_chain_sum")
PARTS = ("generate_s", "reward_s", "logprobs_s", "update_s", "sync_s", "step_s")
PILOT_STEPS = 8
FORMAT_ALONE = [
    "reward.parts.accuracy.weight=0",
    "reward.parts.format.fn=benchmarks.rewards:ends_with_answer",
    "reward.parts.format.weight=1",
]


def overrides(given: argparse.Namespace, run: str) -> list[str]:
    """Settings of conf=smol for a run, as on the command line."""
    kind, seed = run.split("-")
    quantize = "none" if given.engine == "hf" else QUANTIZE[kind]
    sets = [name for name in SETS if (given.data / f"{name}.jsonl").exists()]
    settings = [
        *model_and_data(given.model, given.data),
        *(f"evaluate.sets.{name}.path={quoted(str(given.data / f'{name}.jsonl'))}" for name in sets),
        "stages=[evaluate,sft,evaluate]" if kind == "sft" else "stages=[evaluate,grpo,evaluate]",
        f"seed={seed}",
        f"model.quantize={quantize}",
        f"rollout={given.engine}",
        f"grpo.steps={given.steps}",
        "evaluate.samples=0",
        "evaluate.max_completion_tokens=256",
        f"reward.workers={given.reward_workers}",
        "checkpoint.every=1000000",
        *(FORMAT_ALONE if kind == "format" else []),
        *given.set,
    ]
    if given.engine == "vllm":
        settings.append(f"rollout.kv_gib={given.kv_gib}")
    return [*settings, f"evaluate.problems={given.problems or 'null'}"]


def model_and_data(model: Path, data: Path) -> list[str]:
    """The settings that put the merged model and the prepared files into conf=smol; sets are still to be named."""
    train = quoted(str(data / "train.jsonl"))
    return [
        f"model.name={quoted(str(model))}",
        "model.gguf=null",
        "data.subset=null",
        "data.split=null",
        "data.answer_pattern=null",
        "data.overlap=off",  # word_data.py removed it
        "~evaluate.sets",
        "~grpo.data",
        f"grpo.data.path={train}",
        f"sft.data.path={train}",
        f"sft.data.completion={quoted('{solution}')}",
    ]


def run_one(given: argparse.Namespace, run: str, out: Path) -> None:
    """One whole run in this process."""
    settings = overrides(given, run)
    if run.startswith("sft"):
        settings.append(f"sft.steps={sft_steps(settings, out, given.sft_seconds)}")
    composed = compose_conf("smol", [*settings, f"out={quoted(str(out))}"])
    wrap = shuffled if run.startswith("shuffled") else None
    Pipeline(validate(composed.values), base_dir=composed.folder, wrap_rewards=wrap).run()


def sft_steps(settings: Sequence[str], out: Path, seconds: float) -> int:
    """How many steps of SFT fit into these seconds, by a few on trial."""
    pilot = out.with_name(f"{out.name}-pilot")
    trial = [*settings, "stages=[sft]", f"sft.steps={PILOT_STEPS}", "rollout=hf", f"out={quoted(str(pilot))}"]
    composed = compose_conf("smol", trial)
    Pipeline(validate(composed.values), base_dir=composed.folder).run()
    step_s = median(row["step_s"] for row in after_warm_up(list(read_rows(pilot / METRICS))))
    assert step_s is not None
    steps = max(1, round(seconds / step_s))
    print(f"SFT: {step_s:.3f} s a step, so {steps} steps for {seconds:.0f} s")
    return steps


def measured(folder: Path, data: Path) -> dict[str, Any]:
    """What a run's folder tells, whole or not."""
    found: dict[str, Any] = {"sets": {}}
    rows = list(read_rows(folder / METRICS)) if (folder / METRICS).exists() else []
    summary = read_json(folder / SUMMARY)
    if summary:
        found["stages"] = summary["stages"]
    found["steps"] = len(rows)
    found["peak_gib_allocated"] = max((row["peak_gib"] for row in rows), default=None)
    found["median"] = {name: median(row.get(name) for row in after_warm_up(rows)) for name in PARTS}
    for name in ("reward_mean", "solved_share", "logprob_gap_mean", "completion_tokens_mean", "useful_groups", "loss"):
        if rows and name in rows[0]:
            found[name] = [round(row[name], 4) if row[name] is not None else None for row in rows]
    texts: dict[tuple[str, int], list[tuple[int, str]]] = {}
    problems = read_rows(folder / EVAL_PROBLEMS) if (folder / EVAL_PROBLEMS).exists() else ()
    for row in problems:
        place = texts.setdefault((row["set"], row["stage_index"]), [])
        place.append((int(row["id"].rpartition(":")[2]), row["text"]))
    for (name, stage_index), answered in texts.items():
        moment = "before" if stage_index == 0 else "after"
        for told, verdicts in scored(name, answered, jsonl(data / f"{name}.jsonl")).items():
            found["sets"].setdefault(told, {})[moment] = verdicts
    for sides in found["sets"].values():
        if len(sides) == 2:
            sides["gain"] = {kind: gain(sides["before"], sides["after"], kind) for kind in ("strict", "lenient")}
        for moment in ("before", "after"):
            sides.get(moment, {}).pop("verdicts", None)
    return found


def scored(
    name: str, answered: Sequence[tuple[int, str]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """`judged` of a set's texts, given with their rows' numbers; and of its rows that are not loose, if some are."""
    pairs = [(text, rows[number - 1]) for number, text in answered]
    found = {name: judged([text for text, _ in pairs], [row["answer"] for _, row in pairs])}
    clean = [(text, row["answer"]) for text, row in pairs if not row.get("loose")]
    if len(clean) < len(pairs):
        found[f"{name}_one_number"] = judged([text for text, _ in clean], [answer for _, answer in clean])
    return found


def run_all(given: argparse.Namespace) -> dict[str, Any]:
    """Every run asked for; the result, which is on disk too."""
    work = Path(tempfile.mkdtemp(prefix="word_problems-"))
    names = " ".join(given.runs)
    command = f"python -m benchmarks.word_problems --model DIR --data DIR --runs {names} --steps {given.steps}"
    result: dict[str, Any] = about(command, given.commit)
    result |= {"engine": given.engine, "at_once": given.at_once, "grpo_steps": given.steps, "runs": {}}
    began = time.monotonic()
    trained: dict[str, float] = {}

    def seconds() -> float:
        return given.sft_seconds or next(iter(trained.values()), 0.0)

    def arguments(run: str) -> list[str]:
        passed = [*given.passed, "--one", run, "--work", str(work / run)]
        return ["-m", "benchmarks.word_problems", *passed, "--sft-seconds", str(seconds())]

    def finished(job: Job) -> None:
        found = {"name": job.name, "seconds": time.monotonic() - job.began, "error": job.problem()}
        try:
            found |= measured(work / job.name, given.data)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            found["unreadable"] = repr(error)
        result["runs"][job.name] = found
        result["seconds"] = time.monotonic() - began
        if not found["error"] and not job.name.startswith("sft"):
            trained[job.name] = next(s["seconds"] for s in found["stages"] if s["stage"] == "grpo")
        write(given.out, result)
        print(f"{job.name}: {found['error'] or 'done'} after {found['seconds']:.0f} s", flush=True)

    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // given.at_once))}
    jobs = [
        Job(
            run,
            lambda run=run: arguments(run),
            given.logs / f"{run}.log",
            given.limit,
            ready=lambda run=run: not run.startswith("sft") or seconds() > 0,
            environment=environment,
        )
        for run in given.runs
    ]
    run_jobs(jobs, given.at_once, finished)
    for run in given.runs:
        result["runs"].setdefault(run, {"name": run, "error": "left out: no GRPO run finished to take its seconds"})
    write(given.out, result)
    return result


def tables(result: Mapping[str, Any]) -> str:
    """The runs as Markdown: accuracy before -> after, and the paired gain, on every set."""
    rows = []
    for name, run in result["runs"].items():
        if run.get("error"):
            rows.append([name, f"failed: {run['error']}"[:160], "", "", "", ""])
        for told, sides in run.get("sets", {}).items():
            if "gain" not in sides:
                continue
            cells = [name, told, str(sides["after"]["problems"])]
            for kind in ("strict", "lenient"):
                points = sides["gain"][kind]
                cells.append(
                    f"{sides['before'][kind]['accuracy']:.1f} -> {sides['after'][kind]['accuracy']:.1f} "
                    f"({points['points']:+.1f}, {points['low']:.1f} to {points['high']:.1f})"
                )
            rows.append([*cells, shown(run["median"]["step_s"])])
    return table(["run", "set", "problems", "strict % (gain, 95%)", "lenient % (gain, 95%)", "s a step"], rows)


def read_arguments(typed: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "word_problems.json")
    parser.add_argument("--logs", type=Path, default=Path("outputs/word_problems-logs"))
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, default=92, help="of GRPO; 92 is one pass over the problems")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--limit", type=float, default=600, help="seconds that a run may take")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm", help="hf: a trial without NF4")
    parser.add_argument("--kv-gib", type=float, default=4)
    parser.add_argument("--reward-workers", type=int, default=2)
    parser.add_argument("--sft-seconds", type=float, default=0, help="of sft-0; 0: as long as GRPO trained")
    parser.add_argument("--problems", type=int, help="of each set, the first ones")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one more setting of all runs")
    parser.add_argument("--commit", help="where the checkout has no history")
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(typed)
    same = ("model", "data", "steps", "engine", "kv_gib", "reward_workers", "problems")
    pairs = [(f"--{name.replace('_', '-')}", getattr(given, name)) for name in same]
    given.passed = [str(one) for flag, value in pairs if value is not None for one in (flag, value)]
    given.passed += [one for setting in given.set for one in ("--set", setting)]
    return given


if __name__ == "__main__":
    asked = read_arguments()
    if asked.one:
        run_one(asked, asked.one, asked.work)
    else:
        print(tables(run_all(asked)))
