"""The commands of docs/evaluate.md, run as they stand there on a small run in the place of the reader's."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from reasoner.__main__ import main

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(
    r"^python -m reasoner (eval .*?)(?: +#.*)?$", (ROOT / "docs/evaluate.md").read_text(), re.MULTILINE
)


@pytest.fixture(scope="module")
def folder(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the runs that the page names, and a conf/tiny.yaml that is as small as they are."""
    place = tmp_path_factory.mktemp("docs")
    for name in ("outputs/tiny/DATE_TIME", "outputs/A", "outputs/B"):
        shutil.copytree(trained_run, place / name)
    own = yaml.safe_load((trained_run / "config.yaml").read_text())
    (place / "conf").mkdir()
    (place / "conf/tiny.yaml").write_text(yaml.safe_dump({**own, "out": "outputs/measured", "threads": 1}))
    return place


def test_the_page_has_its_commands():
    assert len(COMMANDS) == 7


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    small = ["evaluate.problems=5"] if "rows=" not in command and "run=outputs/A" not in command else []
    assert main([*shlex.split(command), *small]) == 0
