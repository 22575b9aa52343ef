"""Ctrl-C and SIGTERM (G3)."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from reasoner import signals
from tests.two_ranks import on_two_ranks

LOOP = """
import sys, time
from reasoner import signals
from reasoner.errors import Interrupted

with signals.handled():
    print("ready", flush=True)
    while not (number := signals.agreed()):
        time.sleep(0.01)
    print("saved", flush=True)
    if sys.argv[1] == "hang":
        time.sleep(60)
error = Interrupted(number, "stopped")
print(error, flush=True)
sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_g3_first_signal_lets_the_step_end_and_exits_128_plus_n(number: signal.Signals) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, "end"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout and child.stdout.readline() == "ready\n"
    child.send_signal(number)
    out, said = child.communicate(timeout=60)
    assert out == "saved\nstopped\n"
    assert child.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "stopping after this step" in said
    assert "Traceback" not in said


def test_g3_second_signal_stops_at_once() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, "hang"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout and child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "saved\n"
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert out == ""
    assert child.returncode == 143


def test_g3_old_handlers_come_back_and_nothing_stays_requested() -> None:
    old = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with signals.handled():
        assert signals.requested() is None
        assert signals.agreed() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested() == signal.SIGTERM
        assert signals.agreed() == signal.SIGTERM
    assert signals.requested() is None
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == old


def test_g3_in_another_thread_it_leaves_the_handlers_alone() -> None:
    seen = []

    def run() -> None:
        with signals.handled():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


TWO_RANKS = """
import os, signal
from reasoner import signals, world

world.start()
with signals.handled():
    if world.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    print(signals.requested(), signals.agreed())
world.stop()
"""


def test_g3_one_rank_s_signal_stops_all_at_the_same_step() -> None:
    assert on_two_ranks(TWO_RANKS) == ["None 15\n", "15 15\n"]
