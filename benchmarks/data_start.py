"""How soon 1,000,000 rows of JSONL are ready to train on, and in how much memory: `python -m benchmarks.data_start`.

Rows are written by this module (word problems of about 130 bytes), read as `data.path`, split, deduplicated, and made
into prompts of one token a character, in a process of its own. Left out: loading a model.
"""

import argparse
import json
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
BAR_ROWS, BAR_S, BAR_MIB = 1_000_000, 10.0, 500.0
NAMES = ("Ada", "Bo", "Cem", "Dina", "Emil", "Fay", "Gus", "Hana")
THINGS = ("apples", "books", "coins", "stamps", "marbles", "shells")


def write_rows(path: Path, count: int) -> None:
    """`count` different problems, the same ones every time."""
    draw = Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            some, more = draw.randrange(1000), draw.randrange(1000)
            who, what = draw.choice(NAMES), draw.choice(THINGS)
            question = f"{who} has {some} {what} and buys {more} in shop {number}. How many are there now?"
            file.write(json.dumps({"question": question, "answer": str(some + more)}) + "\n")


def measure(path: Path) -> dict[str, Any]:
    """Seconds and memory from a checked conf to the task, imports done."""
    from reasoner.config import validate
    from reasoner.data.task import load_task
    from reasoner.models.loading import load_tokenizer

    values = {
        "name": "data_start",
        "out": "outputs/data_start",
        "stages": ["grpo"],
        "model": {"name": "characters", "scratch": {"characters": LETTERS}},
        "data": {"path": str(path), "template": "plain", "heldout": 0},
        "reward": {"parts": {"accuracy": {"fn": "math"}}},
        "grpo": {"loss": {}},
    }
    config = validate(values)
    tokenizer = load_tokenizer(config.model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    began = time.monotonic()
    task = load_task(config, tokenizer)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    return {
        "seconds": seconds,
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
