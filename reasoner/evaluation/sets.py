"""Which problems an evaluation asks: the sets of the conf, those of conf/sets, or other rows by the keys of `data`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reasoner.compose import Composed, compose_conf, locate, packaged_confs
from reasoner.config import Config, Optim, data_of, nearest, validate
from reasoner.data.task import HELDOUT, TRAINING
from reasoner.errors import ConfigError

SOURCES = ("data.path=", "data.name=")


def compose_sets(conf: str, overrides: Sequence[str], asked: Sequence[str]) -> tuple[Config, Composed, set[str]]:
    """The conf with exactly the sets that are asked for ({}: its held-out rows), and the names of those that it did
    not have before.

    `data.path=` or `data.name=` among the overrides names one more set, with the other `data.` keys beside it; the
    conf's own data stays what it was. Raises ConfigError for a set that is nowhere.
    """
    of_data = [line for line in overrides if line.startswith("data.")]
    others = [line for line in overrides if not line.startswith("data.")]
    brings = any(line.startswith(SOURCES) for line in of_data)
    plain = compose_conf(conf, others if brings else overrides)
    own = validate(plain.values).evaluate.sets
    added = [name for name in asked if name not in own and name != HELDOUT]
    named = {path.stem for folder in (locate(conf)[0], packaged_confs()) for path in (folder / "sets").glob("*.yaml")}
    for name in added:
        if name not in named:
            raise ConfigError(f"sets={name}: there is no such set{nearest(name, [*own, *sorted(named), HELDOUT])}")
    composed = compose_conf(conf, [*(others if brings else overrides), *_group(added)])
    nodes = {name: node for name, node in validate(composed.values).evaluate.sets.items() if name in asked or not asked}
    if brings:
        name, node = _brought(conf, overrides, of_data)
        nodes = {**({} if not asked else nodes), name: node}
        added.append(name)
    if HELDOUT in asked and nodes:
        raise ConfigError(f"sets={','.join(asked)}: {HELDOUT} are rows of `data` and are evaluated alone")
    if HELDOUT in asked and own:
        raise ConfigError(f"sets={HELDOUT}: this conf has sets of its own{nearest(HELDOUT, list(own))}")
    values: dict[str, Any] = dict(composed.values)
    values["evaluate"] = {**values.get("evaluate", {}), "sets": nodes}
    return validate(values), composed, set(added)


def _group(names: Sequence[str]) -> list[str]:
    return [f"+sets=[{','.join(names)}]"] if names else []


def _brought(conf: str, overrides: Sequence[str], of_data: Sequence[str]) -> tuple[str, Mapping[str, Any]]:
    """The set that the `data.` keys describe, named after its file or data set."""
    data = compose_conf(conf, overrides).values["data"]
    keys = dict.fromkeys(line.partition("=")[0].split(".")[1] for line in of_data)
    node = {key: data[key] for key in keys}
    if "name" in keys and "path" not in keys:
        node["path"] = None
    name = Path(str(node.get("path") or node["name"])).stem.replace(".", "_").replace("*", "")
    taken = (*TRAINING, HELDOUT, "validation", "")
    return (f"{name}_rows" if name in taken else name), node


def to_measure(config: Config, added: set[str]) -> Config:
    """The conf as a measurement needs it. Training rows are read only where they say something of the sets: which
    problems of a `masked` set go, and whether a set that was not the run's own was trained on. Optimizers are left out:
    those of a GPU would be refused on a CPU.
    """
    data = {name: data_of(config, node, f"evaluate.sets.{name}") for name, node in config.evaluate.sets.items()}
    overlaps = {name: one.overlap for name, one in (data or {HELDOUT: config.data}).items()}
    told = any(kind == "masked" or (name in added and kind == "exact") for name, kind in overlaps.items())
    training = tuple(stage for stage in config.stages if stage in TRAINING) if told else ()
    return replace(
        config,
        stages=(*training, "evaluate"),
        sft=replace(config.sft, optim=Optim()),
        grpo=replace(config.grpo, optim=Optim()),
    )
