"""Every real file loads by conf alone, and every kind of file by a small copy made here."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

from reasoner.config import Config
from reasoner.data.task import load_task

Conf = Callable[..., Config]
MAPS = "reasoner.data.word_problems"
GSM8K: dict[str, Any] = {"completion": "{answer}", "answer_pattern": r"####\s*(.+)"}
KNIGHTS: dict[str, Any] = {"prompt": "{quiz}", "answer": "{solution_text_format}", "answer_kind": "text"}
MATH: dict[str, Any] = {
    "prompt": "{problem}",
    "answer": "{solution}",
    "answer_pattern": "boxed",
    "answer_kind": "latex",
}
TEXT: dict[str, Any] = {"prompt": "{text}\n", "answer": ""}
REAL: dict[str, tuple[dict[str, Any], int]] = {
    "gsm8k/train.jsonl": (GSM8K, 7473),
    "gsm8k/test.jsonl": (GSM8K, 1319),
    "math/train.jsonl": (MATH, 7500),
    "math/math500.jsonl": ({"prompt": "{problem}", "answer_kind": "latex"}, 500),
    "math/dsr_sub.parquet": ({"answer_kind": "latex"}, 1209),
    "word_problems/mawps_asdiv-a_train.csv": ({"map": f"{MAPS}:fill_numbers", "completion": "{solution}"}, 3138),
    "word_problems/SVAMP.json": ({"map": f"{MAPS}:svamp"}, 1000),
    "word_problems/svamp_test.jsonl": ({"map": f"{MAPS}:svamp"}, 1000),
    "word_problems/mawps_test.jsonl": ({"map": f"{MAPS}:mawps"}, 2065),
    "word_problems/asdiv_test.jsonl": ({"map": f"{MAPS}:asdiv"}, 2215),
    "logic/3ppl_train.parquet": (KNIGHTS, 900),
    "logic/3ppl_test.parquet": (KNIGHTS, 100),
    "logic/4ppl_train.parquet": (KNIGHTS, 900),
    "logic/4ppl_test.parquet": (KNIGHTS, 100),
    "text/openstax_prealgebra-bundle.txt": (TEXT, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_every_real_file_loads_by_conf_alone(conf: Conf, tokenizer: Any, shared: Path, name: str) -> None:
    settings, rows = REAL[name]
    data = {"path": str(shared / name), "heldout": 0, "max_prompt_tokens": 4096, **settings}
    task = load_task(conf(data, ("grpo",)), tokenizer)
    counts = task.report["grpo"]
    assert counts["rows"] == rows or not rows
    assert counts["kept"] > 0.9 * (counts["rows"] - counts["duplicates"] - counts["dropped_by_map"])


def test_no_real_file_is_left_out(shared: Path) -> None:
    folders = ("gsm8k", "math", "word_problems", "logic", "text")
    names = {str(path.relative_to(shared)) for folder in folders for path in (shared / folder).iterdir()}
    kinds = {Path(name).suffix for name in names if Path(name).name != "LICENSE"}
    assert {name for name in names if not name.startswith("text/")} - {"gsm8k/LICENSE"} == {
        name for name in REAL if not name.startswith("text/")
    }
    assert kinds == {".jsonl", ".json", ".csv", ".parquet", ".txt"}


ROWS = [{"question": f"What is {i} + {i}?", "answer": f"{2 * i:03}"} for i in range(8)]


def written(path: Path) -> None:
    cells = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ";").writerows(cells)
    elif path.suffix == ".xlsx":
        book = openpyxl.Workbook()
        for row in cells:
            assert book.active is not None
            book.active.append(row)
        book.save(path)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=2))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".parquet"])
def test_every_kind_of_file_gives_the_same_task(conf: Conf, tokenizer: Any, tmp_path: Path, ending: str) -> None:
    written(tmp_path / f"rows{ending}")
    data = {"heldout": 2, "answer_kind": "text"}
    task = load_task(conf({**data, "path": str(tmp_path)}, ("grpo", "evaluate")), tokenizer)
    plain = load_task(conf(data, ("grpo", "evaluate")), tokenizer, ROWS)
    assert [(prompt.text, prompt.answer) for prompt in task.prompts] == [
        (prompt.text, prompt.answer) for prompt in plain.prompts
    ]
    assert len(task.prompts) == 6 and len(task.sets["heldout"]) == 2
