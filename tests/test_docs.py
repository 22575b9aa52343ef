"""The documents: what they link and name is there, and the README's commands run. Other pages' commands and messages
have tests of their own."""

import io
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from reasoner.__main__ import main
from reasoner.compose import compose_conf, leaves, packaged_confs
from reasoner.config import Data, validate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken(page: Path, text: str) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    assert list(broken(page, page.read_text(encoding="utf-8"))) == []


def test_a_broken_link_is_seen():
    text = "[a](docs/nowhere.md) [b](README.md#nowhere) [c](README.md#start) [d](https://example.org/none)"
    assert list(broken(ROOT / "README.md", text)) == ["docs/nowhere.md", "README.md#nowhere"]


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT)) for page in PAGES if page.parent == ROOT / "docs"}
    assert pages | {"CONTRIBUTING.md", "SECURITY.md"} <= set(re.findall(r"\]\(([^)#\s]+)", readme))


def test_what_contributors_are_sent_to_is_there():
    named = re.findall(r"`((?:reasoner|tests|conf|benchmarks)/[\w/.]+|\w+\.(?:toml|txt))`", CONTRIBUTING)
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).exists()] == []
    tables = re.findall(r"`([A-Z_]+)` of\s+`([\w/.]+)`", CONTRIBUTING)
    assert {table for table, _ in tables} > {"FAMILIES", "BUILTINS", "VERBS", "READERS", "SHAPES", "TRACKERS", "LEVELS"}
    assert [
        (table, file)
        for table, file in tables
        if not re.search(rf"^{table}\b.* = ", (ROOT / file).read_text(), re.MULTILINE)
    ] == []


def test_the_markers_and_options_that_are_told_are_pytests_and_makes():
    pyproject, makefile = ((ROOT / name).read_text() for name in ("pyproject.toml", "Makefile"))
    assert re.findall(r'markers = \["(\w+):', pyproject) == ["gpu"]
    assert "workers ?= 2" in makefile


SECTIONS = "model|data|sft|grpo|rollout|evaluate|checkpoint|resume"
KEY = re.compile(rf"(?<![\w./-])(?:{SECTIONS})(?:\.[a-z]\w*)+(?![\w(/])")


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Every setting there is, and every section of them."""
    found = {f"data.{field.name}" for field in fields(Data)}
    for path in (packaged_confs() / "loss").glob("*.yaml"):
        values = validate(compose_conf("gsm8k_base", ["card=24", f"loss={path.stem}"]).values)
        found |= {key for key, _ in leaves(asdict(values))}
    return found | {key.rsplit(".", cut)[0] for key in found for cut in range(1, key.count("."))}


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "from_others"], ids=lambda page: page.name)
def test_settings_that_a_page_names_are_settings(page: Path, keys: set[str]):
    named = {key for key in KEY.findall(page.read_text(encoding="utf-8")) if not key.endswith((".md", ".py", ".yaml"))}
    assert sorted(named - keys) == []


def test_a_setting_that_is_none_is_seen(keys: set[str]):
    assert {"grpo.clip_low"} == set(
        KEY.findall("set `grpo.clip_low=0.2` in my/data.csv, not `grpo.loss.clip_low`")
    ) - keys


README = re.search(r"^```\n(python -m reasoner .*?)^```$", PAGES[0].read_text(), re.MULTILINE | re.DOTALL)
assert README
COMMANDS = [line.partition(" #")[0].removeprefix("python -m reasoner").strip() for line in README[1].splitlines()]
NEEDS_A_CARD = "serve run=outputs/gsm8k"
SMALL = {"eval run=outputs/tiny": ["evaluate.problems=5"], "conf=tiny grpo.steps=50 seed=1": ["--cfg", "job"]}


@pytest.fixture(scope="module")
def place(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the runs that the README names, and a conf/tiny.yaml as small as they are."""
    place = tmp_path_factory.mktemp("readme")
    own = yaml.safe_load((trained_run / "config.yaml").read_text())
    for name in ("outputs/tiny/DATE_TIME", "A", "B"):
        shutil.copytree(trained_run, place / name)
        (place / name / "config.yaml").write_text(yaml.safe_dump({**own, "out": name}))
    (place / "conf").mkdir()
    (place / "conf/tiny.yaml").write_text(yaml.safe_dump({**own, "out": "outputs/other", "threads": 1}))
    return place


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("", NEEDS_A_CARD)])
def test_a_command_of_the_readme_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 2\n/quit\n"))
    assert main([*shlex.split(command), *SMALL.get(command, [])]) == 0


CONFS = [
    (page, number, text)
    for page in PAGES
    for number, text in enumerate(
        re.findall(r"^```yaml\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    )
]


@pytest.mark.parametrize(("page", "number", "text"), CONFS, ids=[f"{page.name}-{n}" for page, n, _ in CONFS])
def test_a_conf_of_a_page_composes(page: Path, number: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = yaml.safe_load(text)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/mine.yaml").write_text(yaml.safe_dump({"defaults": ["gsm8k", "_self_"], **own}))
    monkeypatch.chdir(tmp_path)
    made = dict(leaves(asdict(validate(compose_conf("mine", ["card=24"]).values))))
    assert {key for key, _ in leaves(own)} - {"defaults"} <= set(made)


def test_the_rows_and_commands_of_sft_then_grpo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    page = (ROOT / "docs/sft_then_grpo.md").read_text(encoding="utf-8")
    conf, row, commands, _ = re.findall(r"^```(?:yaml)?\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/mine.yaml").write_text(conf)
    rows = [row.replace("Tom", f"Tom {number}") for number in range(40)]
    (tmp_path / "worked.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    on_a_cpu = ["card=8", "model=tiny", "model.lora=null", "model.quantize=none", "data.template=plain", "rollout=hf"]
    on_a_cpu += ["optim@sft.optim=adamw", "optim@grpo.optim=adamw", "reward.workers=1"]
    for command in commands.splitlines():
        assert main([*shlex.split(command.removeprefix("python -m reasoner ")), *on_a_cpu]) == 0
    said = capsys.readouterr().out
    assert "sft: 20 examples of 40 rows (20 held out)" in said
    assert "[[3 + 4 = 7.\\n#### 7" in said.replace("\n", "\\n")
    assert "every gold completion earns full marks" in said
