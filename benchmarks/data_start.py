"""How soon 1,000,000 rows of JSONL are ready to train on, and in how much memory: `python -m benchmarks.data_start`.

Rows are written by this module (word problems of about 100 bytes, of which one in a hundred is there twice), read as
`data.path`, 1,000 of them held out, duplicates and overlap removed, in a process of its own; then 32 prompts are drawn.
Left out: loading a model, and the interpreter's imports, whose memory is given beside.
"""

import argparse
import json
import os
import resource
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.common import RESULTS, about, write_json

MIB = 2**20
LETTERS = string.ascii_letters + string.digits + " .?"
HELDOUT, DRAWN = 1_000, 32
BAR_ROWS, BAR_S, BAR_MIB = 1_000_000, 10.0, 500.0
NAMES = ("Ada", "Bo", "Cem", "Dina", "Emil", "Fay", "Gus", "Hana")
THINGS = ("apples", "books", "coins", "stamps", "marbles", "shells")


def write_rows(path: Path, count: int) -> None:
    """`count` rows, 1% of them duplicates; the same ones every time."""
    draw = Random(0)
    line = ""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            if number % 100 != 99:  # every hundredth row is the one before it
                some, more = draw.randrange(1000), draw.randrange(1000)
                who, what = draw.choice(NAMES), draw.choice(THINGS)
                question = f"{who} has {some} {what} and buys {more} in shop {number}. How many are there now?"
                line = json.dumps({"question": question, "answer": str(some + more)}) + "\n"
            file.write(line)


def measure(path: Path) -> dict[str, Any]:
    """Seconds and memory from a checked conf to the task, imports done."""
    from reasoner.config import validate
    from reasoner.data.drawn import Drawn
    from reasoner.data.order import Draw, Order
    from reasoner.data.task import load_task
    from reasoner.models.loading import load_tokenizer

    values = {
        "name": "data_start",
        "out": "outputs/data_start",
        "stages": ["evaluate", "grpo", "evaluate"],
        "model": {"name": "characters", "scratch": {"characters": LETTERS}},
        "data": {"path": str(path), "template": "plain", "heldout": HELDOUT},
        "reward": {"parts": {"accuracy": {"fn": "math"}}},
        "grpo": {"loss": {}},
    }
    config = validate(values)
    tokenizer = load_tokenizer(config.model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    began, cpu_began = time.monotonic(), time.process_time()
    task = load_task(config, tokenizer)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
    prompts = task.prompts
    draw = Draw(Order(len(prompts), seed=0), 0, prompts.why_not if isinstance(prompts, Drawn) else None)
    began = time.monotonic()
    drawn = [prompts[row] for row in draw.take(DRAWN)]
    first_draw_s = time.monotonic() - began
    assert len({prompt.id for prompt in drawn}) == DRAWN
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # less than the seconds where other jobs use the cores too
        "load_average": os.getloadavg()[0],
        "first_draw_s": first_draw_s,
        "imports_mib": before,
        "peak_mib": peak,
        "grown_mib": peak - before,
        **task.report["grpo"],
    }


def main() -> None:
    """Write the rows, measure in a fresh process, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=BAR_ROWS)
    parser.add_argument("--measure", type=Path)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, options.rows)
        size = path.stat().st_size / MIB
        command = [sys.executable, "-m", "benchmarks.data_start", "--measure", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    result = {**about(f"python -m benchmarks.data_start --rows {options.rows}"), "file_mib": size, **found}
    result |= {"bar": {"seconds": BAR_S, "grown_mib": BAR_MIB}, "bar_rows": BAR_ROWS}
    write_json(RESULTS / f"data_start-{options.rows}.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
