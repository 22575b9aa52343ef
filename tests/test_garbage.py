"""The collector is off while a process starts, on again whatever happened, and still finds what became garbage then."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from reasoner.garbage import importing, uncollected


class Held:
    """Refers to itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """Each test begins with a collector that is on and has frozen nothing, and the next one does too."""
    gc.unfreeze()
    assert gc.isenabled()
    yield
    gc.enable()
    gc.unfreeze()


def test_it_rests_inside_also_nested_and_works_afterwards():
    with uncollected():
        assert not gc.isenabled()
        with importing():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the inner end switched it on"
    assert gc.isenabled()


@pytest.mark.parametrize("resting", [uncollected, importing])
def test_after_an_error_it_works_and_nothing_is_frozen(resting):
    with pytest.raises(ZeroDivisionError), resting():
        raise ZeroDivisionError
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_who_switched_it_off_keeps_it_off():
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()


def test_what_was_made_while_importing_is_left_alone_until_it_is_thawed():
    with importing():
        held = weakref.ref(Held())
    gc.collect()
    assert held() is not None, "it was looked at"
    gc.unfreeze()
    gc.collect()
    assert held() is None, "it will never be found"


def test_what_was_garbage_before_is_not_kept():
    before = weakref.ref(Held())
    with importing():
        assert before() is None


def test_from_python_nothing_is_frozen():
    script = "import gc, reasoner; reasoner.train; print(gc.isenabled(), gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True 0", done.stderr


def test_the_command_line_leaves_the_collector_on_and_what_it_imported_frozen():
    script = (
        "import gc, sys; from reasoner.__main__ import main; code = main(['data', 'conf=nowhere']); "
        "assert code == 2 and gc.isenabled(); print(gc.get_freeze_count() > 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True", done.stderr
