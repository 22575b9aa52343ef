"""What a run does not use is not imported because it is installed, and is there for everybody afterwards."""

import gc
import importlib
import importlib.util
import subprocess
import sys

import pytest

from reasoner.garbage import importing
from reasoner.spared import SPARED, spared


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Packages of those names that can be imported, and were not yet."""
    for name in SPARED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "inner.py").write_text("")
        for one in [one for one in sys.modules if one.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, one)
    monkeypatch.syspath_prepend(str(tmp_path))
    return SPARED


@pytest.mark.parametrize("sparing", [spared, importing])
def test_inside_they_are_not_there_and_afterwards_they_are(sparing, installed):
    with sparing(), sparing():
        for name in installed:
            assert importlib.util.find_spec(name) is None, "who looks for it, finds it"
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(f"{name}.inner")
    gc.unfreeze()
    for name in installed:
        assert importlib.import_module(f"{name}.inner").__name__ == f"{name}.inner"


def test_after_an_error_they_are_there(installed):
    with pytest.raises(ZeroDivisionError), spared():
        raise ZeroDivisionError
    assert all(importlib.util.find_spec(name) for name in installed)


def test_one_that_was_imported_before_stays(installed):
    held = importlib.import_module(installed[-1])
    with spared():
        assert importlib.import_module(installed[-1]) is held
    assert sys.modules[installed[-1]] is held


def test_one_that_somebody_insists_on_stays(installed):
    """A compatibility layer that drops a module's entry and imports it again."""
    with spared():
        del sys.modules[installed[0]], sys.modules[installed[1]]
        held = importlib.import_module(installed[1])
    assert sys.modules[installed[1]] is held
    assert importlib.util.find_spec(installed[0]) is not None


def test_the_command_line_imports_what_it_needs_without_them():
    script = (
        "import sys; from reasoner.garbage import importing\n"
        "with importing():\n"
        "    import reasoner.pipeline, reasoner.chat, reasoner.reward, reasoner.evaluation.measure\n"
        "    import reasoner.export.command, reasoner.data.shown\n"
        f"print([name for name in sys.modules if name.partition('.')[0] in {SPARED}])\n"
        "import datasets, pandas"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stderr
