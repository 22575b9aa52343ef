"""What `python -m reasoner export` is asked for, read from its arguments. Other keys override the run's conf."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasoner.config import nearest
from reasoner.errors import ConfigError, RunFolderError
from reasoner.export import llama
from reasoner.export.gguf_file import F16, Q4_K_M, Q8_0
from reasoner.run_folder import SUMMARY, conf_of

USAGE = (
    "export run=DIR to=adapter|merged|gguf|ollama|hub [quant=q4_k_m|q8_0|f16] [repo=NAME] [checkpoint=NAME] [out=DIR]"
)
REPORT = "export.json"
ADAPTER, MERGED, GGUF, OLLAMA, HUB = "adapter", "merged", "gguf", "ollama", "hub"
CHOICES = {
    "to": (ADAPTER, MERGED, GGUF, OLLAMA, HUB),
    "what": (ADAPTER, MERGED, GGUF),
    "private": ("true", "false"),
    "quant": (Q4_K_M, Q8_0, F16),
    "dtype": ("auto", "bfloat16", "float32"),
    "base": ("trained", "original"),
    "verify": ("true", "false"),
}
OWN = ("run", "checkpoint", "out", "problems", "repo", *CHOICES)
FILES = (GGUF, OLLAMA)
OF = {"dtype": (MERGED,), "base": (MERGED, *FILES), "quant": FILES}  # the artefacts that a key is of
PROBLEMS = 100  # answered of each held-out set, by the policy and by the artefact


@dataclass(frozen=True, slots=True)
class Request:
    """One call of the verb.

    >>> read_request(["run=outputs/a", "to=merged", "dtype=float32"])
    Request(run=Path("outputs/a"), to="merged", out=Path("outputs/a/exports/merged"), dtype="float32", ...)
    """

    run: Path
    to: str
    out: Path
    checkpoint: str | None = None
    dtype: str = "auto"  # of to=merged; auto: bfloat16 for a merged adapter, float32 for a model trained whole
    quant: str = Q4_K_M  # of to=gguf and to=ollama
    original: bool = False  # merge into the base as it was before NF4
    verify: bool = True
    problems: int = PROBLEMS
    overrides: tuple[str, ...] = ()
    repo: str | None = None  # of the hub, where the artefact is pushed
    private: bool = True
    ready: bool = False  # it is there and passed its proof, and is only to be pushed

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are a GGUF file."""
        return self.to in FILES


def read_request(arguments: Sequence[str]) -> Request:
    """The request, checked as far as it can be without a model. Raises ConfigError, RunFolderError."""
    own, overrides = _split(arguments)
    for key in ("run", "to"):
        if key not in own:
            raise ConfigError(f"{key}= is missing: {USAGE}")
    for key, there in CHOICES.items():
        if key in own and own[key] not in there:
            raise ConfigError(f"{key}={own[key]} is unknown{nearest(own[key], list(there))}")
    if not own.get("problems", "1").isdigit() or own.get("problems") == "0":
        raise ConfigError(f"problems={own['problems']}: give how many held-out problems to answer, 1 or more")
    run = Path(own["run"]).expanduser()
    conf_of(run)
    to = _what(own, run)
    for key, artefacts in OF.items():
        if key in own and to not in artefacts:
            raise ConfigError(f"{key}= is not for to={to} but for to={'|'.join(artefacts)}: leave it out")
    quant = own.get("quant", Q4_K_M)
    if to in FILES and quant == Q4_K_M:
        llama.require("quant=q4_k_m (quant=q8_0 and f16 do not)")
    out, ready = _out(own, run, to, quant)
    return Request(
        run=run,
        to=to,
        out=out,
        checkpoint=own.get("checkpoint"),
        dtype=own.get("dtype", "auto"),
        quant=quant,
        original=own.get("base") == "original",
        verify=own.get("verify") != "false",
        problems=int(own.get("problems", PROBLEMS)),
        overrides=tuple(overrides),
        repo=own.get("repo"),
        private=own.get("private") != "false",
        ready=ready,
    )


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Our keys, and what overrides the run's conf."""
    own: dict[str, str] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if argument.startswith("-") or not sign:
            raise ConfigError(f"'{argument}' is no key=value: {USAGE}")
        if key not in OWN:
            overrides.append(argument)
        elif not value:
            raise ConfigError(f"{key}= is empty: give {key}=VALUE")
        else:
            own[key] = value
    return own, overrides


def _what(own: dict[str, str], run: Path) -> str:
    """The artefact; of to=hub what is pushed: the adapter where the run trained one, else the merged model."""
    if own["to"] != HUB:
        for key in ("repo", "what", "private"):
            if key in own:
                raise ConfigError(f"{key}= is of to=hub: leave it out, or ask for to=hub what={own['to']}")
        return own["to"]
    if "repo" not in own:
        raise ConfigError("to=hub wants a name: repo=NAME or repo=ORGANISATION/NAME")
    if own.get("verify") == "false":
        raise ConfigError("to=hub pushes what passed its proof: leave out verify=false")
    return own.get("what") or (ADAPTER if (run / "adapter").is_dir() else MERGED)


def _out(own: dict[str, str], run: Path, to: str, quant: str) -> tuple[Path, bool]:
    """Where the artefact goes, and whether it is there, ready to be pushed."""
    chosen = (f"-{quant}" if to in FILES else "") + (f"-{own['checkpoint']}" if "checkpoint" in own else "")
    out = Path(own["out"]).expanduser() if "out" in own else run / "exports" / f"{to}{chosen}"
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return out, False
    if own["to"] == HUB and (out / REPORT).is_file():
        told = read_report(out)
        ended, made = (path.stat().st_mtime if path.exists() else 0.0 for path in (run / SUMMARY, out / REPORT))
        same = told.get("passed") and told["to"] == to and told.get("quant", quant) == quant
        same = same and Path(told["run"]).resolve() == run.resolve()
        same = same and own.get("base", "trained") == told.get("base", "trained")
        same = same and own.get("dtype", "auto") in ("auto", told.get("dtype"))
        if same and made >= ended:  # the run has not gone on since
            return out, True
    raise RunFolderError(f"out={out} exists and isn't empty: name another folder by out=, or remove it")


def read_report(out: Path) -> dict[str, Any]:
    """The export.json of an artefact's folder. Raises RunFolderError where it is damaged."""
    path = out / REPORT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or "weights" not in found:
        raise RunFolderError(f"{path} is damaged: remove {out}, and the same command exports anew")
    return found
