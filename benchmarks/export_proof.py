"""What each export of one run loses: `python -m benchmarks.export_proof NAME SETTING ...` trains (conf=tiny where no
setting names another conf), exports every artefact there is, and keeps the proofs in results/export_proof-NAME.json.

Left out: ollama and hub, which hold one of these artefacts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import about, write_json

RESULTS = Path(__file__).with_name("results")
ARTEFACTS = (
    ("adapter",),
    ("merged",),
    ("gguf", "quant=f16"),
    ("gguf", "quant=q8_0"),
    ("gguf", "quant=q4_k_m"),
)
OWN = ("versions", "run", "weights", "verified")  # said once, or of no interest here


def reasoner(*arguments: str) -> int:
    """The exit code of `python -m reasoner`; 3 where a proof fails, which is a result too."""
    return subprocess.run([sys.executable, "-m", "reasoner", *arguments], check=False).returncode


def proofs(run: Path, problems: int) -> list[dict[str, Any]]:
    """export.json of every artefact of the run; an adapter where one was trained."""
    found = []
    for to, *settings in ARTEFACTS:
        if to == "adapter" and not (run / "adapter").is_dir():
            continue
        out = run / "exports" / "-".join((to, *settings))
        code = reasoner("export", f"run={run}", f"to={to}", *settings, f"problems={problems}", f"out={out}")
        if code not in (0, 3):
            sys.exit(code)
        told = json.loads((out / "export.json").read_text())
        found.append({key: value for key, value in told.items() if key not in OWN})
    return found


def main() -> None:
    """Train, export, keep what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--problems", type=int, default=1024)
    known, settings = parser.parse_known_args()
    conf = [] if any(setting.startswith("conf=") for setting in settings) else ["conf=tiny"]
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        if code := reasoner(*conf, *settings, f"out={run}"):
            sys.exit(code)
        found = proofs(run, known.problems)
    words = " ".join((known.name, f"--problems {known.problems}", *settings))
    result = {**about(f"python -m benchmarks.export_proof {words}"), "proofs": found}
    write_json(RESULTS / f"export_proof-{known.name}.json", result)
    for one in found:
        print(one["to"], one.get("quant", ""), f"{one['mean_gap']:.2g} nats", one["sets"])


if __name__ == "__main__":
    main()
