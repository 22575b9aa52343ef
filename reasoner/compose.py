"""From a conf's name and overrides to one plain mapping, and where each of its values came from. Hydra does the
composing.

`./conf` in the working directory (or the folder of `conf=path.yaml`) is searched before the packaged confs, for
primary confs and groups alike.
Overrides of keys go in as Hydra's `++key=value`, so that a key the schema knows needs no `+`; a wrong key is then
named by the schema.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reasoner.config import nearest
from reasoner.errors import ConfigError

FILE_KEYS = ("path", "map", "fn", "template")
CARDS = (8, 12, 16, 24)  # GB, the rows of conf/card


def packaged_confs() -> Path:
    """The folder of the confs we ship: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


class PackagedConfs(SearchPathPlugin):
    """Hydra's extension point for one more folder, searched last."""

    def manipulate_search_path(self, search_path: Any) -> None:
        search_path.append("reasoner", f"file://{packaged_confs()}")


@dataclass(frozen=True, slots=True)
class Composed:
    """A conf with its overrides applied and interpolations resolved.

    `sources` says for each dotted key which file or "command line" set it; a key that is absent took its default from
    the schema.
    """

    name: str
    folder: Path
    values: Mapping[str, Any]
    sources: Mapping[str, str] = field(default_factory=dict)


def locate(conf: str) -> tuple[Path, str]:
    """(folder to search first, name) of `conf=NAME` or `conf=path/to/file.yaml`. Raises ConfigError that names the
    nearest conf."""
    if conf.endswith((".yaml", ".yml")) or os.sep in conf:
        path = Path(conf).expanduser()
        if not path.is_file():
            raise ConfigError(f"conf={conf}: there is no such file")
        return path.parent.resolve(), path.stem
    user = Path("conf").resolve()
    for folder in (user, packaged_confs()):
        if (folder / f"{conf}.yaml").is_file():
            return (user if user.is_dir() else packaged_confs()), conf
    raise ConfigError(f"unknown conf '{conf}'{nearest(conf, [name for name, _ in list_confs()])}")


def list_confs() -> list[tuple[str, str]]:
    """(name, first comment line) of every primary conf, the user's first."""
    found: dict[str, str] = {}
    for folder in (Path("conf"), packaged_confs()):
        for path in sorted(folder.glob("*.yaml")):
            first = path.read_text(encoding="utf-8").split("\n", 1)[0]
            if first.startswith("#") and path.stem != "base":
                found.setdefault(path.stem, first.lstrip("# "))
    return list(found.items())


def groups_in(folders: Iterable[Path]) -> set[str]:
    """The names of the config groups (folders of YAML files)."""
    return {path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()}


def rewrite(override: str, groups: set[str]) -> list[str]:
    """An override as typed -> Hydra's grammar.

    >>> rewrite("grpo.steps=5", {"loss"}), rewrite("loss=gspo", {"loss"}), rewrite("reward=mine.py:score", {"reward"})
    (['++grpo.steps=5'], ['loss=gspo'], ['~reward.parts', "++reward.parts.score.fn='mine.py:score'"])
    """
    key, sign, value = override.partition("=")
    if not sign:
        if override.startswith("~"):
            return [override]
        raise ConfigError(f"'{override}' is no override: write key=value")
    if key == "reward" and ":" in value:
        part = re.sub(r"\W", "_", value.rpartition(":")[2]) or "reward"
        return ["~reward.parts", f"++reward.parts.{part}.fn={quoted(value)}"]
    if key == "resume":
        return [f"++resume.dir={quoted(value)}"]
    if key.split("@")[0] in groups and value.isdigit():
        return [f"{key}={quoted(value)}"]  # card=8 would be read as a number, which hydra takes for no choice
    if key[:1] in "+~" or key.split("@")[0] in groups or "/" in key:
        return [override]
    return [f"++{override}"]


def quoted(value: str) -> str:
    """A string as Hydra's grammar reads it literally."""
    return "'" + value.strip("'\"").replace("\\", "\\\\").replace("'", "\\'") + "'"


def compose_conf(conf: str, overrides: Sequence[str] = ()) -> Composed:
    """Compose `conf` with overrides as typed on the command line. Raises ConfigError: what, where, the nearest right
    name."""
    folder, name = locate(conf)
    folders = [folder, packaged_confs()]
    typed = [part for override in overrides for part in rewrite(override, groups_in(folders))]
    Plugins.instance().register(PackagedConfs)
    _register_resolvers()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = compose(name, typed)
            if composed.get("name") is None:
                OmegaConf.update(composed, "name", name)
            values = OmegaConf.to_container(composed, resolve=True)
            sources = _sources(name, typed, folders)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_one_line(error, overrides, folders)) from error
    assert isinstance(values, dict)
    return Composed(name, folder, {str(key): _anchored(value, folder) for key, value in values.items()}, sources)


