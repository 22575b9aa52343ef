"""summary.json: how a run ended, what it took, and on what it ran, so that a figure can be traced to its versions and
card."""

import json
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from reasoner import __version__
from reasoner.metrics import peak_gib
from reasoner.run_folder import SUMMARY

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "math-verify",
    "reasoning-gym",
    "vllm",
    "bitsandbytes",
    "triton",
    "llama-cpp-python",
)


def summary(status: str, facts: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The summary of a run. `status`: done, failed, interrupted or stopped by a guard; `facts`: what the run knows of
    itself."""
    return {
        "status": status,
        **facts,
        "seconds": seconds,
        "peak_gib": peak_gib(),
        "versions": versions(),
        "commit": commit(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def notes_of(folder: Path) -> list[dict[str, str]]:
    """What a run that ended before had said; [] where it left no summary."""
    path = folder / SUMMARY
    return json.loads(path.read_bytes()).get("notes", []) if path.exists() else []


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {"reasoner": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout this package runs from, with "+changes" where files differ from it; None outside a
    checkout."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()
