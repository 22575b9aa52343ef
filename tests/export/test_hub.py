"""to=hub: what a hub is sent, its card, and what is said where it is not taken. The hub is a server of our own."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from reasoner.__main__ import main
from reasoner.export import card

TOKEN = "hf_planted0123456789"


class Hub(ThreadingHTTPServer):
    """The few calls of the hub that a push makes; `files` are what was committed, `created` what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.private = True
        self.refuses = False


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.say({"id": "me/sums", "private": self.server.private, "siblings": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            self.say({"url": f"http://127.0.0.1:{self.server.server_port}/me/sums"})
        elif self.server.refuses:
            self.say({"error": "the quota is used up"}, 403)
        elif "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            self.say({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.say({"success": True, "commitOid": "1" * 40, "commitUrl": "http://127.0.0.1/me/sums/commit/1"})
        else:
            self.say({"errors": [], "warnings": []})  # validate-yaml

    def say(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(adapted_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that trained an adapter."""
    return shutil.copytree(adapted_run, tmp_path / "run")


def test_an_adapter_is_pushed_privately_with_a_card_and_no_path_of_this_machine(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture
):
    assert main(["export", f"run={run}", "to=hub", "repo=me/sums", "problems=20"]) == 0
    assert "/me/sums, private" in capsys.readouterr().out
    assert hub.created == [{"name": "sums", "organization": "me", "visibility": "private"}]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= hub.files.keys()
    assert "export.json" not in hub.files
    assert hub.files["adapter_model.safetensors"] == (run / "exports/adapter/adapter_model.safetensors").read_bytes()
    text = hub.files["README.md"].decode()
    head, body = text.split("---\n", 2)[1:]
    assert yaml.safe_load(head) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["reasoner", "sft"],
    }
    for part in (
        "A LoRA adapter for `model`, by SFT with `reasoner`",
        "| export | heldout | 60 | ",
        "Loaded again by peft and compared with the policy that was trained: logprobs of",
        "- `accuracy`: `exact`, weight 1",
        "`reasoning_gym/chain_sum`, prompt `{metadata[expression]}=`",
        "The base's licence is the base's",
        "torch 2.",
    ):
        assert part in body, part
    assert str(run.parent) not in text and "/tmp" not in text
    pushed = json.loads(hub.files["adapter_config.json"])
    assert pushed["base_model_name_or_path"] == "model" and not any(b"/tmp" in data for data in hub.files.values())
    kept = json.loads((run / "exports/adapter/adapter_config.json").read_text())
    assert Path(kept["base_model_name_or_path"]).is_absolute()  # where it is loaded from on this machine


def test_a_refusal_keeps_the_artefact_and_the_same_command_goes_on(hub: Hub, run: Path, capsys: pytest.CaptureFixture):
    asked = ["export", f"run={run}", "to=hub", "repo=me/sums", "what=gguf", "quant=f16", "private=false", "problems=20"]
    hub.refuses = True
    assert main(asked) == 2
    error = capsys.readouterr().err.strip()
    assert "the hub did not take me/sums" in error and "the artefact is kept" in error and "\n" not in error
    made = (run / "exports/gguf-f16/model-f16.gguf").stat().st_mtime_ns
    hub.refuses = False
    assert main(asked) == 0
    assert (run / "exports/gguf-f16/model-f16.gguf").stat().st_mtime_ns == made, "it was made again"
    assert hub.created[-1]["visibility"] == "public" and set(hub.files) == {"README.md", "model-f16.gguf"}
    assert "/me/sums, private, as it was" in capsys.readouterr().out, "the hub keeps what a repository was"
    (run / "summary.json").touch()
    assert main(asked) == 2
    assert "exists and isn't empty" in capsys.readouterr().err, "the run went on, and its artefact is of before"
    (run / "exports/gguf-f16/export.json").touch()
    other = shutil.copytree(run, run.with_name("other"))
    assert main([*asked, f"run={other}", f"out={run / 'exports/gguf-f16'}"]) == 2
    assert "exists and isn't empty" in capsys.readouterr().err, "it is another run's, and would get this one's card"
    hub.private = False
    assert main([*asked[:-2], "private=true"]) == 2
    assert "is there already and public: private=false" in capsys.readouterr().err
    report = run / "exports/gguf-f16/export.json"
    report.write_text(report.read_text()[:40])
    assert main(asked) == 2
    error = capsys.readouterr().err.strip()
    assert f"{report} is damaged: remove {report.parent}" in error and "\n" not in error


def test_a_hub_that_can_not_be_reached_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["export", f"run={run}", "to=hub", "repo=me/sums", "problems=20"]) == 2
    error = capsys.readouterr().err.strip()
    assert "the hub did not take me/sums" in error and str(run / "exports/adapter") in error and "\n" not in error
    assert (run / "exports/adapter/README.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["to=hub"], "to=hub wants a name: repo=NAME"),
        (["to=hub", "repo=a/b/c"], "repo=a/b/c: Repo id must"),
        (["to=hub", "repo=me/sums", "verify=false"], "leave out verify=false"),
        (["to=hub", "repo=me/sums"], "to=hub needs a token"),
        (["to=merged", "repo=me/sums"], "repo= is of to=hub"),
        (["to=hub", "repo=me/sums", "what=ollama"], "what=ollama is unknown"),
    ],
)
def test_what_is_asked_wrong_is_one_line(
    arguments: list[str],
    said: str,
    adapted_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main(["export", f"run={adapted_run}", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error
    assert not (adapted_run / "exports").exists()


def test_the_card_names_a_base_of_the_hub_with_its_licence(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = yaml.safe_load((trained_run / "config.yaml").read_text())
    settings["model"] |= {"name": "Org/Base-1B", "scratch": None}
    settings["data"] |= {"name": "Org/rows", "path": "/data/of/mine/rows.csv", "prompt": f"key {TOKEN}: {{question}}"}
    monkeypatch.setenv("MY_SECRET", TOKEN)
    shutil.copy(trained_run / "eval.json", tmp_path)
    answers = (trained_run / "eval_problems.jsonl").read_text()
    (tmp_path / "eval_problems.jsonl").write_text(answers.replace('"text": "', '"text": "\u2028'))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(card, "licence_of", lambda base: "apache-2.0" if base == "Org/Base-1B" else None)
    numbers = {"tokens": 10, "mean_gap": 0.001, "largest_gap": 0.01, "limit": 0.01, "sets": {}}
    told = {"to": "gguf", "quant": "q8_0", "weights": "export", "loader": "llama.cpp", "versions": {"torch": "2"}}
    text = card.write(tmp_path, told | numbers, "me/sums")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == "Org/Base-1B" and head["license"] == "apache-2.0" and head["library_name"] == "gguf"
    assert "datasets" not in head, "data.path comes before data.name"
    assert (
        "A GGUF file (q8_0) made from [Org/Base-1B](https://huggingface.co/Org/Base-1B), by SFT and then GRPO" in text
    )
    assert "`rows.csv`" in text and "/data/of/mine" not in text and "`apache-2.0`, as the base." in text
    assert TOKEN not in text and "prompt `key <redacted>: {question}`" in text
    assert "| base | heldout | 60 | 0.0% | 0.0% to 6.0% |" in text and "- sft against base on heldout: +" in text
