"""That both forms of benchmarks/shared_prefix.py are given the same work, and that what they learn is the same."""

from pathlib import Path

import pytest

from benchmarks.common import read_json
from benchmarks.shared_prefix import Work, facts, main


def test_the_work_is_the_issues_and_both_forms_cut_it_alike() -> None:
    """16 x 8 x (128 + 256) tokens, or 16 x (128 + 8 x 256) and one prompt again behind the cut."""
    work = Work(groups=16)
    shared, alone = (facts(work.batch(shared=one), work.micro_batch) for one in (True, False))
    assert alone["tokens"] == 49_152 and alone["micro_batches"] == [24_576, 24_576]
    assert shared["tokens"] == 34_816 + 128 and len(shared["micro_batches"]) == 2
    assert shared["trained_tokens"] == alone["trained_tokens"] == 32_768


def test_the_trial_runs_and_both_forms_learn_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--trial", "--out", str(tmp_path / "found.json")])
    found = read_json(tmp_path / "found.json")
    assert found["unshared"]["tokens"] == 2 * 4 * 40 and found["shared"]["micro_batches"] == [160, 40]
    assert found["apart"]["unshared again"] == {"gradient": 0.0, "logprob_mean": 0.0, "logprob_max": 0.0}
    assert found["apart"]["shared from unshared"]["gradient"] < 0.02  # bfloat16
    assert found["apart"]["shared from unshared"]["logprob_max"] < 0.05
    assert "| saved | 37.5% |" in capsys.readouterr().out
