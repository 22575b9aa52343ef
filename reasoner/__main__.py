"""The command line: `python -m reasoner conf=NAME [key=value ...]`. Errors of the user's end here in one line and
their exit code."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from reasoner import __version__, usage
from reasoner.compose import (
    PackagedConfs,
    annotated_yaml,
    compose_conf,
    groups_in,
    list_confs,
    locate,
    packaged_confs,
    rewrite,
)
from reasoner.config import nearest, validate
from reasoner.errors import ConfigError, ReasonerError, RunFolderError
from reasoner.garbage import importing

VERBS = tuple(usage.VERBS)
HELP = {"--help", "-h"}
OF_HYDRA = ("--multirun", "-m", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 wrong input, 3 a guard stopped it, 130 or 143 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except ReasonerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    if "--version" in arguments:
        print(__version__)
        return 0
    verb = VERBS[0]
    if arguments and not arguments[0].startswith("-") and "=" not in arguments[0]:
        verb = arguments.pop(0)
        if verb not in VERBS:
            raise ConfigError(f"unknown command '{verb}'{nearest(verb, list(VERBS))}")
        if HELP & set(arguments) and not (verb == VERBS[0] and any(one.startswith("conf=") for one in arguments)):
            print(usage.of(verb))
            return 0
    if any(argument.startswith("run=") for argument in arguments):
        arguments = [_meant(argument) for argument in arguments]
    if verb in OF_RUNS:
        return OF_RUNS[verb](arguments)
    overrides, flags = _sort(arguments)
    if verb == "report" and not flags:
        from reasoner.report.command import report

        print(report(overrides))
        return 0
    settings: dict[str, str] = {}
    for override in overrides:
        key, _, settings[key] = override.partition("=")
    conf, run = settings.get("conf"), settings.get("resume")
    if verb == "reward" and conf is None and "run" in settings and not flags:
        return _rescore(settings["run"], [override for override in overrides if not override.startswith("run=")])
    if conf is None and run is not None:
        conf = str(Path(run) / "config.yaml")
        if not Path(conf).expanduser().is_file():
            raise RunFolderError(f"resume={run}: there is no run (no config.yaml) to go on with: name a run's folder")
    if conf is None:
        asked = bool(HELP & set(flags))
        print(f"{usage.general()}\n\nconfs:\n{_listing()}", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    overrides = [override for override in overrides if not override.startswith("conf=")]
    if any(flag.split("=")[0] in (*OF_HYDRA, *HELP) for flag in flags):
        return _hydra(conf, overrides, flags)
    if verb == "data" and not flags:
        return _data(conf, overrides)
    if verb == "reward" and flags in ([], ["--sample"]):
        return _reward(conf, overrides, sample=bool(flags))
    return _train(conf, overrides, show=_wants_listing(flags))


def _meant(argument: str) -> str:
    """The argument with the run that is meant, where it is `run=` and a folder of runs; a line says which."""
    key, _, value = argument.partition("=")
    if key != "run":
        return argument
    from reasoner.run_folder import newest_run

    folder = Path(value).expanduser()
    run = newest_run(folder) if value else None
    if run is None:
        return argument
    print(f"run={value}: the newest of its runs, {run}", file=sys.stderr)
    return f"run={run}"


def _sort(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Overrides, and flags with the value that follows them."""
    overrides: list[str] = []
    flags: list[str] = []
    for argument in arguments:
        takes_value = bool(flags) and flags[-1] in ("--cfg", "-c", "--info", "-i") and "=" not in argument
        (flags if argument.startswith("-") or takes_value else overrides).append(argument)
    return overrides, flags


def _wants_listing(flags: list[str]) -> bool:
    if not flags:
        return False
    if flags in (["--cfg", "job"], ["-c", "job"], ["--cfg=job"]):
        return True
    raise ConfigError(
        f"unknown option '{' '.join(flags)}'{nearest(flags[0], ['--cfg', '--multirun', '--help', '--version'])}"
    )


