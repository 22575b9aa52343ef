"""A tracker never stops a run (G4) and never writes a secret (G8)."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from reasoner.errors import MissingExtra
from reasoner.tracking import make_trackers
from reasoner.tracking.values import COLUMNS
from reasoner.tracking.wandb import WandbTracker

ROW = {"stage": "grpo", "step": 3, "reward_mean": 0.5, "kl": float("nan"), "solved": True, "note": "text", "groups": 32}


class Client:
    """What stands for the wandb module: records calls, and fails where it is told to."""

    def __init__(self, *, login: Any = True, fails: Mapping[str, Exception] | None = None):
        self.login_result, self.fails = login, dict(fails or {})
        self.modes: list[str | None] = []
        self.logged: list[dict] = []
        self.metrics: list[tuple[str, str]] = []
        self.finished = 0
        self.config: dict = {}

    def _maybe_fail(self, name: str) -> None:
        if name in self.fails:
            raise self.fails[name]

    def Settings(self, **settings: Any) -> dict:
        return settings

    def login(self, *, prompt: bool, verify: bool) -> Any:
        assert (prompt, verify) == (False, True), "a prompt would hold up the night"
        self._maybe_fail("login")
        return self.login_result

    def init(self, *, mode: str | None, config: dict, **_: Any) -> "Client":
        self.modes.append(mode)
        self.config = config
        self._maybe_fail(f"init {mode}")
        return self

    def Table(self, *, columns: list, data: list) -> tuple:
        self._maybe_fail("table")
        return columns, data

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict) -> None:
        self._maybe_fail("log")
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1
        self._maybe_fail("finish")


@pytest.fixture(autouse=True)
def no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)


def started(client: Client, said: list[str], tmp_path: Path) -> WandbTracker:
    return WandbTracker(tmp_path, {"name": "tiny"}, said.append, client)


def test_numbers_go_by_stage_over_the_stage_s_own_steps(tmp_path: Path) -> None:
    client, said = Client(), []
    tracker = started(client, said, tmp_path)
    tracker.log("grpo", 3, ROW)
    tracker.log("grpo", 4, ROW)
    tracker.log("sft", 1, {"loss": 2.0})
    tracker.close()
    tracker.close()
    assert client.modes == ["online"]
    assert client.metrics == [("grpo/*", "grpo/step"), ("sft/*", "sft/step")]
    assert client.logged[0] == {"grpo/step": 3, "grpo/reward_mean": 0.5, "grpo/groups": 32}
    assert client.logged[2] == {"sft/step": 1, "sft/loss": 2.0}
    assert client.finished == 1
    assert said == []


@pytest.mark.parametrize(
    ("client", "why"),
    [
        (Client(login=False), "no login"),
        (Client(fails={"login": ConnectionError("unreachable\nand more")}), "unreachable"),
        (Client(fails={"init online": TimeoutError("timed out")}), "timed out"),
    ],
)
def test_g4_no_login_or_no_network_logs_offline_after_one_line(tmp_path: Path, client: Client, why: str) -> None:
    said: list[str] = []
    tracker = started(client, said, tmp_path)
    tracker.log("grpo", 3, ROW)
    assert client.modes[-1] == "offline"
    assert len(client.logged) == 1
    (line,) = said
    assert why in line
    assert "wandb sync" in line
    assert "\n" not in line


def test_g4_no_start_at_all_is_off_and_said(tmp_path: Path) -> None:
    client = Client(login=False, fails={"init offline": OSError("read-only")})
    said: list[str] = []
    tracker = started(client, said, tmp_path)
    tracker.log("grpo", 3, ROW)
    tracker.close()
    assert client.logged == []
    assert said[-1] == "wandb: read-only; it is off; every number is in metrics.jsonl"


def test_completions_are_a_table_and_a_table_that_fails_costs_no_numbers(tmp_path: Path) -> None:
    row = {**dict.fromkeys(COLUMNS, 1), "completion": "four", "parts": {"accuracy": 1.0}}
    client, said = Client(), []
    tracker = started(client, said, tmp_path)
    tracker.table("grpo", 3, [row])
    columns, cells = client.logged[0]["grpo/completions"]
    assert columns == [*COLUMNS, "parts/accuracy"] and cells[0][columns.index("completion")] == "four"
    client.fails["table"] = TypeError("mixed types")
    tracker.table("grpo", 4, [row])
    tracker.log("grpo", 4, ROW)
    assert said == ["wandb: mixed types; no table of this step"] and len(client.logged) == 2


def test_g4_the_user_s_mode_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    client = Client(fails={"login": AssertionError("not asked")})
    started(client, [], tmp_path)
    assert client.modes == [None]


class Strange(Exception):
    def __str__(self) -> str:
        return ""


@pytest.mark.parametrize("error", [RuntimeError("socket closed"), Strange(), AssertionError("inside the client")])
def test_g4_any_error_while_logging_switches_it_off_with_one_line(tmp_path: Path, error: Exception) -> None:
    client, said = Client(fails={"log": error}), []
    tracker = started(client, said, tmp_path)
    for step in range(3):
        tracker.log("grpo", step, ROW)
    tracker.close()
    assert said == [f"wandb: {str(error) or type(error).__name__}; it is off from here on"]


def test_g4_any_error_while_finishing_is_one_line(tmp_path: Path) -> None:
    client, said = Client(fails={"finish": TimeoutError("still sending")}), []
    started(client, said, tmp_path).close()
    assert said == ["wandb: still sending; its last numbers are in the run folder's wandb/, for `wandb sync`"]


def test_ctrl_c_inside_the_client_still_stops_the_run(tmp_path: Path) -> None:
    client = Client()
    tracker = started(client, [], tmp_path)
    client.log = lambda values: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        tracker.log("grpo", 1, ROW)


def test_g8_config_is_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_12345678")
    client = Client()
    WandbTracker(tmp_path, {"name": "x", "token": "hf_12345678"}, lambda line: None, client)
    assert client.config == {"name": "x", "token": "<redacted>"}


def test_not_installed_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        MissingExtra, match=r"tracking=\[wandb\] needs the package 'wandb': pip install -e '\.\[wandb\]'"
    ):
        make_trackers(["wandb"], tmp_path, config={}, say=lambda line: None)


def test_no_tracker_named_imports_nothing(tmp_path: Path) -> None:
    assert make_trackers([], tmp_path, config={}, say=lambda line: None) == []


REAL = """
import sys
from pathlib import Path
from reasoner.tracking import make_trackers

