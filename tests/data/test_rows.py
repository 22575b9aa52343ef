"""Rows from Python, files, the hub and reasoning-gym; data.map; limits; what tells sources apart."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from reasoner.config import Data
from reasoner.data.rows import Row, read_rows, source_of
from reasoner.errors import ConfigError, DataError, MissingExtra

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def jsonl(folder: Path, count: int = 5) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(f'{{"question": "q{i}", "answer": "{i}"}}\n' for i in range(1, count + 1)))
    return str(path)


def script(folder: Path, text: str) -> str:
    path = folder / "own.py"
    path.write_text(text)
    return str(path)


def test_rows_from_python_are_named_by_their_number() -> None:
    given = ({"question": f"q{i}", "answer": i} for i in (1, 2))
    assert read_rows(Data(path="ignored.jsonl"), given).rows == [
        Row({"question": "q1", "answer": 1}, "row 1", 1),
        Row({"question": "q2", "answer": 2}, "row 2", 2),
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "rows handed in from Python are empty"),
        (iter(()), "was the iterable used up before"),
        ([{"a": 1}, "text"], "row 2 is a str, not a mapping"),
    ],
)
def test_rows_from_python_that_are_none(given: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_rows(Data(), given)


def test_path_comes_before_name(tmp_path: Path) -> None:
    rows = read_rows(Data(path=jsonl(tmp_path), name="openai/gsm8k")).rows
    assert [(row.columns["question"], row.number) for row in rows][:2] == [("q1", 1), ("q2", 2)]
    assert rows[2].where.endswith("rows.jsonl:3")


def test_map_changes_and_drops_and_limit_counts_what_is_left(tmp_path: Path) -> None:
    own = script(
        tmp_path, "def odd(row):\n    n = int(row['answer'])\n    return {'n': n, 'question': 'q'} if n % 2 else None\n"
    )
    read = read_rows(Data(path=jsonl(tmp_path), map=f"{own}:odd"))
    assert [(row.columns["n"], row.number) for row in read.rows] == [(1, 1), (3, 3), (5, 5)]
    assert read.dropped_by_map == 2
    limited = read_rows(Data(path=jsonl(tmp_path), map=f"{own}:odd", limit=2))
    assert ([row.number for row in limited.rows], limited.dropped_by_map) == ([1, 3], 1)


def test_map_gets_a_row_of_its_own(tmp_path: Path) -> None:
    given = [{"question": "q", "answer": "1"}]
    own = script(tmp_path, "def change(row):\n    row['question'] += '!'\n    return row\n")
    assert read_rows(Data(map=f"{own}:change"), given).rows[0].columns["question"] == "q!"
    assert given[0]["question"] == "q"


def test_map_from_a_module() -> None:
    row = {"input": "Sam ?", "target": 3.0}
    read = read_rows(Data(map="reasoner.data.word_problems:mawps"), [row])
    assert read.rows[0].columns == {"question": "Sam?", "answer": "3"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "return row['Numbers']",
            r"row 1: data\.map=.*:change raises KeyError: 'Numbers'; the columns there are: question",
        ),
        ("return 3", r"row 1: data\.map=.*:change returns a int: return a dict, or None to drop the row"),
        ("return None", r"data\.map=.*:change dropped all 1 rows"),
    ],
)
def test_a_map_that_fails_names_the_row(tmp_path: Path, body: str, said: str) -> None:
    own = script(tmp_path, f"def change(row):\n    {body}\n")
    with pytest.raises(DataError, match=said):
        read_rows(Data(map=f"{own}:change"), [{"question": "q"}])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("own.py", "write file.py:function or module:function"),
        ("{folder}/none.py:change", "there is no file"),
        ("{folder}/own.py:chagne", "has no function 'chagne': did you mean 'change'?"),
        ("{folder}/broken.py:change", "can't be imported (SyntaxError"),
        ("no_such_module:change", "can't be imported (ModuleNotFoundError"),
    ],
)
def test_maps_that_can_not_be_found(tmp_path: Path, spec: str, said: str) -> None:
    script(tmp_path, "def change(row):\n    return row\n")
    (tmp_path / "broken.py").write_text("def change(row:\n")
    with pytest.raises(ConfigError) as caught:
        read_rows(Data(map=spec.format(folder=tmp_path)), [{"question": "q"}])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_says_where_rows_come_from() -> None:
    with pytest.raises(ConfigError, match=r"give data\.path=FILE or data\.name="):
        read_rows(Data())
    with pytest.raises(ConfigError, match=r"looks like a file: say data\.path=train\.jsonl"):
        read_rows(Data(name="train.jsonl"))


def test_a_hub_out_of_reach_is_one_line_with_the_way_out() -> None:
    code = (
        "from reasoner.config import Data\nfrom reasoner.data.rows import read_rows\n"
        "from reasoner.errors import DataError\n"
        "try: read_rows(Data(name='openai/gsm8k', subset='main', split='train'))\n"
        "except DataError as error: print(error)"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline, check=True)
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("data.name=openai/gsm8k can't be loaded from the hub (")
    assert "data.path=PLACE" in done.stdout


def test_a_hub_data_set_reads_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    made = {
        "train": datasets.Dataset.from_list([{"q": "a"}, {"q": "b"}]),
        "test": datasets.Dataset.from_list([{"q": "c"}]),
    }
    asked: list[tuple[Any, ...]] = []

    def load(name: str, subset: str | None, *, split: str | None, revision: str | None) -> Any:
        asked.append((name, subset, split, revision))
        return made[split] if split else datasets.DatasetDict(made)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows(Data(name="some/set", subset="main", split="train", revision="abc")).rows
    assert [(row.columns, row.where) for row in rows] == [
        ({"q": "a"}, "some/set/train:row 1"),
        ({"q": "b"}, "some/set/train:row 2"),
    ]
    assert asked == [("some/set", "main", "train", "abc")]
    with pytest.raises(DataError, match=r"several splits: choose one with data\.split; there are: train, test"):
        read_rows(Data(name="some/set"))
    del made["test"]
    assert len(read_rows(Data(name="some/set")).rows) == 2


def test_generated_rows_carry_what_their_verifier_needs() -> None:
    data = Data(name="reasoning_gym/chain_sum", size=4, seed=5, options=SUMS)
    rows = read_rows(data).rows
    assert [row.where for row in rows][:1] == ["reasoning_gym/chain_sum:row 1"]
    for row in rows:
        entry = {
            "question": row.columns["question"],
            "answer": row.columns["answer"],
            "metadata": row.columns["metadata"],
        }
        score = reasoning_gym.get_score_answer_fn(row.columns["task"])
        assert score(row.columns["answer"], entry) == 1.0
        assert eval(row.columns["metadata"]["expression"]) == int(row.columns["answer"])
    assert read_rows(data).rows == rows


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "reasoning_gym/chain_sums", "size": 4}, "has no task 'chain_sums': did you mean 'chain_sum'?"),
        ({"name": "reasoning_gym/chain_sum"}, "say how many rows with data.size=ROWS"),
        (
            {"name": "reasoning_gym/chain_sum", "size": 4, "options": {"min_term": 2}},
            "no setting 'min_term': did you mean",
        ),
        ({"name": "reasoning_gym/chain_sum", "size": 4, "options": {"seed": 2}}, "write data.seed instead"),
        (
            {"name": "reasoning_gym/chain_sum", "size": 4, "options": {"min_terms": 9, "max_terms": 2}},
            "refuses {'min_terms'",
        ),
    ],
)
def test_generated_rows_that_can_not_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(Data(**settings))
    assert said in str(caught.value)


MIXED = {"chain_sum": {"weight": 3, **SUMS}, "gcd": 1}


def test_a_mixture_has_its_shares_in_every_stretch_and_verifiers_for_all() -> None:
    data = Data(name="reasoning_gym/mixture", size=40, options=MIXED)
    rows = read_rows(data).rows
    tasks = [row.columns["task"] for row in rows]
    assert [tasks[start : start + 4].count("gcd") for start in range(0, 40, 4)] == [1] * 10
    assert rows[0].where == "reasoning_gym/mixture:row 1 (chain_sum)"
    for row in rows:
        score = reasoning_gym.get_score_answer_fn(row.columns["task"])
        assert score(row.columns["answer"], dict(row.columns)) == 1.0
    assert len({row.columns["question"] for row in rows if row.columns["task"] == "gcd"}) == 10
    assert read_rows(data).rows == rows
    assert source_of(data) != source_of(Data(name="reasoning_gym/mixture", size=40, options={"gcd": 1}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "name its tasks, data.options={chain_sum: 2"),
        ({"chain_sums": 1}, "no task 'chain_sums': did you mean 'chain_sum'?"),
        ({"chain_sum": 0}, "data.options.chain_sum: the weight 0 is no number above 0"),
        ({"chain_sum": "much"}, "the weight 'much' is no number above 0"),
        ({"chain_sum": {"min_term": 2}}, "data.options.chain_sum: reasoning-gym's chain_sum has no setting 'min_term'"),
        ({"chain_sum": {"size": 2}}, "data.options.chain_sum.size: write data.size instead"),
        ({"chain_sum": 1, "gcd": 0.001}, "data.options.gcd: its weight gives it none of data.size=4 rows"),
    ],
)
def test_mixtures_that_can_not_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(Data(name="reasoning_gym/mixture", size=4, options=options))
    assert said in str(caught.value)
    with pytest.raises(DataError, match=r"data\.size=ROWS"):
        read_rows(Data(name="reasoning_gym/mixture", options={"gcd": 1}))


def test_without_the_extra_it_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[gym\]'"):
        read_rows(Data(name="reasoning_gym/chain_sum", size=4))


def test_sources_are_told_apart(tmp_path: Path) -> None:
    path = jsonl(tmp_path)
    (tmp_path / "test.jsonl").write_text("{}")
    same = source_of(Data(path=path, split="train"))
    assert same == source_of(Data(path=str(tmp_path / "." / "rows.jsonl"), split="test", prompt="{x}", limit=3))
    assert (
        same == source_of(Data(path=str(tmp_path), split="rows")) != source_of(Data(path=str(tmp_path), split="test"))
    )
    hub = Data(name="a/b", split="train")
    assert source_of(hub) != source_of(Data(name="a/b", split="test"))
    assert source_of(hub) != source_of(Data(name="a/b", split="train", subset="main"))
    gym = Data(name="reasoning_gym/chain_sum", size=4, options=SUMS)
    assert source_of(gym) == source_of(
        Data(name="reasoning_gym/chain_sum", size=9, options=dict(reversed(SUMS.items())))
    )
    assert source_of(gym) != source_of(Data(name="reasoning_gym/chain_sum", size=4, options=SUMS, seed=1))
    assert source_of(Data(path=path, sheet="a")) != source_of(Data(path=path, sheet="b")) != same
    assert source_of(hub, [{}]) == source_of(gym, [{}]) == ("rows",)


def test_streamed_rows_are_the_first_of_the_set_and_no_more_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = "".join(f'{{"question": "q{i}", "answer": "{i}"}}\n' for i in range(1, 41))
    (tmp_path / "train-00000-of-00002.jsonl").write_text(rows)
    (tmp_path / "train-00001-of-00002.jsonl").write_text('{"question": \n')  # never reached
    (tmp_path / "test.jsonl").write_text('{"question": "t", "answer": "1"}\n')
    whole = datasets.load_dataset

    def of_folder(name: str, subset: str | None, **options: Any) -> Any:
        assert name == "some/set" and options["streaming"] is True
        return whole(str(tmp_path), subset, **options)

    monkeypatch.setattr(datasets, "load_dataset", of_folder)
    streamed = read_rows(Data(name="some/set", split="train", streaming=True, limit=3)).rows
    assert list(streamed) == [
        Row({"question": f"q{i}", "answer": str(i)}, f"some/set/train:row {i}", i) for i in (1, 2, 3)
    ]
    with pytest.raises(DataError, match=r"has several splits: choose one with data\.split; there are: train, test"):
        read_rows(Data(name="some/set", streaming=True, limit=3))
    with pytest.raises(DataError, match=r"data\.name=some/set can't be loaded from the hub"):  # it breaks on the way
        read_rows(Data(name="some/set", split="train", streaming=True, limit=41))
    with pytest.raises(ConfigError, match=r"say how many with data\.limit=ROWS"):
        read_rows(Data(name="some/set", split="train", streaming=True))
