"""What `python -m reasoner export` is asked for, read from its arguments. Other keys override the run's conf."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reasoner.config import nearest
from reasoner.errors import ConfigError, RunFolderError
from reasoner.export import llama
from reasoner.export.gguf_file import F16, Q4_K_M, Q8_0
from reasoner.run_folder import CONFIG

USAGE = "export run=DIR to=adapter|merged|gguf|ollama [quant=q4_k_m|q8_0|f16] [checkpoint=NAME] [out=DIR]"
ADAPTER, MERGED, GGUF, OLLAMA = "adapter", "merged", "gguf", "ollama"
CHOICES = {
    "to": (ADAPTER, MERGED, GGUF, OLLAMA),
    "quant": (Q4_K_M, Q8_0, F16),
    "dtype": ("auto", "bfloat16", "float32"),
    "base": ("trained", "original"),
    "verify": ("true", "false"),
}
OWN = ("run", "checkpoint", "out", "problems", *CHOICES)
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

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are a GGUF file."""
        return self.to in FILES


def read_request(arguments: Sequence[str]) -> Request:
    """The request, checked as far as it can be without a model. Raises ConfigError, RunFolderError."""
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
    for key in ("run", "to"):
        if key not in own:
            raise ConfigError(f"{key}= is missing: {USAGE}")
    for key, there in CHOICES.items():
        if key in own and own[key] not in there:
            raise ConfigError(f"{key}={own[key]} is unknown{nearest(own[key], list(there))}")
    if not own.get("problems", "1").isdigit() or own.get("problems") == "0":
        raise ConfigError(f"problems={own['problems']}: give how many held-out problems to answer, 1 or more")
    for key, artefacts in OF.items():
        if key in own and own["to"] not in artefacts:
            raise ConfigError(f"{key}= is not for to={own['to']} but for to={'|'.join(artefacts)}: leave it out")
    quant = own.get("quant", Q4_K_M)
    if own["to"] in FILES and quant == Q4_K_M:
        llama.require("quant=q4_k_m (quant=q8_0 and f16 do not)")
    run = Path(own["run"]).expanduser()
    if not (run / CONFIG).is_file():
        raise RunFolderError(f"run={run}: there is no run (no {CONFIG}): name a run's folder")
    return Request(
        run=run,
        to=own["to"],
        out=_out(own, run, quant),
        checkpoint=own.get("checkpoint"),
        dtype=own.get("dtype", "auto"),
        quant=quant,
        original=own.get("base") == "original",
        verify=own.get("verify") != "false",
        problems=int(own.get("problems", PROBLEMS)),
        overrides=tuple(overrides),
    )


def _out(own: dict[str, str], run: Path, quant: str) -> Path:
    chosen = (f"-{quant}" if own["to"] in FILES else "") + (f"-{own['checkpoint']}" if "checkpoint" in own else "")
    out = Path(own["out"]).expanduser() if "out" in own else run / "exports" / f"{own['to']}{chosen}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"out={out} exists and isn't empty: name another folder by out=, or remove it")
    return out
