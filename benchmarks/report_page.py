"""How soon the report of a long run is written, and how large it is: `python -m benchmarks.report_page`.

The run is made up by this module: 1,000 GRPO steps of 256 completions of about 1,000 characters, over prompts that come
back, and 1,319 held-out problems measured twice. Timed is the command `python -m reasoner report run=DIR` in a process
of its own, imports included. Left out: a browser drawing it, which tests/report do.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.common import RESULTS, about, write_json
from reasoner.metrics import NAMES

MIB = 2**20
BAR_S, BAR_MB = 10.0, 3.0
WORDS = tuple("so the number of apples is then we add three more and get twelve which means that each has".split())  # noqa: SIM905
PLANTED = "</script><img src=x onerror=\"document.title='planted'\"><script>document.title='planted'</script>"


def write_run(
    folder: Path, *, steps: int, prompts: int, completions: int, words: int, problems: int = 300, planted: str = ""
) -> None:
    """A made-up run whose reward rises from 0.2 to 0.8: `completions` of `prompts` a step, from a pool of ten times as
    many prompts. `planted` stands in the first completion, prompt, problem and note."""
    draw = Random(0)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"name: {json.dumps('made ' + planted)}\nseed: {steps}\nmodel: {{name: made-up, lora: {{rank: 16}}}}\n"
    )
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(words // 2, words))) for _ in range(200)]
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "completions.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            share = 0.2 + 0.6 * step / steps
            metrics.write(json.dumps(_metrics(step, share, draw)) + "\n")
            for _ in range(prompts):
                number = draw.randrange(10 * prompts)
                for _ in range(completions):
                    row = _completion(step, number, draw.random() < share, texts, draw)
                    if planted:
                        row |= {"completion": planted + row["completion"], "prompt": planted + row["prompt"]}
                        planted_once, planted = planted, ""
                        row["token_logprobs"] = [[planted_once, -0.5], [row["completion"][len(planted_once) :], -2.0]]
                    file.write(json.dumps(row) + "\n")
    _write_evaluations(folder, problems, draw)
    notes = [{"after": "grpo 1", "text": f"a note {PLANTED}"}]
    summary = {"status": "done", "seconds": 3600.0, "peak_gib": 7.5, "notes": notes, "versions": {"torch": "2"}}
    summary["stages"] = [{"stage": "evaluate", "seconds": 200.0}, {"stage": "grpo", "seconds": 3200.0}]
    summary["memory_parts"] = {"base": 1.1, "cache": 4.0, "logprobs": 0.4}
    (folder / "summary.json").write_text(json.dumps(summary))


def _metrics(step: int, share: float, draw: Random) -> dict[str, Any]:
    row = dict.fromkeys(NAMES["grpo"], 0.1)
    noise = 0.05 * draw.random()
    row |= {
        "reward_mean": share + noise,
        "solved_share": share,
        "groups": 32.0,
        "useful_groups": 20.0,
        "cut_share": 0.02,
    }
    row |= {"completion_tokens_mean": 200 + 40 * draw.random(), "entropy": 0.6 - 0.2 * share, "logprob_gap_mean": 0.001}
    row |= {"reward_failures": 0.0, "reward/accuracy": share, "reward/format": 0.9, "step_s": 3.2, "generate_s": 2.1}
    return {"stage": "grpo", "stage_index": 1, "step": step, "policy_step": step, **row}


def _completion(step: int, number: int, right: bool, texts: list[str], draw: Random) -> dict[str, Any]:
    text = f"{draw.choice(texts)} #### {number if right else number + 1}"
    return {
        "stage": "grpo",
        "stage_index": 1,
        "step": step,
        "policy_step": step - 1,
        "id": f"grpo:{number}",
        "prompt": f"Ada has {number} apples and keeps them all. How many are there?",
        "answer": str(number),
        "completion": text,
        "finish_reason": "stop",
        "tokens": len(text) // 4,
        "reward": float(right),
        "parts": {"accuracy": float(right), "format": 1.0},
        "failures": {},
        "advantage": 0.5 if right else -0.5,
        "columns": {"question": f"Ada has {number} apples and keeps them all. How many are there?"},
    }


def _write_evaluations(folder: Path, problems: int, draw: Random) -> None:
    from reasoner.evaluate import ProblemResult, SetResult

    rows, lines = [], []
    for stage_index, name, share in ((0, "base", 0.3), (2, "grpo", 0.6)):
        results = tuple(
            ProblemResult(f"heldout:{i}", draw.random() < share, False, 90, 0, 0, "so it is #### 4", problem=str(i))
            for i in range(problems)
        )
        found = SetResult("heldout", results)
        rows.append(found.row(name, stage_index))
        asked = {"prompt": f"Bo has some apples. {PLANTED}", "answer": "4"}
        lines += [json.dumps(line | asked) + "\n" for line in found.problem_rows(name, stage_index)]
    (folder / "eval.json").write_text(json.dumps(rows))
    (folder / "eval_problems.jsonl").write_text("".join(lines))


def main() -> None:
    """Make the run up, write its report in a process of its own, keep what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        write_run(folder, steps=steps, prompts=32, completions=8, words=240, problems=1319)
        size = sum(path.stat().st_size for path in folder.iterdir())
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "reasoner", "report", f"run={folder}"], check=True)
        seconds = time.monotonic() - began
        page = (folder / "report.html").stat().st_size
    result = {
        **about(f"python -m benchmarks.report_page --steps {steps}"),
        "steps": steps,
        "completions": steps * 256,
        "run_mib": size / MIB,
        "seconds": seconds,
        "page_mb": page / 1e6,
        "bar": {"seconds": BAR_S, "page_mb": BAR_MB},
    }
    write_json(RESULTS / f"report_page-{steps}.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
