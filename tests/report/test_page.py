"""The page's bytes: nothing in it can run but its own scripts, it stays small, and what can't be reported is said."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.report_page import PLANTED, write_run
from reasoner.__main__ import main
from reasoner.errors import ConfigError, RunFolderError
from reasoner.report.write import HERE, gather, page, write_report

UPLOT_SHA256 = "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"


def data_of(text: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("made") / "run"
    write_run(run, steps=30, prompts=4, completions=4, words=40, planted=PLANTED)
    return run


def page_of(runs: list[Path]) -> bytes:
    return page(gather(runs))


def test_only_the_page_s_own_scripts_may_run(made_up: Path) -> None:
    text = page_of([made_up]).decode()
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    hashes = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts}
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert len(scripts) == 2 and hashes == set(re.findall(r"script-src (.*?);", policy.replace("&#x27;", "'"))[0]
        .replace("'sha256-", "").replace("'", "").split())  # fmt: skip
    assert "default-src 'none'" in policy.replace("&#x27;", "'") and "unsafe" not in policy
    assert "planted'</" not in text.replace(json.dumps(PLANTED), ""), "a text of the run left its JSON element"
    assert PLANTED in data_of(text)["runs"][0]["completions"]["prompts"][0]["text"]


def test_no_script_makes_markup_from_text() -> None:
    for path in (HERE / "page").glob("*.js"):
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|srcdoc", path.read_text()
        )
        assert found == [], path


def test_the_charting_library_is_the_published_file_with_its_licence() -> None:
    assert hashlib.sha256((HERE / "uplot/uPlot.iife.min.js").read_bytes()).hexdigest() == UPLOT_SHA256
    assert "MIT License" in (HERE / "uplot/LICENSE").read_text()


def test_a_long_run_is_sampled_and_the_page_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=300, prompts=16, completions=4, words=400)
    written = tmp_path / "report.html"
    write_report([tmp_path / "run"], written)
    assert written.stat().st_size < 3_000_000
    found = data_of(written.read_text())["runs"][0]["completions"]
    assert (found["total"], found["all_steps"], found["read_steps"]) == (19_200, 300, 60)
    steps = {row["step"] for row in found["items"]}
    assert len(steps) == 60 and {1, 300} <= steps, "every step that was read has a completion, the ends too"
    assert found["pairs"] and all(
        pair["early"][0]["step"] < 100 < 200 < pair["late"][0]["step"] for pair in found["pairs"]
    )


def test_g8_a_secret_never_reaches_the_page(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "keeps them all")
    text = page_of([made_up]).decode()
    assert (
        "keeps them all" not in text and "<redacted>" in data_of(text)["runs"][0]["completions"]["prompts"][0]["text"]
    )


def test_what_is_no_run_is_one_line(tmp_path: Path, made_up: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no run"):
        write_report([tmp_path], tmp_path / "x.html")
    with pytest.raises(ConfigError, match="different runs"):
        write_report([made_up, made_up], tmp_path / "x.html")
    with pytest.raises(RunFolderError, match="choose another file with to=FILE"):
        write_report([made_up], tmp_path / "absent" / "x.html")


def test_a_damaged_line_names_its_file(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=3, prompts=2, completions=2, words=9)
    lines = (tmp_path / "run" / "completions.jsonl").read_bytes().split(b"\n")
    for damaged in (b"{", lines[4][:-9]):
        (tmp_path / "run" / "completions.jsonl").write_bytes(b"\n".join([*lines[:4], damaged, *lines[5:]]))
        with pytest.raises(RunFolderError, match=r"completions\.jsonl is damaged at byte"):
            page_of([tmp_path / "run"])


DAMAGED = [
    ("config.yaml", b"a: [1,\n b", r"config\.yaml is damaged \(line 2: expected.*mend it"),
    ("config.yaml", b"", r"config\.yaml is damaged \(no settings by name in it\)"),
    ("config.yaml", b"- 1", r"config\.yaml is damaged \(no settings by name in it\)"),
    ("config.yaml", b"model: smol", r"config\.yaml is damaged \(no settings by name under model\)"),
    ("config.yaml", b"name: \xff", r"config\.yaml is damaged \(unacceptable character"),
    ("config.yaml", b"day: 2026-99-99", r"config\.yaml is damaged \(month"),
    ("summary.json", b"[]", r"summary\.json is damaged \(a list in place of a dict\): delete it"),
    ("eval.json", b"{}", r"eval\.json is damaged \(a dict in place of a list\): delete it"),
    ("eval.json", b'[{"row": "x"}]', r"eval\.json is damaged \(row 1 has no stage_index\): delete it"),
    ("eval.json", b"[3]", r"eval\.json is damaged \(row 1 has no keys\)"),
    (
        "metrics.jsonl",
        b'{"stage": "grpo", "stage_index": 1, "step": "1"}\n',
        r"metrics\.jsonl .*row 1 has a wrong step",
    ),
    ("eval_problems.jsonl", b'{"row": "x", "stage_index": 0, "set": "s", "id": "a"}\n', r"row 1 has no right\)"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("small") / "run"
    write_run(run, steps=3, prompts=2, completions=2, words=9)
    return run


@pytest.mark.parametrize(("name", "held", "said"), DAMAGED)
def test_a_damaged_file_is_one_line_and_its_remedy_works(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str], name: str, held: bytes, said: str
) -> None:
    run = shutil.copytree(small, tmp_path / "run")
    (run / name).write_bytes(held)
    assert main(["report", f"run={run}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)
    if name == "config.yaml":
        (run / name).write_text("{}")
    else:
        (run / name).unlink()
    assert main(["report", f"run={run}"]) == 0


def test_a_run_from_before_a_key_existed_has_its_page(tmp_path: Path, small: Path) -> None:
    """Rows of the first day: no hash of a problem, no prompt, no samples' answers, no interval."""
    run = shutil.copytree(small, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "eval_problems.jsonl").read_text().splitlines()]
    old = ("row", "stage_index", "set", "id", "right", "cut", "tokens", "sampled_right", "samples", "text")
    with (run / "eval_problems.jsonl").open("w") as file:
        file.writelines(json.dumps({key: line[key] for key in old}) + "\n" for line in lines)
    rows = json.loads((run / "eval.json").read_text())
    rows = [{key: row[key] for key in ("row", "stage_index", "set", "greedy_accuracy")} for row in rows]
    (run / "eval.json").write_text(json.dumps([*rows, {**rows[-1], "step": 2}]))
    (now,) = data_of(page_of([small]).decode())["runs"]
    (then,) = data_of(page_of([run]).decode())["runs"]
    assert then["changes"] == now["changes"] != []
    assert then["problems"][0]["items"][0]["prompt"] is None


