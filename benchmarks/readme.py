"""The tables of README.md and docs/performance.md, made from what was measured.

    python -m benchmarks.readme          # write them into both

Each stands between `<!-- results: NAME -->` and `<!-- end -->`; a test fails where one differs from its files under
results/.
"""

import re
from pathlib import Path
from typing import Any

from benchmarks import elementwise, linear_logprobs, tiny
from benchmarks.common import RESULTS, read_json, table

PAGES = tuple(Path(__file__).parents[1] / name for name in ("README.md", "docs/performance.md"))
PLACE = re.compile(r"(<!-- results: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
RUNS = {
    "nf4-0": "NF4, 0",
    "nf4-1": "NF4, 1",
    "nf4-2": "NF4, 2",
    "bf16-0": "bfloat16, 0",
    "format-0": "NF4, 0, the format alone",
    "shuffled-0": "NF4, 0, rewards shuffled",
    "sft-0": "NF4, SFT on the worked equations, 55 s",
}
SETS = {"svamp": "SVAMP", "asdiv": "ASDiv", "gsm8k": "GSM8K (not practised)"}


def word_problems() -> str:
    """Greedy accuracy before and after in %, with the paired gain and its 95% interval, of every run that ended."""
    runs = read_json(RESULTS / "word_problems.json")["runs"]
    rows = [
        [said, *(_moved(runs[name]["sets"][one]) for one in SETS)]
        for name, said in RUNS.items()
        if runs.get(name) and not runs[name]["error"]
    ]
    return table(["base, seed, reward", *SETS.values()], rows)


def _moved(found: dict[str, Any]) -> str:
    before, after = (found[side]["strict"]["accuracy"] for side in ("before", "after"))
    gain = found["gain"]["strict"]
    return f"{before:.1f} → {after:.1f} ({gain['points']:+.1f}, {gain['low']:.1f} to {gain['high']:.1f})"


TABLES = {
    "tiny": tiny.table,
    "word_problems": word_problems,
    "loss_head": linear_logprobs.overview,
    "loss_head_rivals": linear_logprobs.beside_rivals,
    "elementwise": elementwise.overview,
}


def filled(text: str) -> str:
    """The text with every table as its files have it now."""
    return PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
