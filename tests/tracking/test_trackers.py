"""Every tracker gets the same numbers under the same names, none stops or slows a run, and none is told a secret."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from reasoner.errors import MissingExtra
from reasoner.tracking import background, make_trackers
from reasoner.tracking.background import Background, close_all
from reasoner.tracking.base import TRACKERS
from reasoner.tracking.values import numbers, table

COMPLETION = {
    "step": 2, "id": "grpo:1", "prompt": "2+2=", "answer": "4", "completion": "4 | `x` <b>", "reward": 1.0,
    "parts": {"accuracy": 1.0}, "advantage": 0.5, "tokens": 2, "finish_reason": "stop",
}  # fmt: skip


class Service:
    """A tracker that records what it is told, after `wait`, and fails where it is told to."""

    def __init__(self, fails: Mapping[str, BaseException] | None = None, wait: threading.Event | None = None):
        self.fails, self.wait, self.told = dict(fails or {}), wait, []

    def _do(self, name: str, *what: Any) -> None:
        if self.wait:
            self.wait.wait(30)
        if name in self.fails:
            raise self.fails[name]
        self.told.append((name, *what))

    def log(self, stage: str, step: int, row: Mapping[str, Any]) -> None:
        self._do("log", stage, step, row)

    def table(self, stage: str, step: int, rows: list) -> None:
        self._do("table", stage, step, rows)

    def close(self) -> None:
        self._do("close")


def broken(error: BaseException) -> Any:
    raise error


def test_work_is_done_in_order_and_finished_by_close() -> None:
    service, said = Service(), []
    tracker = Background("x", lambda say: service, said.append)
    for step in (1, 2):
        tracker.log("grpo", step, {"kl": 0.1})
    tracker.table("grpo", 2, [COMPLETION])
    tracker.close()
    tracker.close()
    assert [told[0] for told in service.told] == ["log", "log", "table", "close"] and said == []


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ({"log": RuntimeError("socket closed\nand more")}, "x: socket closed; it is off from here on"),
        ({"table": ValueError()}, "x: ValueError; it is off from here on"),
        ({"log": SystemExit(1)}, "x: its client raised SystemExit(1); it is off from here on"),
        ({"close": TimeoutError("late")}, "x: late; its last numbers may be missing there; metrics.jsonl has all"),
    ],
)
def test_g4_any_error_is_one_line_and_the_rest_is_dropped(fails: dict, said: str) -> None:
    heard: list[str] = []
    tracker = Background("x", lambda say: Service(fails), heard.append)
    for step in range(5):
        tracker.log("grpo", step, {"kl": 0.1})
        tracker.table("grpo", step, [COMPLETION])
    tracker.close()
    assert heard == [said]


@pytest.mark.parametrize(
    ("error", "said"),
    [(ConnectionError("unreachable"), "unreachable"), (SystemExit("no key"), "its client raised SystemExit('no key')")],
)
def test_g4_a_service_that_does_not_start_is_off(error: BaseException, said: str) -> None:
    heard: list[str] = []
    tracker = Background("x", lambda say: broken(error), heard.append)
    tracker.log("grpo", 1, {})
    tracker.close()
    assert heard == [f"x: {said}; it is off; every number is in metrics.jsonl"]


def test_g4_a_slow_service_never_holds_a_run_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service stands still until the test ends, and all the same every call comes back."""
    monkeypatch.setattr(background, "MAX_WAITING", 3)
    monkeypatch.setattr(background, "CLOSE_S", 0.05)
    stuck, heard = threading.Event(), []
    tracker = Background("x", lambda say: Service(wait=stuck), heard.append)
    for step in range(20):
        tracker.log("grpo", step, {"kl": 0.1})
    tracker.close()
    stuck.set()
    assert "rows were left out" in heard[0] and "it is left behind" in heard[-1] and len(heard) == 2


