"""The word problems of benchmarks/word_problems.py, made from the public files of MAWPS, ASDiv, SVAMP and GSM8K.

    python -m benchmarks.word_data --from DIR --out DIR

`--from` holds gsm8k/train.jsonl, gsm8k/test.jsonl and word_problems/{mawps_asdiv-a_train.csv, svamp_test.jsonl,
mawps_test.jsonl, asdiv_test.jsonl}. Writes train.jsonl (question, answer, solution), a file of question and answer for
each held-out set, and counts.json. A question that training asks too, with numbers masked, leaves the held-out set, not
training; SFT on GSM8K counts as training. The sets `gym_*` are drawn anew by reasoning-gym where that is installed.
ASDiv has 75 answers that are no single number (a time, a ratio, a place in a row). Other benchmarks of this task take
the first number in them for the answer; here such rows stay too, marked `"loose": true`, so that both figures can be
given.
"""

import argparse
import csv
import json
import random
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reasoner.data.word_problems import asdiv, fill_numbers, mawps, svamp, tidy

SETS = ("svamp", "asdiv", "mawps", "gsm8k")
GYM = {"gym_gsm_symbolic": "gsm_symbolic", "gym_chain_sum": "chain_sum"}
GYM_SIZE, GYM_SEED = 500, 20_261_124
EXPECTED = {"train": 2952, "svamp": 999, "asdiv": 1296, "mawps": 230, "gsm8k": 1319}
WHOLE = re.compile(r"-?\d+")

FIRST_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")

Row = dict[str, Any]


def jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def masked(question: str) -> str:
    """The question's words alone: the same for a problem with other numbers."""
    return " ".join(re.findall(r"[a-z]+", question.lower()))


def gsm8k(row: Mapping[str, str]) -> Row:
    """A row of GSM8K with its answer alone."""
    return {"question": row["question"].strip(), "answer": row["answer"].rpartition("####")[2].strip().replace(",", "")}


def any_asdiv(row: Mapping[str, str]) -> Row | None:
    """A row of ASDiv, marked where its answer is only the first number of several; None if it has no number."""
    found = FIRST_NUMBER.search(row["answer"])
    if asdiv(row) or not found:
        return asdiv(row)
    filled = asdiv({**row, "answer": found[0].rstrip(".")})
    return {**filled, "loose": True} if filled else None


def training(folder: Path) -> list[Row]:
    """MAWPS and ASDiv's training problems, each question once, in a fixed random order."""
    with (folder / "word_problems/mawps_asdiv-a_train.csv").open(encoding="utf-8") as file:
        rows = [filled for row in csv.DictReader(file) if (filled := fill_numbers(row))]
    unique: dict[str, Row] = {}
    for row in rows:
        unique.setdefault(row["question"], row)
    kept = list(unique.values())
    random.Random(1).shuffle(kept)
    return kept


def read_sets(folder: Path) -> dict[str, list[Row]]:
    """Every test problem of the four sets that has one number as its answer."""
    words = folder / "word_problems"
    found = {
        "svamp": [svamp(row) for row in jsonl(words / "svamp_test.jsonl")],
        "asdiv": [any_asdiv(row) for row in jsonl(words / "asdiv_test.jsonl")],
        "mawps": [mawps(row) for row in jsonl(words / "mawps_test.jsonl")],
        "gsm8k": [gsm8k(row) for row in jsonl(folder / "gsm8k/test.jsonl")],
    }
    return {name: [row for row in rows if row] for name, rows in found.items()}


def gym_sets() -> dict[str, list[Row]]:
    """New problems from reasoning-gym, whole numbers as answers; none where it is not installed."""
    if find_spec("reasoning_gym") is None:
        print("reasoning_gym is not installed: no gym_* sets")
        return {}
    import reasoning_gym

    found = {}
    for name, task in GYM.items():
        drawn: Iterable[Any] = reasoning_gym.create_dataset(task, size=2 * GYM_SIZE, seed=GYM_SEED)
        rows = {tidy(one["question"]): str(one["answer"]) for one in drawn}
        whole = [{"question": q, "answer": a} for q, a in rows.items() if WHOLE.fullmatch(a)]
        found[name] = whole[:GYM_SIZE]
    return found


def prepare(folder: Path, out: Path) -> dict[str, Any]:
    """Write the files; the counts of what was read and kept."""
    train, sets = training(folder), read_sets(folder)
    seen = {masked(row["question"]) for row in (*train, *jsonl(folder / "gsm8k/train.jsonl"))}
    kept = {name: [row for row in rows if masked(row["question"]) not in seen] for name, rows in sets.items()}
    for rows in kept.values():
        random.Random(0).shuffle(rows)
    files = {"train": train, **kept, **gym_sets()}
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    counts = {"kept": {name: len(rows) for name, rows in files.items()}, "read": {n: len(r) for n, r in sets.items()}}
    (out / "counts.json").write_text(json.dumps(counts) + "\n")
    wrong = {name: counts["kept"][name] for name, n in EXPECTED.items() if counts["kept"][name] != n}
    if wrong:
        print(f"warning: the public files gave {EXPECTED} before; now {wrong}")
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--from", dest="folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    print(json.dumps(prepare(given.folder, given.out)))
