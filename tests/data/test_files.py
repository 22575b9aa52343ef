"""Rows of local files: as written, with their place, and one clear line where a file is broken. F3, F4."""

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from reasoner.data.columns import cell_text
from reasoner.data.files import find_files, read_file, read_files
from reasoner.errors import DataError


def rows_of(path: Path) -> list[tuple[dict[str, Any], str]]:
    return list(read_files(find_files(str(path))))


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "cell",
    ["007", "1.0", "NA", "None", "null", "nan", "True", "12345678901234567890", "3/4", "1e5", " x ", "1,5", '"q"'],
)
def test_f3_csv_cells_stay_as_written(tmp_path: Path, cell: str) -> None:
    quoted = '"' + cell.replace('"', '""') + '"'
    path = written(tmp_path, "a.csv", f"question,answer\nq,{quoted}\nr,1.0\n")
    assert [row for row, _ in rows_of(path)] == [{"question": "q", "answer": cell}, {"question": "r", "answer": "1.0"}]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_f3_separator_is_recognised_by_the_header(tmp_path: Path, mark: str) -> None:
    path = written(tmp_path, "a.csv", f'question{mark}answer\n"1{mark}2"{mark}3\n')
    assert rows_of(path)[0][0] == {"question": f"1{mark}2", "answer": "3"}


def test_csv_knows_the_line_a_row_starts_on(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", '\ufeff\n\nquestion,answer\r\n"two\nlines",1\n\nlast,2\n')
    assert rows_of(path) == [
        ({"question": "two\nlines", "answer": "1"}, f"{path}:4"),
        ({"question": "last", "answer": "2"}, f"{path}:7"),
    ]


def test_csv_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    assert rows_of(written(tmp_path, "a.csv", "\ufeffquestion,answer\nq,1\n"))[0][0] == {"question": "q", "answer": "1"}


def test_csv_keeps_rows_of_empty_cells_for_the_count(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'question,answer\n,\n"",1\nshort,\n   \n')
    assert [list(row.values()) for row, _ in rows_of(path)] == [["", ""], ["", "1"], ["short", ""]]


def test_csv_row_with_fewer_cells_than_the_header_could_be_shifted(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, "a.csv", "answer;question;level\n1;q;easy\nq;easy\n"))
    assert "a.csv:3: 2 cells for the 3 columns of the header: write a ';' for each empty cell too" in message


def test_csv_holds_cells_longer_than_its_own_limit(tmp_path: Path) -> None:
    assert len(rows_of(written(tmp_path, "a.csv", f"question\n{'x' * 200_000}\n"))[0][0]["question"]) == 200_000


def test_f3_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    assert "a.csv:1: two columns are named 'answer'" in refusal(written(tmp_path, "a.csv", "answer,q,answer\n1,2,3\n"))


def test_csv_row_with_more_cells_than_the_header(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, "a.csv", "question,answer\nq,1\nSay, please,2\n"))
    assert "a.csv:3: 3 cells for the 2 columns" in message and "double quotes" in message


def test_csv_with_an_open_quote(tmp_path: Path) -> None:
    assert "a.csv:3: broken CSV" in refusal(written(tmp_path, "a.csv", 'question,answer\nq,1\n"open,2\n'))


def test_jsonl_skips_blank_lines_and_knows_its_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '\ufeff{"a": "007"}\r\n\n{"a": 145.0, "b": [true, null]}')
    assert rows_of(path) == [({"a": "007"}, f"{path}:1"), ({"a": 145.0, "b": [True, None]}, f"{path}:3")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"a": 1', ":17: broken JSON at column 8"),
        ("[1, 2]", ":17: a JSON list where an object is wanted"),
        ('"text"', ":17: a JSON str where an object is wanted"),
        ('{"a": "\\ud800"}', ":17: half of a surrogate pair"),
        (b'{"a": "\xe4"}', ":17: byte 8 is not UTF-8"),
    ],
)
def test_jsonl_broken_at_line_17(tmp_path: Path, line: str | bytes, said: str) -> None:
    good = b'{"a": 1}\n' * 16
    assert said in refusal(written(tmp_path, "a.jsonl", good + (line.encode() if isinstance(line, str) else line)))


