"""Weights of a run or a model answered on held-out sets, into a folder like a run's: eval.json, eval_problems.jsonl,
config.yaml, summary.json."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from reasoner import signals, world
from reasoner.assembly import Parts, assemble
from reasoner.compose import packaged_confs
from reasoner.config import Config
from reasoner.console import Console
from reasoner.errors import ConfigError, Interrupted
from reasoner.evaluate import AT, SetResult, paired_gain
from reasoner.evaluation.groups import check_columns, groups_of
from reasoner.evaluation.request import Request
from reasoner.evaluation.sets import compose_sets, to_measure
from reasoner.evaluation.weights import Weights, load_artefact, untrained, weights_of
from reasoner.pipeline import plain
from reasoner.run_folder import RunFolder, conf_of
from reasoner.summary import summary
from reasoner.words import plural

Measured = list[tuple[str, Mapping[str, SetResult]]]


def measure(request: Request, *, functions: Mapping[str, Callable[..., Any]] | None = None, rows: Any = None) -> Path:
    """Evaluate what the request names and return the folder with the results.

    `functions` are the rewards and `rows` the data that the run got from Python. Raises ReasonerError.
    """
    began = time.monotonic()
    conf, overrides = _conf(request)
    config, composed, added = compose_sets(conf, overrides, request.sets)
    at = _samples(request.at, config)
    source = request.runs[0] if request.runs else None
    weights = weights_of(source, config, request.checkpoints) if source else _weights_of_model(request)
    world.start()
    try:
        with signals.handled(), RunFolder.open(_out(request, config)) as folder, Console() as console:
            folder.write_config(yaml.safe_dump(plain(asdict(config)), sort_keys=False, allow_unicode=True))
            parts = assemble(
                to_measure(config, added),
                base_dir=composed.folder,
                functions=functions or {},
                rows=rows,
                console=console,
            )
            with ExitStack() as closing:
                closing.callback(parts.engine.close)
                closing.callback(parts.rewards.close)
                check_columns(request.by, parts.task.sets)
                _warn_of_overlap(parts, added, console)
                measured = _answer(parts, weights, at, folder, console)
            tell(measured, request.by, at, console)
            facts = {"evaluated": str(source or conf), "seed": config.seed, "model_revision": parts.policy.revision}
            folder.write_summary(summary("done", facts, time.monotonic() - began))
            console.say(
                f"each problem's verdict is in {folder.path}: compare it later by eval run={folder.path} run=OTHER"
            )
            return folder.path
    finally:
        world.stop()


def _conf(request: Request) -> tuple[str, list[str]]:
    """The conf to compose, and its overrides with the model that is asked for."""
    if request.runs:
        return str(conf_of(request.runs[0])), list(request.overrides)
    assert request.conf is not None
    return request.conf, [*_model(request.model), *request.overrides]


def _model(name: str | None) -> list[str]:
    """Overrides that choose the model: a group of conf/model, a folder or hub id, or a folder with an adapter."""
    if name is None:
        return []
    if any((folder / "model" / f"{name}.yaml").is_file() for folder in (Path("conf"), packaged_confs())):
        return [f"model={name}"]
    adapter = Path(name).expanduser() / "adapter_config.json"
    if not adapter.is_file():
        return [f"model.name='{name}'", "model.gguf=null", "model.scratch=null", "model.revision=null"]
    told = json.loads(adapter.read_bytes())
    targets = ",".join(told["target_modules"]) if isinstance(told.get("target_modules"), list) else None
    if targets is None:
        raise ConfigError(
            f"model={name}: its adapter names no list of target_modules, so it can't be put on a base here"
        )
    lora = f"r: {told['r']}, alpha: {told['lora_alpha']}, rslora: {str(told.get('use_rslora', False)).lower()}"
    return [f"model.lora={{{lora}, targets: [{targets}]}}"]


def _weights_of_model(request: Request) -> list[Weights]:
    folder = Path(request.model).expanduser() if request.model else None
    if folder is None or not (folder / "adapter_config.json").is_file():
        return [untrained()]
    return [untrained(), Weights("adapter", 1, lambda parts: load_artefact(parts, folder), folder)]


def _samples(at: Sequence[int], config: Config) -> tuple[int, ...]:
    samples = config.evaluate.samples
    if at and max(at) > samples:
        raise ConfigError(f"k={max(at)} asks for more than evaluate.samples={samples}: add evaluate.samples={max(at)}")
    return tuple(at) or default_at(samples)


def default_at(samples: int) -> tuple[int, ...]:
    """The k of pass@k and maj@k where none is asked for: 8, and all samples."""
    return tuple(sorted({k for k in (*AT, samples) if 1 < k <= samples}))


def _out(request: Request, config: Config) -> Path:
    if request.out:
        return Path(request.out).expanduser()
    if not request.runs:
        return Path(config.out)
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folders = (request.runs[0] / "evals" / f"{name}{suffix}" for suffix in chain([""], (f"-{n}" for n in count(2))))
    return next(folder for folder in folders if not folder.exists())  # two may begin in one second


def _warn_of_overlap(parts: Parts, added: set[str], console: Console) -> None:
    for name in sorted(added & parts.task.report.keys()):
        trained = parts.task.report[name].get("overlap_removed_from_training", 0)
        if trained:
            console.say(
                f"warning: problems of {name} are among the training rows ({trained:,} rows over all "
                f"stages), so {name} is not held out for this run"
            )


def _answer(
    parts: Parts, weights: Sequence[Weights], at: Sequence[int], folder: RunFolder, console: Console
) -> Measured:
    """Every set by every one of the weights, written as soon as it is there."""
    measured: Measured = []
    rows: list[dict[str, Any]] = []
    for place, one in enumerate(weights):
        one.load(parts)
        parts.engine.load_adapter(parts.policy.trainable(), one.policy_step)

        def progress(line: str, name: str = one.name) -> None:
            console.status(f"evaluate {name} · {line}")
            signal = signals.requested()
            if signal:
                raise Interrupted(signal, f"interrupted; what was measured is in {folder.path}")

        found = parts.evaluator.run(parts.engine, parts.task.sets, policy_step=one.policy_step, progress=progress)
        for name, result in found.items():
            removed = parts.task.report[name]["overlap_removed"]  # of the set; training is over
            artefact = str(one.artefact) if one.artefact else None
            rows.append(result.row(one.name, place, overlap_removed=removed, artefact=artefact, at=at))
            folder.append_eval_problems(result.problem_rows(one.name, place))
            problems = plural(len(result.problems), "problem")
            console.status(f"evaluate {one.name} · {name} {result.accuracy:.1%} greedy of {problems}", last=True)
        folder.write_eval(rows)
        measured.append((one.name, found))
    return measured


def tell(measured: Measured, by: Sequence[str], at: Sequence[int], console: Console) -> None:
    """The tables, a set's and those by column, then each row against the first in words."""
    shown: list[dict[str, Any]] = []
    for column in ("", *by):
        for place, (name, found) in enumerate(measured):
            for result in found.values():
                parts = groups_of(result, column) if column else {result.name: result}
                shown += [part.row(name, place, at=at) for part in parts.values()]
    first, before = measured[0]
    said = [
        f"{name} against {first} on {of}: {gain(before[of], found[of])}"
        for name, found in measured[1:]
        for of in found
        if of in before
    ]
    console.table(shown, said)


def gain(before: SetResult, after: SetResult) -> str:
    """The paired change in words, with the counts that it comes from."""
    found = paired_gain(before.problems, after.problems)
    return f"{found}; {found.gained:,} gained, {found.lost:,} lost, McNemar p = {found.p_value:.2g}"
