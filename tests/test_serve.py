"""The verb serve: what vLLM is started with. No card here, so the server is a program that says its arguments."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from reasoner import serve
from reasoner.__main__ import main
from reasoner.compose import compose_conf
from reasoner.config import Config, validate
from reasoner.errors import ConfigError, RunFolderError
from reasoner.serve import RANKS, command_for

ROOT = Path(__file__).parents[1]


def config_of(run: Path) -> Config:
    return validate(compose_conf(str(run / "config.yaml")).values)


def test_an_adapter_is_served_beside_its_base(adapted_run: Path, trained_run: Path):
    config = config_of(adapted_run)
    command = command_for(adapted_run, config, "mine")
    adapter, base = str(adapted_run / "adapter"), str(trained_run / "model")
    assert command[:4] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"] and command[4] == base
    told = dict(zip(command[5::2], command[6::2], strict=False))
    assert (told["--tokenizer"], told["--generation-config"]) == (adapter, adapter)
    assert command[command.index("--lora-modules") + 1] == f"mine={adapter}" and "--enable-lora" in command
    assert command[command.index("--max-lora-rank") + 1] == "8", "the least that holds rank 4"
    stops = json.loads((adapted_run / "adapter/generation_config.json").read_text())["eos_token_id"]
    assert stops, "--generation-config tells the server where to stop"
    quantized = replace(config, model=replace(config.model, quantize="nf4"))
    assert command_for(adapted_run, quantized, "mine")[-2:] == ["--quantization", "bitsandbytes"]
    assert "--quantization" not in command


def test_whole_and_merged_models_are_served_alone(trained_run: Path, adapted_run: Path, tmp_path: Path):
    assert command_for(trained_run, config_of(trained_run), "tiny")[4:] == [
        str(trained_run / "model"), "--served-model-name", "tiny", "--generation-config", str(trained_run / "model")
    ]  # fmt: skip
    merged = tmp_path / "exports/merged"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text("{}")
    (merged / "export.json").write_text('{"verified": true, "passed": true}')
    assert command_for(tmp_path, config_of(adapted_run), "tiny")[4] == str(merged)
    (merged / "export.json").write_text('{"verified": true, "passed": false}')
    with pytest.raises(RunFolderError, match="exports/merged failed its proof"):
        command_for(tmp_path, config_of(adapted_run), "tiny")


def test_what_vllm_cannot_serve_is_said(adapted_run: Path, tmp_path: Path):
    config = config_of(adapted_run)
    with pytest.raises(RunFolderError, match="has exported nothing yet"):
        command_for(tmp_path, config, "mine")
    assert config.model.lora is not None
    high = replace(config, model=replace(config.model, lora=replace(config.model.lora, r=RANKS[-1] + 1)))
    with pytest.raises(ConfigError, match="is more than vLLM serves"):
        command_for(adapted_run, high, "mine")
    made = replace(config, model=replace(config.model, scratch=validate(compose_conf("tiny").values).model.scratch))
    with pytest.raises(ConfigError, match="to=merged first"):
        command_for(adapted_run, made, "mine")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "run= is missing"),
        (["run={run}", "prot=1"], "did you mean 'port'"),
        (["run={run}", "port=x"], "port=x: give a number"),
        (["run={run}", "port"], "'port' is no key=value"),
        (["run=nowhere"], "there is no run"),
        (["run={run}"], "serve needs vLLM on a CUDA GPU: "),
    ],
)
def test_what_is_wrong_is_one_line(
    trained_run: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["serve", *(text.format(run=trained_run) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_process_becomes_the_server_and_hands_on_its_options(trained_run: Path, tmp_path: Path):
    module = tmp_path.joinpath(*serve.VLLM.split(".")).with_suffix(".py")
    module.parent.mkdir(parents=True)
    module.write_text("import os, sys; print(os.getpid(), sys.argv[1:])")
    have = "import reasoner.serve as s, os; s.absent = lambda asked: None; print(os.getpid())\n"
    call = f"s.serve(['run={trained_run}', 'port=8123', 'name=mine', '--max-model-len=64'])"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", have + call], env=environment, capture_output=True, text=True, check=True
    )
    before, line, served = done.stdout.splitlines()
    process, arguments = served.split(" ", 1)
    assert process == before and "serving mine at http://127.0.0.1:8123/v1: " in line
    model = str(trained_run / "model")
    named = ["--served-model-name", "mine", "--generation-config", model]
    assert arguments == str(["serve", model, *named, "--host", "127.0.0.1", "--port", "8123", "--max-model-len=64"])