def test_json_is_a_list_or_lines(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": 2}]
    listed = written(tmp_path, "list.json", json.dumps(rows, indent=1))
    assert rows_of(listed) == [({"a": 1}, f"{listed}:row 1"), ({"a": 2}, f"{listed}:row 2")]
    lines = written(tmp_path, "lines.json", "\n".join(map(json.dumps, rows)))
    assert rows_of(lines) == [({"a": 1}, f"{lines}:1"), ({"a": 2}, f"{lines}:2")]
    assert "list.json:3: broken JSON" in refusal(written(tmp_path, "list.json", '[\n{"a": 1}\n{"a": 2}]'))
    assert "row 2: a JSON int where" in refusal(written(tmp_path, "list.json", '[{"a": 1}, 2]'))


def test_parquet_keeps_types_and_nested_cells(tmp_path: Path) -> None:
    rows = [{"q": "one", "meta": {"gold": ["1"]}, "n": 1.5}, {"q": None, "meta": None, "n": None}]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert rows_of(path) == [(rows[0], f"{path}:row 1"), (rows[1], f"{path}:row 2")]
    assert "is no whole Parquet file" in refusal(written(tmp_path, "cut.parquet", path.read_bytes()[:-20]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.tsv"])
def test_files_without_rows_are_refused(tmp_path: Path, name: str) -> None:
    assert "holds no rows" in refusal(written(tmp_path, name, "\n \n"))
    assert "holds no rows" in refusal(written(tmp_path, name, ""))
    if name == "a.csv":
        assert "holds no rows" in refusal(written(tmp_path, name, "question,answer\n"))


def test_a_file_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    written(tmp_path, "train.jsonl", "{}")
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in refusal(tmp_path / "trian.jsonl")
    assert "there is no such file" in refusal(tmp_path / "nowhere" / "a.csv")
    assert "a file ends in .jsonl, .ndjson, .json, .csv" in refusal(written(tmp_path, "a.docx", "x"))
    assert "; save it as .xlsx" in refusal(written(tmp_path, "a.xls", "x"))
    assert "; unpack it first" in refusal(written(tmp_path, "a.jsonl.gz", "x"))


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "a.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match="can't be read: Is a directory"):
        list(read_file(folder))


def test_a_folder_means_the_file_of_the_split(tmp_path: Path) -> None:
    written(tmp_path, "train.jsonl", '{"a": 1}')
    written(tmp_path, "test.csv", "a\n2\n")
    assert [file.name for file in find_files(str(tmp_path), "train")] == ["train.jsonl"]
    assert [file.name for file in find_files(str(tmp_path), "test")] == ["test.csv"]
    for split in ("dev", None):
        with pytest.raises(DataError, match=r"set data\.split; there is: test\.csv, train\.jsonl"):
            find_files(str(tmp_path), split)


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["a.jsonl", "b.jsonl", "notes.md"], None, ["a.jsonl", "b.jsonl"]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"], "train", 2),
        (["gsm8k_train.jsonl", "gsm8k_test.jsonl"], "test", ["gsm8k_test.jsonl"]),
        (["train/a.jsonl", "train/b.jsonl", "test/c.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
        (["a.jsonl", "b.csv"], None, None),
        (["a.jsonl", "test.jsonl"], None, None),
        (["train.jsonl", "train.csv"], "train", None),
        ([], None, None),
    ],
)
def test_folders(tmp_path: Path, names: list[str], split: str | None, found: Any) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path, name, '{"a": 1}')
    if found is None:
        with pytest.raises(DataError, match="is a folder: name a file in it"):
            find_files(str(tmp_path), split)
    else:
        files = [file.name for file in find_files(str(tmp_path), split)]
        assert files == (found if isinstance(found, list) else names[:found])


def test_patterns_read_all_that_they_match_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "sub/c.jsonl", "x[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path, name, "a\n1\n" if name == "a.csv" else '{"a": "1"}')
    assert [where for _, where in rows_of(tmp_path / "[ab].*")] == [f"{tmp_path}/a.csv:2", f"{tmp_path}/b.jsonl:1"]
    assert len(rows_of(tmp_path / "**/*.jsonl")) == 3
    assert len(rows_of(tmp_path / "x[1].jsonl")) == 1  # a file of this very name comes first
    assert "no file is named like this" in refusal(tmp_path / "*.tsv")
    written(tmp_path, "a.md", "x")
    assert "a.md): a file ends in" in refusal(tmp_path / "a.*")


@pytest.mark.parametrize("text", ["1.0", "1.10", "145.0", "0.1", "1e3", "-0.0", "123456789.123456789123", "1E400"])
def test_f3_a_json_number_keeps_its_digits(tmp_path: Path, text: str) -> None:
    ((row, _),) = rows_of(written(tmp_path, "a.jsonl", f'{{"answer": {text}, "n": 12345678901234567890}}'))
    assert (cell_text(row["answer"]), cell_text(row["n"])) == (text, "12345678901234567890")
    assert isinstance(row["answer"], float) and row["answer"] == float(text)
    assert cell_text(pickle.loads(pickle.dumps(row["answer"]))) == text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"a": 1, "a": 2}', "the name 'a' is there twice"),
        (f'{{"a": {"9" * 5000}}}', "JSON that no row can hold (Exceeds the limit (4300 digits)"),
        (f'{{"a": {"[" * 100_000}', "JSON that no row can hold (maximum recursion depth"),
    ],
)
def test_json_that_no_row_can_hold(tmp_path: Path, line: str, said: str) -> None:
    assert said in refusal(written(tmp_path, "a.jsonl", f'{{"a": 1}}\n{line}\n'))
    assert "JSON" in refusal(written(tmp_path, "a.json", f"[{line}]"))
    assert "JSON" in refusal(written(tmp_path, "b.json", line))


