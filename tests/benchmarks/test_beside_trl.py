"""Where the seconds of a start went is told whole, and the sides keep their bytecode whatever the environment says."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.beside_trl import Record
from benchmarks.common import bytecode_folder


def test_the_phases_of_a_start_make_up_the_time_to_the_first_sample(tmp_path):
    record = Record(tmp_path / "side.json", time.time() - 5)
    module = SimpleNamespace(load=lambda number: number + 1)
    record.mark("imports")
    record.mark_after(module, "load", "data")
    assert [module.load(1), module.load(2)] == [2, 3]
    record.first_sampled(late=-2)
    record.first_sampled()  # of a later step, which is no start
    phases = record.found["start_s"]
    assert list(phases) == ["imports", "data", "first sample"]
    assert phases["imports"] >= 5 and phases["data"] < 1 and phases["first sample"] >= 2
    assert sum(phases.values()) == pytest.approx(record.found["first_sample_s"])


def test_a_phase_that_an_error_ended_is_passed_on(tmp_path):
    record = Record(tmp_path / "side.json", time.time())
    module = SimpleNamespace(load=lambda: 1 / 0)
    record.mark_after(module, "load", "data")
    with pytest.raises(ZeroDivisionError):
        module.load()
    assert not record.found["start_s"]


@pytest.mark.parametrize("kept", [True, False])
def test_bytecode_is_kept_in_a_folder_where_python_keeps_none(kept, tmp_path, monkeypatch):
    cached = tmp_path / "torch.pyc"
    if kept:
        cached.touch()
    monkeypatch.setattr(torch.__spec__, "cached", str(cached))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment = bytecode_folder()
    assert bool(environment) is not kept
    if environment:
        done = subprocess.run(
            [sys.executable, "-c", "import sys; print(sys.dont_write_bytecode, sys.pycache_prefix)"],
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == ["False", str(tmp_path / "reasoner-benchmarks" / "bytecode")]
