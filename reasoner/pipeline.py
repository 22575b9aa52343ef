"""From a checked config to a finished run: the folder, the checkpoint to go on from, the parts, the stages, and how
it ended.

`train` is the same from Python.
"""

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from reasoner import checkpoint, signals, world
from reasoner.assembly import EngineMaker, assemble
from reasoner.compose import compose_conf, leaves, source_of
from reasoner.config import Config, data_of, validate
from reasoner.console import Console
from reasoner.errors import ConfigError, GuardTripped, Interrupted, ReasonerError
from reasoner.grpo.losses import Loss
from reasoner.intervals import Gain
from reasoner.redact import Redactor
from reasoner.report.flags import HINTED
from reasoner.report.write import REPORT, REPORT_ERROR, write_report
from reasoner.results import Results
from reasoner.resume import check_resume
from reasoner.rewards.base import Rewards
from reasoner.run import Run, Saved
from reasoner.run_folder import EVAL, EVAL_PROBLEMS, METRICS, RunFolder, read_config, read_rows
from reasoner.summary import notes_of, summary
from reasoner.tracking import close_all, make_trackers


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run leaves: its folder, the rows of eval.json, and the gains between them as `Results.gains`
    gives them."""

    out: Path
    rows: tuple[Mapping[str, Any], ...]
    gains: Mapping[tuple[str, str, str], Gain]


def train(
    conf: str,
    *,
    overrides: Sequence[str] = (),
    reward: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
    loss: Loss | None = None,
    engine: EngineMaker | None = None,
    callback: Callable[[Mapping[str, Any]], object] | None = None,
) -> RunResult:
    """Run `conf` (a name or a .yaml file) with overrides as on the command line.

    `reward` is a function, or several by name, in place of the conf's own; `data` is an iterable of rows in place of
    `data.path` and `data.name`; `loss` (LossInputs -> LossOutput) in place of `grpo.loss`; `engine` makes what samples:
    `engine(policy, decode, max_context=tokens)` gives an Engine. `callback` is called with each row of metrics.jsonl
    once it is written, on every rank, and may stop the run by raising GuardTripped: the step is saved first, to go on
    from; what else it raises is passed on.
    What Python handed in has to be handed in again on resume. Raises ReasonerError: InputError, GuardTripped or
    Interrupted.
    """
    composed = compose_conf(conf, overrides)
    values = dict(composed.values)
    functions: dict[str, Callable[..., Any]] = {}
    if reward is not None:
        functions = dict(reward) if isinstance(reward, Mapping) else {"reward": reward}
        values["reward"] = {**values["reward"], "parts": {name: {"fn": name} for name in functions}}
    if loss is not None:
        values["grpo"] = {**values["grpo"], "loss": {"_target_": _named(loss)}}
    pipeline = Pipeline(
        validate(values),
        base_dir=composed.folder,
        sources=composed.sources,
        functions=functions,
        rows=data,
        loss=loss,
        make_own_engine=engine,
        callback=callback,
    )
    return pipeline.run()


def _named(loss: Loss) -> str:
    """Where a loss is defined, for config.yaml."""
    kind = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{kind.__module__}.{kind.__qualname__}"


@dataclass(frozen=True, slots=True, eq=False)
class Pipeline:
    """A run to be made: a checked config, where it came from, and what Python handed in."""

    config: Config
    base_dir: Path
    sources: Mapping[str, str] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    rows: Iterable[Mapping[str, Any]] | None = None
    wrap_rewards: Callable[[Rewards], Rewards] | None = (
        None  # for controls: what the run scores with, given its rewards
    )
    loss: Loss | None = None
    make_own_engine: EngineMaker | None = None
    callback: Callable[[Mapping[str, Any]], object] | None = None

    def run(self) -> RunResult:
        """Go through the stages. A ReasonerError is passed on, after summary.json says how the run ended."""
        began = time.monotonic()
        _check_validation(self.config)
        _check_offload(self.config)
        world.start()
        try:
            source = Path(self.config.resume.dir) if self.config.resume.dir else None
            saved = Saved(*checkpoint.load(checkpoint.newest(source))) if source else None
            with (
                signals.handled(),
                RunFolder.open(Path(self.config.out), resume=source) as folder,
                Console() as console,
            ):
                facts: dict[str, Any] = {"stages": [], "model_revision": None, "seed": self.config.seed}
                facts["notes"] = console.notes
                try:
                    return self._run(folder, console, saved, facts, began)
                except ReasonerError as error:
                    facts["ended_by"] = str(error)
                    folder.write_summary(summary(ending(error), facts, time.monotonic() - began))
                    self._report(folder, console)
                    raise
        finally:
            world.stop()

    def _run(
        self, folder: RunFolder, console: Console, saved: Saved | None, facts: dict[str, Any], began: float
    ) -> RunResult:
        results = Results() if saved is None else self._go_on(folder, console, saved)
        folder.write_config(yaml.safe_dump(plain(asdict(self.config)), sort_keys=False, allow_unicode=True))
        self._say_choices(console)
        parts = assemble(
            self.config,
            base_dir=self.base_dir,
            functions=self.functions,
            rows=self.rows,
            console=console,
            make_own_engine=self.make_own_engine,
        )
        parts = replace(parts, loss=self.loss)
        if self.wrap_rewards:
            parts = replace(parts, rewards=self.wrap_rewards(parts.rewards))
        facts["model_revision"] = parts.policy.revision
        if parts.memory:
            facts["memory_parts"] = parts.memory.parts_gib()
        trackers = make_trackers(self.config.tracking, folder.path, config=plain(asdict(self.config)), say=console.say)
        run = Run(parts, folder, console, trackers, results, facts["stages"], callback=self.callback)
        with ExitStack() as closing:  # each, whatever another one raises
            closing.callback(close_all, trackers)
            closing.callback(parts.rewards.close)
            closing.callback(lambda: [console.say(line) for line in parts.rewards.costs()])
            try:
                run.go_through(saved)
            except torch.AcceleratorError as error:  # every call to the card would fail, the engine's closing too
                raise GuardTripped(_card_failed(error, run.how_to_go_on())) from error
            except BaseException:
                closing.callback(parts.engine.close)
                raise
            closing.callback(parts.engine.close)
        console.table(results.rows, results.sentences())
        folder.write_summary(summary("done", facts, time.monotonic() - began))
        self._report(folder, console)
        console.say(f"the whole run is in {folder.path}")
        return RunResult(folder.path, tuple(results.rows), results.gains())

    def _go_on(self, folder: RunFolder, console: Console, saved: Saved) -> Results:
        """What the run had measured by its checkpoint, once the settings are found to fit it."""
        source = Path(str(self.config.resume.dir))
        old = _settings_of(source)
        for line in check_resume(old, plain(asdict(self.config)), self.config.resume.allow, saved.progress):
            console.say(f"changed: {line}")
        console.notes.extend(notes_of(source))
        folder.cut_back(saved.progress.stage_index, saved.progress.step)
        console.say(f"going on from {saved.progress.name}")
        problems = folder.path / EVAL_PROBLEMS
        results = Results.from_files(folder.eval_rows(), read_rows(problems) if problems.exists() else ())
        if world.is_main():
            best = results.best(saved.progress.stage_index)  # of those before this checkpoint
            needed = {best.name} if best else set()  # the stage ends with it, whatever eval_every is now
            if self.config.grpo.eval_every:  # this one may be measured too, and be the best
                needed.add(saved.progress.name)
            for name in needed:
                checkpoint.bring(source, folder.path, name)
        world.barrier()
        return results

    def _report(self, folder: RunFolder, console: Console) -> None:
        """Write the page about the run. An error of ours there is told and kept, but can't make a good run a failed
        one."""
        measured = any((folder.path / name).exists() for name in (METRICS, EVAL))
        if not world.is_main() or not measured:
            return
        try:
            signs = write_report([folder.path], folder.path / REPORT)
        except ReasonerError as error:
            console.say(f"no report: {error}; write it later with: python -m reasoner report run={folder.path}")
        except Exception as error:  # noqa: BLE001 - a mistake in a page must not cost the exit code of a night's training
            kept = folder.path / REPORT_ERROR
            kept.write_text(Redactor.from_environment().text(traceback.format_exc()), encoding="utf-8")
            console.say(
                f"the report could not be written ({type(error).__name__}: {error}); the run's files are whole. Please "
                f"report this with {kept}"
            )
        else:
            for sign in signs:
                if sign not in HINTED.values():  # those were said at their steps
                    console.say(f"warning: {sign[0].lower()}{sign[1:]}; the report tells more")
            console.say(f"report: {folder.path / REPORT}")

    def _say_choices(self, console: Console) -> None:
        """What the row of conf/card chose, each value with its key."""
        chosen = [
            f"{key}={value}"
            for key, value in leaves(asdict(self.config))
            if source_of(key, self.sources).startswith("conf/card/")
        ]
        if chosen:
            console.say(f"card: {' '.join(chosen)}")


def _settings_of(source: Path) -> Mapping[str, Any]:
    """What a run was set to. A key that came since has its default, and no key that went is lost: check_resume names
    it."""
    found = read_config(source)
    try:
        return plain(asdict(validate(found)))
    except ConfigError:
        return found


def _check_validation(config: Config) -> None:
    """Raises ConfigError where a new run would keep rows from training to choose by, and never choose. One that goes on
    may: its rows are fixed, and eval_every is not."""
    rows = data_of(config, config.grpo.data, "grpo.data").validation
    if rows and "grpo" in config.stages and not config.grpo.eval_every and not config.resume.dir:
        raise ConfigError(
            f"data.validation={rows:g} keeps rows from training to choose a checkpoint by, and nothing chooses: set "
            "grpo.eval_every=50 too, or leave data.validation out"
        )


def _check_offload(config: Config) -> None:
    """Raises ConfigError where layers' inputs would leave a GPU that is not there. Who only loads the model of such a
    run, to measure it, to export it or to talk to it, needs none."""
    trains = "sft" in config.stages or "grpo" in config.stages
    if trains and config.model.gradient_checkpointing == "offload" and not torch.cuda.is_available():
        raise ConfigError(
            "model.gradient_checkpointing=offload moves what layers keep from a GPU to the host, and there is no CUDA "
            "GPU: set it to true"
        )


def _card_failed(error: Exception, how_to_go_on: str) -> str:
    first = str(error).splitlines()[0]
    remedy = "If it happens again at the same step, look at the driver's log (dmesg) and the card's temperature"
    if "out of memory" in first:
        remedy = "Raise rollout.keep_free_gib, or lower rollout.kv_gib or tokens_per_micro_batch"
    return f"the GPU failed: {first}. What this process had on it is lost; {how_to_go_on}. {remedy}"


def ending(error: ReasonerError) -> str:
    """The status in summary.json of a run that an error ended."""
    if isinstance(error, Interrupted):
        return "interrupted"
    return "stopped by a guard" if isinstance(error, GuardTripped) else "failed"


def plain(value: Any) -> Any:
    """The value as YAML writes it: tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
