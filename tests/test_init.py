"""The verb init: what it writes trains as it is and after the edits its comments tell, and it overwrites nothing. And
the commands of docs/first_run.md, run as they stand there."""

import io
import json
import os
import re
import resource
import shlex
import subprocess
from pathlib import Path

import pytest

from reasoner.__main__ import main
from reasoner.compose import compose_conf
from reasoner.config import validate
from reasoner.init import FILES, TEMPLATES, init

ROOT = Path(__file__).parents[1]
FEW_STEPS = ["sft.steps=2", "grpo.steps=2", "evaluate.samples=0", "reward.workers=1", "out=run"]
PAGE = (ROOT / "docs/first_run.md").read_text()


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def commands(said: str) -> list[str]:
    """The arguments of each `python -m reasoner` that was printed, in order."""
    return re.findall(r"^ +\S+ -m reasoner (.*?) +#", said, re.MULTILINE)


def test_the_commands_it_prints_work_and_the_folder_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my problems"]) == 0
    said = capsys.readouterr().out
    assert set(files(tmp_path)) == {f"my problems/{name}" for name in FILES}
    assert all(f"my problems/{name}" in said.splitlines()[0] for name in FILES)
    assert "  cd 'my problems'\n" in said
    assert commands(said) == ["reward conf=mine", "data conf=mine", "conf=mine"]

    monkeypatch.chdir(tmp_path / "my problems")
    reward, data, training = map(shlex.split, commands(said))
    assert main(reward) == 0
    assert "every gold completion earns full marks" in capsys.readouterr().out
    assert main(data) == 0
    assert "sft: 8 examples of 10 rows (2 held out)" in capsys.readouterr().out
    assert main([*training, *FEW_STEPS]) == 0
    completions = [json.loads(line) for line in Path("run/completions.jsonl").read_text().splitlines()]
    assert len(completions) == 2 * 8 * 8
    assert all(set(row["parts"]) == {"accuracy", "brief"} for row in completions)


def test_it_fills_the_folder_it_is_called_in_beside_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/other.yaml").write_text("# kept\n")
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert "  cd " not in capsys.readouterr().out
    assert files(tmp_path) == {
        "conf/other.yaml": "# kept\n",
        **{name: (TEMPLATES / template).read_text() for name, template in FILES.items()},
    }


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_overwritten_or_half_written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert f"{tmp_path / name} is there already" in error and "\n" not in error
    assert files(tmp_path) == {name: "mine"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "b"], "give it one folder"),
        (["conf=tiny"], "give it one folder"),
        (["--force"], "give it one folder"),
        (["file"], "Not a directory"),
        (["dangling"], "problems.csv is there already"),
        (["holds_a_file"], "holds_a_file/conf: File exists"),
    ],
)
def test_a_place_that_cannot_be_filled_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "file").write_text("")
    for folder in ("dangling", "holds_a_file"):
        (tmp_path / folder).mkdir()
    (tmp_path / "dangling/problems.csv").symlink_to(tmp_path / "nowhere")
    (tmp_path / "holds_a_file/conf").write_text("")
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["init", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error
    assert files(tmp_path) == before


def test_what_cannot_be_written_whole_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))  # bytes a file: less than the conf has
    try:
        code = main(["init", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert code == 2 and "File too large" in capsys.readouterr().err
    assert files(tmp_path) == {}


def for_a_gpu(conf: str) -> str:
    """The conf after the edits that its head tells: marked values taken, TINY gone, BIG without its "# "."""
    conf, marked = re.subn(r": \S+  # GPU: (\S+)$", r": \1", conf, flags=re.MULTILINE)
    assert marked == 5
    start, big = conf.index("# TINY:"), conf.index("# BIG:")
    return conf[:start] + re.sub(r"^# (?=\w+: [\[{])", "", conf[big:], flags=re.MULTILINE)


def test_the_edits_that_its_comments_tell_make_it_a_conf_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    init([], say=lambda _: None)
    tiny = validate(compose_conf("mine").values)
    assert tiny.model.scratch is not None and "sft" in tiny.stages
    conf = Path("conf/mine.yaml")
    conf.write_text(for_a_gpu(conf.read_text()))
    composed = compose_conf("mine", ["card=24"])
    config = validate(composed.values)
    assert config.model.name == "Qwen/Qwen2.5-1.5B-Instruct" and config.model.scratch is None
    assert list(config.stages) == ["evaluate", "grpo", "evaluate", "export"]
    assert (config.grpo.prompts_per_step, config.grpo.max_completion_tokens) == (64, 1024), "the row of the card"
    assert (config.grpo.steps, config.grpo.optim.lr, config.data.template) == (250, 1e-5, "model")
    assert compose_conf("mine").sources["grpo.prompts_per_step"] == "conf/card/auto.yaml"
    assert config.data.path == str(tmp_path / "problems.csv")


MAKE_TELLS_ITS_CHILDREN = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
BLOCKS = [block.strip().splitlines() for block in re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]


def test_the_commands_of_the_page_go_from_the_clone_to_a_chat(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (_, make, chat), typed, _ = BLOCKS
    typed_by_hand = {name: value for name, value in os.environ.items() if name not in MAKE_TELLS_ITS_CHILDREN}
    planned = subprocess.run(
        ["make", "-n", *make.split()[1:]], cwd=ROOT, env=typed_by_hand, capture_output=True, text=True, check=True
    )
    trains = planned.stdout.splitlines()[-1].strip()
    assert trains == ".venv/bin/python -m reasoner conf=tiny"
    (tmp_path / "outputs/tiny").mkdir(parents=True)
    (tmp_path / "outputs/tiny/DATE_TIME").symlink_to(trained_run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    assert main(shlex.split(chat.removeprefix(".venv/bin/python -m reasoner "))) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"\d tokens?\)", said)) == 3 and "there is no such command" not in said
    assert "base: reward" in said and "export: reward" in said


def test_the_page_names_the_commands_that_init_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    ((begin,),) = BLOCKS[2:]
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(begin.removeprefix(".venv/bin/python -m reasoner "))) == 0
    assert commands(capsys.readouterr().out) == re.findall(r"^\| `python -m reasoner (.*?)`", PAGE, re.MULTILINE)
    assert set(files(tmp_path / "mine")) == set(FILES)