def test_json_object_around_a_list(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", json.dumps({"version": 1, "data": [{"a": 1}, {"a": 2}]}, indent=1))
    assert rows_of(path) == [({"a": 1}, f"{path}:data row 1"), ({"a": 2}, f"{path}:data row 2")]
    assert "is one JSON object, not rows" in refusal(written(tmp_path, "b.json", '{\n"a": 1}'))


def test_a_line_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "\ufeffone  \r\n\ntwo")
    assert rows_of(path) == [({"text": "one  "}, f"{path}:1"), ({"text": "two"}, f"{path}:3")]


def test_parquet_of_narrow_floats_and_doubled_names(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    narrow = pyarrow.array([0.1, None, float("nan")], pyarrow.float32())
    pyarrow.parquet.write_table(pyarrow.table({"n": narrow, "big": [10**15, 1, None]}), path)
    rows = [row for row, _ in rows_of(path)]
    assert [cell_text(row["n"]) for row in rows] == ["0.1", "", ""] and rows[1]["n"] is None
    assert [cell_text(row["big"]) for row in rows] == ["1000000000000000", "1", ""]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([narrow, narrow], names=["n", "n"]), path)
    assert "two columns are named 'n'" in refusal(path)


COUNTS = {
    "gsm8k/train.jsonl": 7473,
    "gsm8k/test.jsonl": 1319,
    "math/train.jsonl": 7500,
    "math/math500.jsonl": 500,
    "math/dsr_sub.parquet": 1209,
    "word_problems/mawps_asdiv-a_train.csv": 3138,
    "word_problems/SVAMP.json": 1000,
    "word_problems/svamp_test.jsonl": 1000,
    "word_problems/mawps_test.jsonl": 2065,
    "word_problems/asdiv_test.jsonl": 2215,
    "logic/3ppl_train.parquet": 900,
    "logic/3ppl_test.parquet": 100,
    "logic/4ppl_train.parquet": 900,
    "logic/4ppl_test.parquet": 100,
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_files_load_whole(shared: Path, name: str) -> None:
    rows = rows_of(shared / name)
    assert len(rows) == COUNTS[name]
    assert len({where for _, where in rows}) == len(rows)
    assert len({tuple(row) for row, _ in rows}) == 1  # the same columns everywhere