(tracker,) = make_trackers(["wandb"], Path(sys.argv[1]), config={"name": "tiny", "key": "sk-12345678"}, say=print)
for step in (1, 2):
    tracker.log("grpo", step, {"reward_mean": 0.5 * step})
row = dict.fromkeys(("step", "id", "prompt", "answer", "reward", "advantage", "tokens", "finish_reason"), 1)
tracker.table("grpo", 2, [row | {"completion": "said sk-12345678", "parts": {}}])
tracker.close()
"""


@pytest.mark.parametrize("mode", ["offline", None])
def test_g4_g8_the_real_client_without_network_or_login(tmp_path: Path, mode: str | None, clean_env: Callable) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    run = tmp_path / "out"
    run.mkdir()
    env = clean_env(tmp_path) | ({"WANDB_MODE": mode} if mode else {})
    command = [sys.executable, "-c", REAL, str(run), "key=sk-12345678"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == (0 if mode else 1)
    assert mode or "no login" in done.stdout
    (log,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert b"reward_mean" in log.read_bytes() and b"grpo/completions" in log.read_bytes()
    for path in run.rglob("*"):
        assert not path.is_file() or b"12345678" not in path.read_bytes(), path


@pytest.fixture
def clean_env() -> Callable[[Path], dict[str, str]]:
    """An environment with a home of its own, no login, and two secrets that must not be written."""

    def make(home: Path) -> dict[str, str]:
        import os

        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        return {
            **kept,
            "HOME": str(home),
            "NETRC": str(home / "netrc"),
            "HF_TOKEN": "hf_12345678",
            "A_KEY": "sk-12345678",
        }

    return make
