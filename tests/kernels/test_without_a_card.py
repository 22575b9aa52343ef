"""The Triton kernels without a card, interpreted and compiled for each card, in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")


@pytest.mark.parametrize(
    ("file", "settings", "least"),
    [
        ("interpreted", {"TRITON_INTERPRET": "1"}, 30),
        ("compiled", {}, 20),
        ("interpreted_elementwise", {"TRITON_INTERPRET": "1"}, 100),
        ("interpreted_gated_down", {"TRITON_INTERPRET": "1"}, 20),
        ("compiled_elementwise", {}, 7),
        ("interpreted_nf4", {"TRITON_INTERPRET": "1"}, 40),
        ("compiled_nf4", {}, 7),
        ("interpreted_vllm", {"TRITON_INTERPRET": "1"}, 87),
        ("compiled_vllm", {}, 10),
    ],
)
def test_without_a_card(file: str, settings: dict[str, str], least: int, tmp_path: Path):
    path = Path(__file__).with_name(f"{file}.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(path),
        "--noconftest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", **settings}
    done = subprocess.run(command, env=environment, cwd=path.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    counted = re.search(r"^(\d+) passed in", done.stdout, re.MULTILINE)
    assert counted is not None and int(counted[1]) >= least, done.stdout[-2000:]
