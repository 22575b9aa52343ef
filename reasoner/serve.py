"""`python -m reasoner serve run=DIR`: what a run trained, behind vLLM's OpenAI-compatible server on this machine.

The server is vLLM's own, started with what the run says: its base with the adapter beside it, its tokenizer, template
and stop ids. Left out: a server for machines without a card (export to=gguf is served there by llama.cpp or Ollama).
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from reasoner.compose import compose_conf
from reasoner.config import Config, nearest, validate
from reasoner.errors import ConfigError, RunFolderError
from reasoner.export.request import REPORT
from reasoner.models.sources import locate
from reasoner.rollout.choice import absent
from reasoner.run_folder import conf_of

USAGE = "serve run=DIR [port=8000] [host=127.0.0.1] [name=NAME] [--OPTION of vllm serve ...]"
OWN = ("run", "port", "host", "name")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.24 takes for --max-lora-rank
MERGED = Path("exports/merged")
VLLM = "vllm.entrypoints.cli.main"


def serve(arguments: Sequence[str]) -> None:
    """Become the server; what starts with `--` is handed to `vllm serve` as it is, with its value after `=`. Raises
    InputError where the run or vLLM can't be had.
    """
    own: dict[str, str] = {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if argument.startswith("--"):
            continue
        if not sign or not value:
            raise ConfigError(f"'{argument}' is no key=value: {USAGE}")
        if key not in OWN:
            raise ConfigError(f"serve has no key '{key}'{nearest(key, list(OWN))}: {USAGE}")
        own[key] = value
    if "run" not in own:
        raise ConfigError(f"run= is missing: {USAGE}")
    run, port = Path(own["run"]).expanduser(), own.get("port", "8000")
    conf = conf_of(run)
    if not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ConfigError(f"port={port}: give a number from 1 to 65535")
    config = validate(compose_conf(str(conf)).values)
    typed = [argument for argument in arguments if argument.startswith("--")]
    name = own.get("name", config.name)
    command = [*command_for(run, config, name), "--host", own.get("host", "127.0.0.1"), "--port", port, *typed]
    why = absent("serve")
    if why is not None:
        raise ConfigError(
            f"serve needs vLLM on a CUDA GPU: {why}. chat run={run} talks to it here, and export run={run} to=gguf "
            "writes a file for llama.cpp and Ollama"
        )
    print(f"serving {name} at http://{own.get('host', '127.0.0.1')}:{port}/v1: {' '.join(command[2:])}", flush=True)
    os.execv(command[0], command)


def command_for(run: Path, config: Config, name: str) -> list[str]:
    """The server's command line, for the run's merged export where there is one, else its model, else its base with
    the adapter. Raises ConfigError where vLLM can't read the base, RunFolderError where nothing was exported yet.
    """
    start = [sys.executable, "-m", VLLM, "serve"]
    for whole in (run / MERGED, run / "model"):
        if (whole / "config.json").is_file():
            report = whole / REPORT
            if report.is_file() and json.loads(report.read_bytes()).get("passed") is False:
                raise RunFolderError(f"{whole} failed its proof ({report} tells): remove it, or export it again")
            return [*start, str(whole), "--served-model-name", name, "--generation-config", str(whole)]
    adapter = run / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        raise RunFolderError(
            f"run={run} has exported nothing yet: go on with resume={run}, or export run={run} to=merged"
        )
    lora, base = config.model.lora, config.model
    if lora is None or base.gguf or base.scratch:
        raise ConfigError(
            f"vLLM can't put an adapter on the base of run={run}: export run={run} to=merged first, then serve"
        )
    if lora.r > RANKS[-1]:
        raise ConfigError(
            f"model.lora.r={lora.r} is more than vLLM serves ({RANKS[-1]}): export run={run} to=merged first"
        )
    rank = min(one for one in RANKS if one >= lora.r)
    found = locate(base)
    return [
        *start,
        str(found.path),
        *("--tokenizer", str(adapter), "--generation-config", str(adapter)),
        *("--served-model-name", "base", "--enable-lora", "--max-lora-rank", str(rank)),
        *("--lora-modules", f"{name}={adapter}"),
        *(("--quantization", "bitsandbytes") if base.quantize == "nf4" else ()),
    ]
