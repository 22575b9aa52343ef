"""Does `conf=tiny` learn, and from its reward? Three seeds, and for each a control whose rewards are shuffled over
the whole step.

    .venv/bin/python -m benchmarks.tiny [SEED ...] [--control]

Each run is whole: base, SFT, GRPO. Writes benchmarks/results/tiny-SEED[-control].json and prints the table of all
results that are there.
The control's evaluation is not shuffled.
"""

import json
import os
import random
import sys
import time
from dataclasses import dataclass, fields
from tempfile import mkdtemp

from benchmarks.common import RESULTS
from reasoner.compose import compose_conf
from reasoner.config import validate
from reasoner.pipeline import Pipeline
from reasoner.rewards.base import Rewards
from reasoner.summary import commit, versions

SEEDS = (0, 1, 2)


@dataclass(slots=True)
class ShuffledRewards(Rewards):
    """The rewards of a step, each given to a completion drawn at random; what an evaluation asks for stays in place."""

    def collect(self, step):
        scores = Rewards.collect(self, step)
        random.Random(f"{step[0].prompt.id}/{step[0].completion.sampling_logprobs}").shuffle(scores)
        return scores


def shuffled(rewards: Rewards) -> Rewards:
    """The same rewards in a control's hands."""
    return ShuffledRewards(**{f.name: getattr(rewards, f.name) for f in fields(Rewards) if f.init})


def run(seed: int, control: bool, at: str | None) -> dict:
    """One whole run of conf=tiny and what it measured; `at` is the commit."""
    composed = compose_conf("tiny", [f"seed={seed}", f"out={mkdtemp()}"])
    pipeline = Pipeline(validate(composed.values), base_dir=composed.folder, wrap_rewards=shuffled if control else None)
    began = time.monotonic()
    result = pipeline.run()
    gain = result.gains["sft", "grpo", "heldout"]
    return {
        "command": f"python -m benchmarks.tiny {seed}{' --control' if control else ''}",
        "seed": seed,
        "control": control,
        "seconds": time.monotonic() - began,
        "rows": [{key: value for key, value in row.items() if key != "artefact"} for row in result.rows],
        "grpo_gain": {"points": gain.points, "low": gain.low, "high": gain.high, "problems": gain.problems},
        "versions": versions(),
        "commit": at,
        "machine": f"{os.cpu_count()} CPU cores",
    }


def table() -> str:
    """Every result that is there, as Markdown."""
    lines = [
        "| seed | rewards | SFT greedy / sampled % | GRPO greedy / sampled % | greedy gain, 95% | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("tiny-*.json")):
        found = json.loads(path.read_text())
        rows = {row["row"]: row for row in found["rows"]}
        cells = [
            f"{100 * rows[name]['greedy_accuracy']:.1f} / {100 * rows[name]['sampled_accuracy']:.1f}"
            for name in ("sft", "grpo")
        ]
        gain = found["grpo_gain"]
        lines.append(
            f"| {found['seed']} | {'shuffled' if found['control'] else 'real'} | {cells[0]} | {cells[1]} "
            f"| {gain['points']:+.1f}, {gain['low']:.1f} to {gain['high']:.1f} | {found['seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    control = "--control" in sys.argv
    RESULTS.mkdir(exist_ok=True)
    at = commit()  # before the first result is written: that is no change of the code
    for seed in [int(a) for a in sys.argv[1:] if a.isdigit()] or SEEDS:
        name = f"tiny-{seed}{'-control' if control else ''}.json"
        (RESULTS / name).write_text(json.dumps(run(seed, control, at), indent=1) + "\n")
    print(table())