def _anchored(value: Any, folder: Path, key: str = "") -> Any:
    """File names made absolute, first by the working directory and then by the conf's folder, so that a resumed run
    finds them again."""
    if isinstance(value, dict):
        return {inner: _anchored(item, folder, str(inner)) for inner, item in value.items()}
    if key not in FILE_KEYS or not isinstance(value, str):
        return value
    file, colon, function = value.partition(":")
    is_there = Path.exists if key == "path" else Path.is_file  # rows may lie in a folder
    found = next((base / file for base in (Path.cwd(), folder) if file and is_there(base / file)), None)
    return f"{found.resolve()}{colon}{function}" if found else value


def _sources(name: str, typed: Sequence[str], folders: Sequence[Path]) -> dict[str, str]:
    sources: dict[str, str] = {}
    loader = GlobalHydra.instance().config_loader()
    for default in loader.compute_defaults_list(name, list(typed), RunMode.RUN).defaults:
        path = next(
            (f / f"{default.config_path}.yaml" for f in folders if (f / f"{default.config_path}.yaml").is_file()), None
        )
        if path is None:
            continue
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        label = f"conf/{default.config_path}.yaml" if path.is_relative_to(packaged_confs()) else str(path)
        for key in _leaves(content, default.package or ""):
            sources[key] = label
    for override in typed:
        key = override.lstrip("+~").partition("=")[0]
        if key.split("@")[0] in groups_in(folders):
            continue  # a choice of a file, which is among the defaults above
        sources.update({old: "command line" for old in sources if old.startswith(f"{key}.")})
        sources[key] = "command line"
    return sources


def _leaves(node: Any, prefix: str) -> list[str]:
    if not isinstance(node, dict) or not node:
        return [prefix]
    return [
        leaf
        for key, value in node.items()
        if key not in ("defaults", "hydra")
        for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    ]


def source_of(key: str, sources: Mapping[str, str]) -> str:
    """Which file or "command line" set a dotted key, or the section around it; "default" if none did."""
    while key:
        if key in sources:
            return sources[key]
        key = key.rpartition(".")[0]
    return "default"


def annotated_yaml(values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """The values as YAML, every leaf followed by a comment that says what set it."""
    lines: list[str] = []

    def write(node: Mapping[str, Any], prefix: str, indent: str) -> None:
        for key, value in node.items():
            dotted = f"{prefix}.{key}" if prefix else str(key)
            if isinstance(value, Mapping) and value:
                lines.append(f"{indent}{key}:")
                write(value, dotted, indent + "  ")
            else:
                plain = list(value) if isinstance(value, tuple) else value
                text = yaml.safe_dump(plain, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
                lines.append(f"{indent}{key}: {text}  # {source_of(dotted, sources)}")

    write(values, "", "")
    return "\n".join(lines) + "\n"


def _one_line(error: Exception, overrides: Sequence[str], folders: Sequence[Path]) -> str:
    text = " ".join(str(error).split())
    missing = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
    if missing:
        group, choice = missing.groups()
        options = sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
        return f"{group}={choice}: there is no such choice{nearest(choice, options)}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}:{error.problem_mark.line + 1}: {error.problem or 'broken YAML'}"
    if "sweep" in text.lower():
        return f"{text}. A value with a comma or braces needs quotes: 'key=\"first, second\"'"
    if type(error).__name__ == "OverrideParseException":
        broken = next((o for o in overrides if o in text), text)
        return f"can't read the override {broken}: put its value in quotes, as in 'key=\"value\"'"
    return text


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@cache
def card_gib() -> float | None:
    """Memory of the first NVIDIA card in GiB, None without one; nvidia-smi is asked, so that composing needs no
    torch."""
    if not shutil.which("nvidia-smi"):
        return None
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "--id=0"],
        capture_output=True,
        text=True,
    )
    return float(asked.stdout.split()[0]) / 1024 if asked.returncode == 0 and asked.stdout.strip() else None


def card_row() -> int:
    """The row of conf/card that fits the card: the largest that is no larger, 8 where there is none."""
    memory = (card_gib() or 0) + 1  # cards report a little less than they are sold as
    return max((row for row in CARDS if row <= memory), default=CARDS[0])


def _card_value(key: str) -> Any:
    content = yaml.safe_load((packaged_confs() / "card" / f"{card_row()}.yaml").read_text(encoding="utf-8"))
    for part in key.split("."):
        content = content[part]
    return content


def _register_resolvers() -> None:
    OmegaConf.register_new_resolver("card", _card_value, replace=True)