def _listing() -> str:
    confs = list_confs()
    width = max((len(name) for name, _ in confs), default=0)
    return "\n".join(f"  {name:{width}}  {line}" for name, line in confs)


def _train(conf: str, overrides: list[str], *, show: bool) -> int:
    composed = compose_conf(conf, overrides)
    config = validate(composed.values)
    if show:
        print(annotated_yaml(asdict(config), composed.sources), end="")
        return 0
    with importing():
        from reasoner.pipeline import Pipeline

    Pipeline(config, base_dir=composed.folder, sources=composed.sources).run()
    return 0


def _reward(conf: str, overrides: list[str], *, sample: bool) -> int:
    composed = compose_conf(conf, overrides)
    config = validate(composed.values)
    with importing():
        from reasoner.reward import try_on_samples, try_rewards

    if sample:
        try_on_samples(config, base_dir=composed.folder)
    else:
        try_rewards(config, base_dir=composed.folder, say=print)
    return 0


def _rescore(run: str, overrides: list[str]) -> int:
    from reasoner.reward import rescore_run

    rescore_run(Path(run).expanduser(), overrides, say=print)
    return 0


def _data(conf: str, overrides: list[str]) -> int:
    """Print what data.shown tells, in colours where the terminal has them. Loads a tokenizer and no model."""
    with importing():
        from rich.console import Console as RichConsole
        from rich.text import Text

        from reasoner.console import visible
        from reasoner.data.shown import STYLES, plain, shown
        from reasoner.data.task import load_task
        from reasoner.models.loading import load_tokenizer

    config = validate(compose_conf(conf, overrides).values)
    screen = RichConsole(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
    coloured = screen.is_terminal and screen.color_system is not None
    encoding = sys.stdout.encoding or "utf-8"
    for pieces in shown(load_task(config, load_tokenizer(config.model)), config):
        parts = pieces if coloured else [(plain(pieces), "")]
        line = Text()
        for place, (text, kind) in enumerate(parts):
            line.append(visible(text).encode(encoding, "replace").decode(encoding), STYLES[kind][place % 2])
        screen.print(line)
    return 0


def _eval(arguments: list[str]) -> int:
    from reasoner.evaluation.request import read_request

    request = read_request(arguments)
    if request.compares:
        from reasoner.evaluation.compare import compare

        compare(request)
    else:
        with importing():
            from reasoner.evaluation.measure import measure

        measure(request)
    return 0


def _chat(arguments: list[str]) -> int:
    with importing():
        from reasoner.chat import chat

    chat(arguments)
    return 0


def _init(arguments: list[str]) -> int:
    from reasoner.init import init

    init(arguments)
    return 0


def _export(arguments: list[str]) -> int:
    from reasoner.export.request import read_request

    request = read_request(arguments)
    with importing():
        from reasoner.export.command import export

    export(request)
    return 0


def _serve(arguments: list[str]) -> int:
    from reasoner.serve import serve

    serve(arguments)
    return 0


OF_RUNS = {
    "eval": _eval,
    "chat": _chat,
    "serve": _serve,
    "export": _export,
    "init": _init,
}  # verbs that take a folder, not a conf


def _hydra(conf: str, overrides: list[str], flags: list[str]) -> int:
    """Hydra's own --help, --info and --multirun. Each job of a multirun is a process of its own: a GPU is only given
    back by exiting."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.plugins import Plugins

    folder, name = locate(conf)
    Plugins.instance().register(PackagedConfs)
    codes: list[int] = []

    def job(_: object) -> None:
        command = [sys.executable, "-m", "reasoner", f"conf={conf}", *HydraConfig.get().overrides.task]
        codes.append(subprocess.run(command, check=False).returncode)

    groups = groups_in([folder, packaged_confs()])
    typed = [part for override in overrides for part in rewrite(override, groups)]
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # no log files beside the runs' own
    os.environ["HYDRA_FULL_ERROR"] = "1"  # composition errors then reach us instead of ending in hydra's own report
    sys.argv = ["reasoner", "--config-path", str(folder), "--config-name", name, *typed, *quiet, *flags]
    hydra.main(version_base="1.3")(job)()
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
