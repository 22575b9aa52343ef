"""The verb eval on a trained run: what it measures is what the run measured, on which sets, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from reasoner.__main__ import main
from reasoner.compose import packaged_confs
from reasoner.config import data_of
from reasoner.data.benchmarks import competition
from reasoner.data.word_problems import calc
from reasoner.evaluation.sets import compose_sets
from reasoner.results import best_of


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores(rows: list[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    keys = ("greedy_accuracy", "sampled_accuracy", "mean_tokens", "cut_share")
    return {row["row"]: tuple(row[key] for key in keys) for row in rows}


@pytest.fixture(scope="module")
def evaluated(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weights of the run, measured again."""
    out = tmp_path_factory.mktemp("evaluated") / "all"
    assert main(["eval", f"run={trained_run}", "checkpoints=all", "k=1,2", f"out={out}"]) == 0
    return out


def test_e13_what_is_measured_again_is_what_the_run_measured(trained_run: Path, evaluated: Path):
    """Base, both checkpoints that were kept and the exported model: the same verdicts and the same samples."""
    rows = json.loads((evaluated / "eval.json").read_text())
    kept = sorted(path.name for path in (trained_run / "checkpoints").iterdir())
    assert [row["row"] for row in rows] == ["base", *kept, "export"]
    before = scores(json.loads((trained_run / "eval.json").read_text()))
    assert scores(rows) == {name: before[name] for name in scores(rows)}
    assert rows[-1]["pass_at_1"] == pytest.approx(rows[-1]["sampled_accuracy"])
    assert rows[-1]["maj_at_1"] == pytest.approx(rows[-1]["sampled_accuracy"]) and rows[-1]["maj_at_2"] > 0
    texts = [
        [line["text"] for line in lines(path / "eval_problems.jsonl") if line["row"] == "export"]
        for path in (trained_run, evaluated)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 60
    summary = json.loads((evaluated / "summary.json").read_text())
    assert summary["status"] == "done" and summary["evaluated"] == str(trained_run)
    assert (evaluated / "config.yaml").is_file()


def test_other_rows_by_the_keys_of_data_and_by_column(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """A row that the run trained on and two that are new: the first is said not to be held out."""
    trained = lines(trained_run / "completions.jsonl")[0]
    rows = [{"sum": trained["prompt"].removesuffix("="), "total": trained["answer"], "level": "seen"}]
    rows += [{"sum": "12 + 21", "total": "33", "level": "new"}, {"sum": "11 + 22 + 33", "total": "66", "level": "new"}]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = ["checkpoints=last", "by=level", f"out={tmp_path / 'out'}", "evaluate.samples=0"]
    of = [f"data.path={path}", "data.prompt='{sum}='", "data.answer='{total}'"]
    assert main(["eval", f"run={trained_run}", *told, *of]) == 0
    said = capsys.readouterr().out
    assert "own, level seen: 1 held-out problem\n" in said and "own, level new: 2 held-out problems" in said
    assert "warning: problems of own are among the training rows (2 rows over all stages)" in said
    (row,) = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (row["row"], row["set"], row["problems"]) == ("03-grpo-000006", "own", 3)
    assert lines(tmp_path / "out" / "eval_problems.jsonl")[0]["columns"]["level"] == "seen"


def test_a_model_is_evaluated_under_a_conf(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The exported folder by conf=: the data of the run, so its score."""
    own = yaml.safe_load((trained_run / "config.yaml").read_text())
    conf = tmp_path / "mine.yaml"
    conf.write_text(yaml.safe_dump({**own, "out": str(tmp_path / "out"), "name": "mine"}))
    assert main(["eval", f"conf={conf}", f"model={trained_run / 'model'}"]) == 0
    rows = json.loads((tmp_path / "out" / "eval.json").read_text())
    before = scores(json.loads((trained_run / "eval.json").read_text()))
    assert scores(rows)["base"][0] == before["export"][0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to evaluate"),
        (["run={tmp}"], "name a run's folder"),
        (["run={run}", "conf=tiny"], "leave conf= out"),
        (["run={run}", "model=smol"], "conf=NAME model="),
        (["conf=tiny", "checkpoints=all"], "give run=DIR"),
        (["rows=sft,grpo", "conf=tiny"], "give run=DIR"),
        (["run={run}", "checkpoints=03-grpo-000005"], "did you mean '03-grpo-000006'"),
        (["run={run}", "sets=maths500"], "did you mean 'math500'"),
        (["run={run}", "by=levle"], "by=levle: no row has such a column"),
        (["run={run}", "k=8"], "add evaluate.samples=8"),
        (["run={run}", "k=none"], "k=1,4,8"),
        (["run={run}", "evaluate.sample=3"], "did you mean 'samples'"),
        (["run={run}", "--all"], "no option --all"),
        (["run={run}", "everything"], "no key=value"),
        (["run={run}", "sets="], "sets= is empty"),
        (["run={run}", "run={run}"], "there twice"),
        (["run={run}", "rows=sft,last"], "no such row"),
        (["run={run}", "run={tmp}"], "eval_problems.jsonl"),
        (["run={run}", "run={other}", "evaluate.samples=2"], "then compare the folders"),
        (["run={run}", "rows=sft,grpo", "k=9"], "4 samples that were kept"),
    ],
)
def test_what_is_asked_wrong_is_one_line(
    arguments: list[str], said: str, trained_run: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    filled = [text.format(run=trained_run, tmp=tmp_path, other=evaluated) for text in arguments]
    out = [f"out={tmp_path / 'out'}"] if any(text.startswith(("by=", "evaluate.sample=")) for text in filled) else []
    assert main(["eval", *filled, *out]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and error.startswith("error: ")


def test_a_best_that_is_not_there_says_why(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    rows = json.loads((run / "eval.json").read_text())
    best = best_of(rows, 3)
    assert best
    shutil.rmtree(run / "checkpoints" / best.name)
    assert main(["eval", f"run={run}", "checkpoints=best"]) == 2
    assert capsys.readouterr().err == f"error: checkpoints=best: its checkpoint, {best.name}, was deleted\n"
    (run / "eval.json").write_text(json.dumps([row for row in rows if "step" not in row]))
    assert main(["eval", f"run={run}", "checkpoints=best"]) == 2
    assert "measured no checkpoint on the way: set grpo.eval_every" in capsys.readouterr().err
    shutil.rmtree(run / "model")
    assert main(["eval", f"run={run}", "checkpoints=export"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_two_runs_are_compared_from_their_files_over_the_problems_that_both_have(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """The other run called its set otherwise, lacks 10 problems, limited lengths, and lost three that were right."""
    other = tmp_path / "other"
    other.mkdir()
    conf = yaml.safe_load((trained_run / "config.yaml").read_text())
    conf["evaluate"]["max_completion_tokens"] = 4
    (other / "config.yaml").write_text(yaml.safe_dump(conf))
    mine = [line for line in lines(trained_run / "eval_problems.jsonl") if line["row"] == "export"]
    right = [line["problem"] for line in mine[10:] if line["right"]][:3]
    theirs = [
        {**line, "set": "test", "id": f"test:{i}", "right": line["right"] and line["problem"] not in right}
        for i, line in enumerate(reversed(mine[10:]))
    ]
    (other / "eval_problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in theirs))
    assert main(["eval", f"run={trained_run}", f"run={other}", "by=metadata[num_terms]"]) == 0
    said = capsys.readouterr().out
    assert f"test: 50 problems in both ({trained_run} export 60, {other} export 50)" in said
    assert "-6.0 points" in said and "0 gained, 3 lost, McNemar p = 0.25" in said and "can't tell" in said
    assert "test, metadata[num_terms] 2: 50 held-out problems" in said
    assert "warning: they were measured with different evaluate.max_completion_tokens: [null, 4]" in said
    assert main(["eval", f"run={other}", f"run={trained_run}"]) == 0
    back = capsys.readouterr().out
    assert "heldout: 50 problems in both" in back and "+6.0 points" in back and "3 gained, 0 lost" in back


def test_rows_of_one_run_are_compared(trained_run: Path, capsys: pytest.CaptureFixture):
    assert main(["eval", f"run={trained_run}", "rows=base,sft"]) == 0
    said = capsys.readouterr().out
    assert "sft against base on heldout: +" in said and "0 lost" in said and "pass@4" in said


SETS = sorted(path.stem for path in (packaged_confs() / "sets").glob("*.yaml"))


def test_every_named_set_joins_any_conf_and_its_map_gives_the_columns_it_says():
    assert SETS == ["aime24", "aime25", "asdiv", "gsm8k", "math500", "mawps", "svamp"]
    config, _, added = compose_sets("gsm8k", ["card=8"], SETS)
    assert set(config.evaluate.sets) == added == set(SETS)
    for name, node in config.evaluate.sets.items():
        data = data_of(config, node, name)
        assert data.path is None and data.name and "/" in data.name and data.split in ("test", "train", "validation")
    own, _, added = compose_sets("gsm8k", ["card=8"], ["math500", "gsm8k_test"])
    assert set(own.evaluate.sets) == {"math500", "gsm8k_test"} and added == {"math500"}


def test_maps_of_the_named_sets():
    row = {"problem": "2+2?", "answer": "4", "level": 1, "subject": "Algebra", "unique_id": "a/1", "solution": "..."}
    assert competition(row) == {"question": "2+2?", "answer": "4", "level": 1, "subject": "Algebra"}
    assert competition({"problem": "x", "answer": 33, "year": "2024"}) == {
        "question": "x",
        "answer": "33",
        "year": "2024",
    }
    assert calc({"question": "Two and two ?", "result": "4", "result_float": 4.0}) == {
        "question": "Two and two?",
        "answer": "4",
    }
