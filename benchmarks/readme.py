"""The tables of README.md and docs/performance.md, made from what was measured.

    python -m benchmarks.readme          # write them into both

Each stands between `<!-- results: NAME -->` and `<!-- end -->`; a test fails where one differs from its files under
results/.
"""

import re
from pathlib import Path
from typing import Any

from benchmarks import elementwise, linear_logprobs, nf4, tiny
from benchmarks.common import RESULTS, read_json, table
from benchmarks.shared_prefix import rows_of as shared_prefix_rows

PAGES = tuple(Path(__file__).parents[1] / name for name in ("README.md", "docs/performance.md"))
PLACE = re.compile(r"(<!-- results: (\w+) -->\n)(?:(?!<!-- ).)*?(\n<!-- end -->)", re.DOTALL)
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
    """Greedy accuracy before and after in %, with the paired gain and its 95% interval, of every run that ended. The
    controls are of an earlier commit."""
    controls, practice = (read_json(RESULTS / f"word_problems{part}.json")["runs"] for part in ("-controls", ""))
    runs = controls | practice
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


def update() -> str:
    """Whole updates beside the rivals: rows that were timed, and why a rival has none."""
    rows = []
    for shape, part in read_json(RESULTS / "update-h100.json")["shapes"].items():
        for side, found in part["sides"].items():
            if found.get("not_run"):
                rows.append([shape, side, found["not_run"], *["-"] * 6])
            for name, row in found.get("rows", {}).items():
                if "ms" in row:
                    speed = [f"{row['ms']:.0f}", f"{100 * row['mfu']:.1f}", f"{part['tokens'] / row['ms'] * 1e3:,.0f}"]
                    memory = [f"{row[place]:.2f}" for place in ("allocator_gib", "device_gib")]
                    rows.append([shape, name, *speed, *memory, row["micro_batch"], str(len(row["seconds"]))])
    head = ["shape", "", "ms", "MFU, %", "tokens/s", "GiB allocated", "GiB on the device", "micro-batch", "timed"]
    return table(head, rows)


def shared_prefix() -> str:
    """An update in both forms."""
    found = read_json(RESULTS / "shared_prefix-1.5b.json")
    head = ["prompts", "tokens computed", "update, ms", "pass without gradient, ms", "peak GiB"]
    return table(head, shared_prefix_rows(found))


def long_context() -> str:
    """The longest sequences by card."""
    result = read_json(RESULTS / "long_context-h100.json")
    published = result["unsloth_sft"]
    rows = []
    for row in result["rows"]:
        theirs = f"{published[str(row['card_gib'])]:,}" if row["stage"] == "sft" else "-"
        done = f"yes, {row['seconds']:.1f} s, {row['peak_gib']:.2f} GiB" if row.get("confirmed") else "no time was left"
        rows.append([row["stage"], f"{row['card_gib']}", f"{row['tokens']:,}", theirs, done])
    return table(["", "card, GiB", "tokens", "Unsloth's, published", "a whole update at that length"], rows)


def rollout() -> str:
    """Tokens a second that vLLM samples, by card."""
    rows = []
    for result in (read_json(RESULTS / f"rollout-{card}.json") for card in ("h100", "h200")):
        for name, row in result["rows"].items():
            speeds = [f"{row[f'tokens_per_s_{count}']:,.0f}" for count in (64, 256)]
            rows.append([name, result["card"].removeprefix("NVIDIA "), result["commit"], *speeds])
    return table(["shape, base", "card", "commit", "64 sequences", "256 sequences"], rows)


def beside_trl() -> str:
    """Seconds a step, memory and the way to the first sample, of each side and kind of lengths."""
    rows = []
    for name, side in read_json(RESULTS / "beside_trl-speed.json")["sides"].items():
        for phase, row in side["summary"].items():
            parts = [f"{row[part]:.2f}" for part in ("generate", "sync", "logprobs", "update", "seconds")]
            memory = f"{row['peak_without_kv_gib']:.2f}"
            rows.append([name, phase, *parts, f"{row['tokens_per_s']:,.0f}", memory, f"{side['first_sample_s']:.0f}"])
    head = ["", "lengths", "generate, s", "sync", "old logprobs", "update", "a step", "tokens/s", "GiB less the cache"]
    return table([*head, "s to the first sample"], rows)


def home() -> str:
    """What fits on a smaller card's memory at the settings of `card=`: seconds by part, and the most memory."""
    rows = []
    for name, case in read_json(RESULTS / "home-h100.json")["cases"].items():
        if not case["fits"]:
            rows.append([name, "no", *["-"] * 6])
            continue
        parts = [f"{case['median'][f'{part}_s']:.1f}" for part in ("generate", "update", "step")]
        memory = f"{case['peak_gib']:.2f}"
        rows.append([name, "yes", *parts, f"{case['median']['tokens_per_s']:,.0f}", memory, f"{case['start_s']:.0f}"])
    head = ["shape-GiB", "fits", "generate, s", "update", "a step", "tokens/s", "most GiB in use", "start, s"]
    return table(head, rows)


TABLES = {
    "tiny": tiny.table,
    "word_problems": word_problems,
    "loss_head": linear_logprobs.overview,
    "loss_head_rivals": linear_logprobs.beside_rivals,
    "elementwise": elementwise.overview,
    "nf4": nf4.overview,
    "update": update,
    "shared_prefix": shared_prefix,
    "long_context": long_context,
    "rollout": rollout,
    "beside_trl": beside_trl,
    "home": home,
}


def filled(text: str) -> str:
    """The text with every table as its files have it now."""
    return PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
