"""The numbers of a step (C21: never a mean of means)."""

import math
import resource
from pathlib import Path

import pytest

from reasoner.metrics import NAMES, Stopwatch, Sums, peak_gib, step_row
from tests.two_ranks import on_two_ranks

LENGTHS = [3.0, 1.0, 8.0, 0.5, 10.0]


def test_c21_metrics_of_a_split_step_equal_the_unsplit_one() -> None:
    whole, split = Sums(), Sums()
    whole.add("length", sum(LENGTHS), len(LENGTHS))
    whole.count("cut", 2)
    whole.top("longest", max(LENGTHS))
    for piece in (LENGTHS[:1], LENGTHS[1:]):
        split.add("length", sum(piece), len(piece))
        split.count("cut", 1)
        split.top("longest", max(piece))
    assert split.values() == whole.values() == {"length": 4.5, "cut": 2.0, "longest": 10.0}
    mean_of_means = (3.0 + 4.875) / 2
    assert split.values()["length"] != mean_of_means


def test_a_mean_over_nothing_is_nan_and_no_error() -> None:
    sums = Sums()
    sums.add("reward_mean", 0.0, 0)
    assert math.isnan(sums.values()["reward_mean"])


TWO_RANKS = """
import sys
from reasoner import world
from reasoner.metrics import Sums

world.start()
sums = Sums()
if world.rank() == 0:
    sums.add("length", 3.0, 1)
    sums.top("ratio_max", 1.5)
else:  # this rank has other names, and one more completion than rank 0
    sums.add("length", 19.5, 4)
    sums.add("only_here", 6.0, 3)
    sums.count("cut", 2)
    sums.top("ratio_max", 1.25)
print(sorted(sums.values().items()))
world.stop()
"""


def test_c21_means_over_two_ranks_weigh_every_completion_alike() -> None:
    expected = "[('cut', 2.0), ('length', 4.5), ('only_here', 2.0), ('ratio_max', 1.5)]\n"
    assert on_two_ranks(TWO_RANKS) == [expected, expected]


def test_row_has_the_documented_names_in_order_then_the_others() -> None:
    values = {"loss": 0.5, "examples": 64.0, "zebra": 1.0, "clipped": 2.0}
    row = step_row("sft", 1, 7, 0, values)
    assert list(row) == ["stage", "stage_index", "step", "policy_step", *NAMES["sft"], "clipped", "zebra"]
    assert (row["stage"], row["stage_index"], row["step"], row["policy_step"], row["loss"]) == ("sft", 1, 7, 0, 0.5)
    assert math.isnan(row["grad_norm"]), "not measured"


def test_grpo_row_holds_what_readers_of_metrics_jsonl_rely_on() -> None:
    judged = {"reward_mean", "solved_share", "useful_groups", "completion_tokens_mean", "cut_share"}
    learnt = {"entropy", "kl", "logprob_gap_mean", "logprob_gap_max", "ratio_max", "grad_norm", "lr"}
    spent = {"generate_s", "reward_s", "logprobs_s", "update_s", "sync_s", "tokens_per_s", "peak_gib"}
    assert judged | learnt | spent <= NAMES["grpo"].keys()


def test_g5_stopwatch_does_not_follow_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    ticks = iter([100.0, 101.0, 103.5, 110.0, 111.0, 120.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the wall clock jumps"))
    watch = Stopwatch()
    with watch.measure("generate_s"):
        pass
    with watch.measure("generate_s"):
        pass
    assert watch.seconds == {"generate_s": 3.5}
    assert watch.elapsed_s() == 20.0


def test_stopwatch_counts_a_part_that_raised() -> None:
    watch = Stopwatch()
    with pytest.raises(RuntimeError), watch.measure("update_s"):
        raise RuntimeError
    assert "update_s" in watch.seconds


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_is_the_most_ever_held_in_gib() -> None:
    """Against the kernel's other count of it, in KiB (getrusage(2)); what is held now is less."""
    block = bytearray(b"x") * (128 * 2**20)
    del block
    assert peak_gib() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, abs=0.01)
