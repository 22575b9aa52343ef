"""Mutated files give a clear error or right rows, never a traceback or a changed answer. Seeded; FUZZ_FILES=2000 runs
as many files (500 a format), else 240.

What is right: for CSV and JSONL, what a second reader, written here, finds in the same bytes; for Excel and Parquet,
whose files carry checksums, the rows that were written.
"""

import json
import os
import random
from pathlib import Path

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

from reasoner.data.columns import cell_text
from reasoner.data.files import read_file
from reasoner.errors import DataError

FILES = int(os.environ.get("FUZZ_FILES", "240")) // 4
ROWS = [
    {"question": 'How many, "exactly"?', "answer": "007", "note": "NA"},
    {"question": "Two\nlines; and a\ttab", "answer": "1,234", "note": ""},
    {"question": "Größe 🙂", "answer": "12345678901234567890", "note": "2024-03-04"},
    *({"question": f"What is {i}+{i}?", "answer": str(2 * i), "note": "1.0"} for i in range(20)),
]
TOKENS = [
    b'"',
    b'""',
    b",",
    b";",
    b"\t",
    b"\n",
    b"\r\n",
    b"\r",
    b"\xef\xbb\xbf",
    b"\x00",
    b"{",
    b"}",
    b"[",
    b"\\",
    b":",
]
TOKENS += [
    b"\\ud800",
    b"\xff",
    b"\xc3",
    b"1e999",
    b"NaN",
    b"null",
    b"answer",
    b'"answer": 5, ',
    b"9" * 5000,
    b"[" * 3000,
]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The bytes with one to three changes: flipped, cut, taken out, doubled, swapped, or with something put in."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        start = draw.randrange(len(data) or 1)
        end = min(len(data), start + draw.choice((1, 2, 8, 60, 400)))
        kind = draw.randrange(7)
        if kind == 0 and data:
            data[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[start:]
        elif kind == 2:
            del data[start:end]
        elif kind == 3:
            data[start:start] = data[start:end]
        elif kind == 4:
            data[start:start] = draw.choice(TOKENS)
        elif kind == 5:
            data[start:end] = bytes(draw.randrange(256) for _ in range(end - start))
        else:
            data[start:end] = reversed(data[start:end])
    return bytes(data)


def csv_rows(text: str) -> list[list[str]]:
    """RFC 4180 read character by character, commas alone. Raises ValueError for quotes that don't close."""
    rows: list[list[str]] = [[""]]
    quoted = was_quoted = False
    place = 0
    while place < len(text):
        char = text[place]
        if quoted:
            if char == '"' and text[place + 1 : place + 2] == '"':
                rows[-1][-1] += '"'
                place += 1
            elif char == '"':
                quoted, was_quoted = False, True
            else:
                rows[-1][-1] += char
        elif char == '"' and not rows[-1][-1] and not was_quoted:
            quoted = True
        elif char == ",":
            rows[-1].append("")
            was_quoted = False
        elif char in "\r\n":
            place += text[place : place + 2] == "\r\n"
            rows.append([""])
            was_quoted = False
        elif was_quoted:
            raise ValueError("text after a quote")
        else:
            rows[-1][-1] += char
        place += 1
    if quoted:
        raise ValueError("an open quote")
    return [row for row in rows if len(row) > 1 or row[0].strip()]


def expected_csv(data: bytes) -> list[dict[str, str]] | None:
    try:
        header, *rows = csv_rows(data.decode("utf-8-sig"))
    except ValueError:
        return None
    names = [name.strip() for name in header]
    return [dict(zip(names, row, strict=False)) for row in rows if len(row) == len(names)]


def expected_jsonl(data: bytes) -> list[dict[str, str]] | None:
    try:
        lines = [line.decode("utf-8-sig" if not number else "utf-8") for number, line in enumerate(data.split(b"\n"))]
        rows = [json.loads(line, parse_float=str, parse_int=str) for line in lines if line.strip()]
        return [{name: "" if str(cell) == "nan" else cell_text(cell) for name, cell in row.items()} for row in rows]
    except (ValueError, AttributeError, RecursionError):
        return None


def write(path: Path) -> None:
    if path.suffix == ".csv":
        quoted = [
            ['"' + cell.replace('"', '""') + '"' for cell in row] for row in [list(ROWS[0]), *map(dict.values, ROWS)]
        ]
        path.write_text("".join(",".join(row) + "\n" for row in quoted), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif path.suffix == ".xlsx":
        book = openpyxl.Workbook()
        for row in [list(ROWS[0]), *(list(row.values()) for row in ROWS)]:
            assert book.active is not None
            book.active.append(row)
        book.save(path)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, write_page_checksum=True)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".xlsx", ".parquet"])
def test_mutated_files_give_an_error_or_right_rows(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows{ending}"
    write(path)
    sound = path.read_bytes()
    assert [row for row, _ in read_file(path)] == ROWS
    told = {"errors": 0, "right": 0}
    for seed in range(FILES):
        data = mutated(sound, random.Random(f"{ending}/{seed}"))
        path.write_bytes(data)
        right = {".csv": expected_csv, ".jsonl": expected_jsonl}.get(ending, lambda _: ROWS)(data)
        try:
            rows = [{name: cell_text(cell) for name, cell in row.items()} for row, _ in read_file(path)]
        except DataError as error:
            assert "\n" not in str(error) and path.name in str(error), (seed, error)
            told["errors"] += 1
            continue
        if ending == ".parquet" and rows[0].keys() != ROWS[0].keys():
            told["errors"] += 1  # a name in the footer, which has no checksum, changed: the template misses its column
            continue
        assert rows == right, f"seed {seed}"
        told["right"] += 1
    assert min(told.values()) > 0 or ending in (".xlsx", ".parquet"), told
    print(ending, told)
