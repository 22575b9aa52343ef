"""`python -m reasoner reward`: a conf's rewards tried on its own rows without a model, or on what its model says now,
or on what a run said."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from reasoner.assembly import assemble, gold_completions
from reasoner.compose import compose_conf
from reasoner.config import Config, validate
from reasoner.console import Console, sample_lines
from reasoner.data.task import load_task
from reasoner.errors import RewardError
from reasoner.evaluate import accuracy_part
from reasoner.grpo.advantages import has_signal
from reasoner.grpo.trainer import sampling_of
from reasoner.models.loading import load_tokenizer
from reasoner.rescoring import lines, rescore
from reasoner.rewards.base import Rewards, load_rewards
from reasoner.rewards.trial import breaks, mean_cell, notes, shown, table, try_out
from reasoner.rollout.single_turn import rollout
from reasoner.run_folder import conf_of
from reasoner.types import Completion, Group, Prompt
from reasoner.words import plural

Say = Callable[[str], None]
SAMPLED = 8  # prompts


def try_rewards(config: Config, *, base_dir: Path, say: Say) -> None:
    """Say what each part gives to gold, empty, wrong, random and shuffled completions, how long it takes, and which of
    them break the rule of trial.py. Raises RewardError where one does or fails, and what loading the rows raises.
    """
    task = load_task(config, load_tokenizer(config.model), None)
    part = accuracy_part(config)
    strict = part if part == "accuracy" or config.evaluate.accuracy else None
    with load_rewards(config.reward, functions={}, base_dir=base_dir, columns=task.columns()) as rewards:
        for line in rewards.notices:
            say(line)
        golds = gold_completions(rewards, task, part, config.data.completion)
        tried = try_out(rewards, golds, seed=config.seed)
        say(f"the rewards of conf={config.name}, tried on {len(golds)} rows; no model was loaded")
        for line in [*table(tried, rewards), *rewards.costs()]:
            say(line)
    for line in notes(tried):
        say(line)
    broken = breaks(tried, strict)
    if broken:
        say("these break the rule that a gold completion earns full marks and every other one less:")
        for line in shown(broken):
            say(line)
        raise RewardError(
            f"{len(broken)} of {len(tried)} completions break the rule: make data.answer, data.answer_kind and the "
            "reward agree, or weigh its parts so that a right completion always earns more"
        )
    say("every gold completion earns full marks, and every other one less")


def try_on_samples(config: Config, *, base_dir: Path) -> None:
    """Sample a group of completions for the first prompts from the conf's model as it is before any training, and say
    what each earns: is there anything to learn from? Raises what a run's start raises.
    """
    config = replace(config, evaluate=replace(config.evaluate, samples=0))
    with Console() as console:
        parts = assemble(config, base_dir=base_dir, functions={}, rows=None, console=console)
        try:
            prompts = parts.task.first_prompts(SAMPLED)
            sampling = sampling_of(config, parts.stop_ids)
            console.status(f"{config.model.name} answers {plural(len(prompts), 'prompt')}")
            said = rollout(
                prompts, lambda ps, heard: parts.engine.generate(ps, sampling, policy_step=0, finished=heard)
            )
            groups = _groups(parts.rewards, prompts, said)
        finally:
            parts.engine.close()
            parts.rewards.close()
        n = len(groups[0].completions)
        console.say(
            f"what {config.model.name} says before any training: {plural(len(groups), 'prompt')}, "
            f"{plural(n, 'completion')} each"
        )
        for group in groups:
            for line in sample_lines(group):
                console.say(line)
        for line in earnings(groups, config):
            console.say(line)


def _groups(rewards: Rewards, prompts: Sequence[Prompt], said: Sequence[Sequence[Completion]]) -> list[Group]:
    """The completions of each prompt with what they earn."""
    return [
        Group(prompt, tuple(several), tuple(rewards.score([prompt] * len(several), several)))
        for prompt, several in zip(prompts, said, strict=True)
    ]


def earnings(groups: Sequence[Group], config: Config) -> list[str]:
    """Each part's mean over the completions that it applies to, its failures, and what there is to learn from."""
    pairs = [pair for group in groups for pair in zip(group.completions, group.scores, strict=True)]
    told = [f"{'part':20} {'weight':>7} {'mean':>8} {'failed':>7}"]
    for name, part in config.reward.parts.items():
        values = [score.parts[name] for _, score in pairs if name in score.parts]
        failed = sum(name in score.failures for _, score in pairs)
        told.append(f"{name:20} {part.weight:7g} {mean_cell(values)} {failed:7,}")
    valid = [score.total for _, score in pairs if not score.failed]
    told.append(f"{'total':20} {'':7} {mean_cell(valid)} {len(pairs) - len(valid):7,}")
    cut = sum(completion.finish_reason == "length" for completion, _ in pairs)
    told.append(f"completions cut at grpo.max_completion_tokens: {cut:,} of {len(pairs):,}")
    signal = sum(map(has_signal, groups))
    told.append(f"groups with a signal: {signal:,} of {len(groups):,}; practice learns from these alone")
    return told


def rescore_run(run: Path, overrides: Sequence[str], *, say: Say) -> None:
    """Say what a run's completions would have earned under the overrides, and how their advantages would have changed.
    Raises RunFolderError without a run or its completions, RewardError for rewards that can't be had.
    """
    config, folder = _as_asked(str(conf_of(run)), overrides)
    for line in lines(run, config, rescore(run, config, base_dir=folder)):
        say(line)


def _as_asked(conf: str, overrides: Sequence[str]) -> tuple[Config, Path]:
    """A run's conf under the overrides, and the folder of its files. A group of conf/reward takes the place of the
    run's rewards: what a run wrote down has no groups to choose from, so the group is composed beside it.
    """
    named = [line for line in overrides if line.startswith("reward=") and ":" not in line]
    beside = [line for line in overrides if named and line.startswith("reward.")]
    composed = compose_conf(conf, [line for line in overrides if line not in (*named, *beside)])
    values = dict(composed.values)
    if named:
        limit = f"grpo.max_completion_tokens={values['grpo']['max_completion_tokens']}"
        values["reward"] = compose_conf("base", [*(f"+{line}" for line in named), *beside, limit]).values["reward"]
    return validate(values), composed.folder