def test_g4_services_finish_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one can finish only once the second one does."""
    monkeypatch.setattr(background, "CLOSE_S", 10.0)
    second_ended, heard = threading.Event(), []

    class Second(Service):
        def close(self) -> None:
            second_ended.set()

    first = Background("first", lambda say: Service(wait=second_ended), heard.append)
    close_all([first, Background("second", lambda say: Second(), heard.append)])
    assert heard == []


def test_g4_services_that_hang_share_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "CLOSE_S", 0.2)
    stuck, heard, waits = threading.Event(), [], []
    trackers = [Background(name, lambda say: Service(wait=stuck), heard.append) for name in "abc"]
    join = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", lambda thread, s: (waits.append(s), join(thread, s)))
    close_all(trackers)
    stuck.set()
    assert waits == pytest.approx([0.2, 0.0, 0.0], abs=0.05)
    assert [line.split(" ")[0] for line in heard if "left behind" in line] == ["a:", "b:", "c:"]


def test_what_a_service_says_is_said_by_the_run_s_own_thread() -> None:
    threads: list[threading.Thread] = []

    def make(say: Any) -> Service:
        say("offline")
        return Service()

    tracker = Background("x", make, lambda line: threads.append(threading.current_thread()))
    tracker.close()
    assert threads == [threading.current_thread()]


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_not_installed_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf"tracking=\[{name}\] needs the package .*\.\[{name}\]"):
        make_trackers([name], tmp_path, config={}, say=lambda line: None)


def test_g4_a_package_that_breaks_on_import_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.py").write_text("raise RuntimeError('no such symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    heard: list[str] = []
    assert make_trackers(["mlflow"], tmp_path, config={}, say=heard.append) == []
    assert heard == ["mlflow: no such symbol; it is off; every number is in metrics.jsonl"]


def test_names_and_tables() -> None:
    row = {"step": 3, "reward_mean": 0.5, "kl": float("nan"), "solved": True, "note": "text"}
    assert numbers("grpo", row) == {"grpo/step": 3, "grpo/reward_mean": 0.5}
    columns, ((*cells,),) = table([COMPLETION])
    assert dict(zip(columns, cells, strict=True)) | {"parts/accuracy": 1.0} == {
        **{name: value for name, value in COMPLETION.items() if name != "parts"},
        "parts/accuracy": 1.0,
    }


REAL = """
import json, sys
from pathlib import Path
from reasoner.tracking import close_all, make_trackers

def main():
    names, out = sys.argv[1].split(","), Path(sys.argv[2])
    config = {"name": "tiny", "grpo": {"steps": 2}, "key": "sk-12345678"}
    said = []
    trackers = make_trackers(names, out, config=config, say=said.append)
    for tracker in trackers:
        for step in (1, 2):
            tracker.log("grpo", step, {"reward_mean": 0.5 * step, "kl": float("nan")})
        tracker.table("grpo", 2, [json.loads(sys.argv[3]) | {"completion": "said sk-12345678"}])
    close_all(trackers)
    print(json.dumps(said))

main()
"""


def run_real(names: str, out: Path, **environment: str) -> list[str]:
    """What was said by real clients, in a process of their own with a home of its own."""
    env = {**os.environ, "HOME": str(out), "TRACKIO_DIR": str(out / "trackio"), "A_KEY": "sk-12345678", **environment}
    command = [sys.executable, "-c", REAL, names, str(out / "run"), json.dumps(COMPLETION)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that the real trackio, TensorBoard and MLflow wrote into."""
    for package in ("trackio", "tensorboard", "mlflow"):
        pytest.importorskip(package, reason=f"needs the extra {package}")
    out = tmp_path_factory.mktemp("tracked")
    (out / "run").mkdir()
    assert run_real("trackio,tensorboard,mlflow", out) == []
    yield out


def test_tensorboard_holds_the_numbers_and_the_table(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "run" / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("grpo/reward_mean")] == [(1, 0.5), (2, 1.0)]
    assert events.Tags()["scalars"] == ["grpo/reward_mean"]
    (shown,) = events.Tensors("grpo/completions/text_summary")
    assert b"| `2` | `grpo:1` | `2+2=` | `4` | `said" in shown.tensor_proto.string_val[0]


def test_mlflow_holds_the_numbers_the_settings_and_the_table(tracked: Path) -> None:
    (reward,) = (tracked / "run" / "mlruns").glob("*/*/metrics/grpo/reward_mean")
    assert [line.split()[1:] for line in reward.read_text().splitlines()] == [["0.5", "1"], ["1.0", "2"]]
    (steps,) = (tracked / "run" / "mlruns").glob("*/*/params/grpo.steps")
    assert steps.read_text() == "2"
    (found,) = (tracked / "run" / "mlruns").glob("*/*/artifacts/completions/grpo-000002.json")
    assert json.loads(found.read_text())["columns"][:2] == ["step", "id"]


def test_trackio_holds_the_numbers_and_the_table(tracked: Path) -> None:
    (database,) = (tracked / "trackio").glob("reasoner*.db")
    held = database.read_bytes() + b"".join(path.read_bytes() for path in database.parent.glob("reasoner*.db-wal"))
    assert b"grpo/reward_mean" in held and b"grpo/completions" in held


def test_g8_no_tracker_writes_a_secret(tracked: Path) -> None:
    files = [path for path in tracked.rglob("*") if path.is_file()]
    assert files and [path for path in files if b"12345678" in path.read_bytes()] == []


def test_g4_an_mlflow_server_that_is_away_costs_one_line(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    (tmp_path / "run").mkdir()
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    (line,) = run_real("mlflow", tmp_path, **away)
    assert line.startswith("mlflow: ") and line.endswith("it is off; every number is in metrics.jsonl")
    assert "\n" not in line
