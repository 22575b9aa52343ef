"""What `python -m reasoner eval` is asked for, read from its arguments. Other keys are overrides of the conf."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reasoner.errors import ConfigError

USAGE = "eval run=DIR, eval run=A run=B, or eval conf=NAME [model=...]"
LISTS = ("checkpoints", "rows", "sets", "by", "k")
OWN = ("run", "conf", "model", "out", *LISTS)


@dataclass(frozen=True, slots=True)
class Request:
    """One call of the verb.

    >>> read_request(["run=outputs/a", "by=level,subject", "evaluate.samples=16"])
    Request(runs=(Path("outputs/a"),), conf=None, ..., by=("level", "subject"), overrides=("evaluate.samples=16",))
    """

    runs: tuple[Path, ...] = ()
    conf: str | None = None
    model: str | None = None
    out: str | None = None
    checkpoints: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    at: tuple[int, ...] = ()  # k of pass@k and maj@k
    overrides: tuple[str, ...] = ()

    @property
    def compares(self) -> bool:
        """Whether kept results are read and no model is needed."""
        return len(self.runs) > 1 or bool(self.rows)


def read_request(arguments: Sequence[str]) -> Request:
    """The request, checked as far as it can be without files. Raises ConfigError."""
    runs: list[Path] = []
    single: dict[str, str] = {}
    lists: dict[str, tuple[str, ...]] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if argument.startswith("-"):
            raise ConfigError(f"eval has no option {argument}: {USAGE}")
        if not sign or key not in OWN:
            if not sign:
                raise ConfigError(f"'{key}' is no key=value: {USAGE}")
            overrides.append(argument)
        elif not value:
            raise ConfigError(f"{key}= is empty: give {key}=VALUE")
        elif key == "run":
            runs.append(Path(value).expanduser())
        elif key in LISTS:
            whole = value[1:-1] if value.startswith("[") and value.endswith("]") else value
            lists[key] = tuple(part.strip() for part in whole.split(",") if part.strip())
        else:
            single[key] = value
    request = Request(
        runs=tuple(runs),
        conf=single.get("conf"),
        model=single.get("model"),
        out=single.get("out"),
        checkpoints=lists.get("checkpoints", ()),
        rows=lists.get("rows", ()),
        sets=lists.get("sets", ()),
        by=lists.get("by", ()),
        at=tuple(_count(text) for text in lists.get("k", ())),
        overrides=tuple(overrides),
    )
    _check(request)
    return request


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"k={text}: give numbers of samples, k=1,4,8")
    return int(text)


def _check(request: Request) -> None:
    if not request.runs and request.conf is None:
        raise ConfigError(f"nothing to evaluate: {USAGE}")
    if request.runs and request.conf is not None:
        raise ConfigError("run= brings its own conf: leave conf= out, or name the conf alone")
    if request.runs and request.model is not None:
        raise ConfigError("run= brings its own model; another one is evaluated by conf=NAME model=...")
    if request.compares and not request.runs:
        raise ConfigError("rows= names rows that a run has kept: give run=DIR")
    if request.compares:
        odd = [
            *request.overrides,
            *(["checkpoints="] if request.checkpoints else []),
            *(["out="] if request.out else []),
        ]
        if odd:
            raise ConfigError(
                f"runs are compared from what they kept, which {odd[0]} can't change: evaluate each by eval run=DIR "
                f"{odd[0]}, then compare the folders that this leaves"
            )
    elif request.conf is not None and request.checkpoints:
        raise ConfigError("checkpoints= are those of a run: give run=DIR")