def test_a_run_that_was_killed_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=3, prompts=2, completions=2, words=9)
    for name in ("summary.json", "eval.json", "eval_problems.jsonl"):
        (tmp_path / "run" / name).unlink()
    with (tmp_path / "run" / "completions.jsonl").open("a") as file:
        file.write('{"stage": "gr')
    (run,) = data_of(page_of([tmp_path / "run"]).decode())["runs"]
    assert run["status"] == "not finished" and run["completions"]["total"] == 12
    assert run["headline"]["title"] == "No before and after to compare"
    (tmp_path / "run" / "completions.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (run,) = data_of(page_of([tmp_path / "run"]).decode())["runs"]
    assert run["completions"]["items"] == [] and run["flags"] == []


def test_runs_are_compared_on_the_problems_that_both_answered(tmp_path: Path, made_up: Path) -> None:
    write_run(tmp_path / "other", steps=5, prompts=2, completions=2, words=9, problems=40)
    (against,) = data_of(page_of([made_up, tmp_path / "other"]).decode())["against"]
    assert against["changes"][0]["problems"] == 40, "those of 300 that the other run has too"
    assert ["name", "made " + PLANTED, "made "] not in against["settings"]
    assert {item["kind"] for item in against["problems"]["items"]} <= {"lost", "gained", "both", "neither"}


def test_the_command_says_where_it_wrote_and_what_is_wrong(
    tmp_path: Path, made_up: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", f"run={made_up}", f"to={tmp_path / 'r.html'}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "r.html") and (tmp_path / "r.html").exists()
    wrong = [
        ([], "needs a run's folder"),
        (["rnu=x"], "no key 'rnu'"),
        (["run="], "run= is empty: give run=DIR"),
        ([f"run={made_up}", "to="], "to= is empty: give to=FILE"),
    ]
    for arguments, said in wrong:
        assert main(["report", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_a_real_run_s_page_shows_its_tokens_and_problems(trained_run: Path) -> None:
    (run,) = data_of((trained_run / "report.html").read_text())["runs"]
    shaded = [row for row in run["completions"]["items"] if "shades" in row]
    assert shaded and all("".join(piece for piece, _ in row["shades"]) == row["text"] for row in shaded)
    assert all(logprob <= 0 for row in shaded for _, logprob in row["shades"])
    assert run["problems"][0]["items"][0]["prompt"].endswith("=")
    assert [row["policy_step"] for row in run["evaluations"] if row["row"] in ("base", "sft")] == [0, 150]
    assert (
        run["status"] == "done" and run["time"]["stages"] and any("report" not in note["text"] for note in run["notes"])
    )
    assert run["flags"][-1]["title"] == "How to read the score"
    assert run["flags"][-1]["text"].endswith("rows of its own."), (
        "the best checkpoint was chosen by the test's own rows"
    )
