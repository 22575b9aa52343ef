"""`python -m reasoner reward conf=NAME`: the rewards tried on the conf's own rows, in seconds, without a model."""

from collections.abc import Callable
from pathlib import Path

from reasoner.assembly import all_prompts, gold_completions
from reasoner.config import Config
from reasoner.data.task import load_task
from reasoner.errors import RewardError
from reasoner.evaluate import accuracy_part
from reasoner.models.loading import load_tokenizer
from reasoner.rewards.base import load_rewards
from reasoner.rewards.trial import breaks, notes, shown, table, try_out


def try_rewards(config: Config, *, base_dir: Path, say: Callable[[str], None]) -> None:
    """Say what each part gives to gold, empty, wrong, random and shuffled completions, how long it takes, and which of
    them break the rule of trial.py. Raises RewardError where one does or fails, and what loading the rows raises.
    """
    task = load_task(config, load_tokenizer(config.model), None)
    prompts = all_prompts(task)
    columns = set(prompts[0].columns).intersection(*(prompt.columns for prompt in prompts))
    part = accuracy_part(config)
    strict = part if part == "accuracy" or config.evaluate.accuracy else None
    with load_rewards(config.reward, functions={}, base_dir=base_dir, columns=columns) as rewards:
        golds = gold_completions(rewards, task, part)
        tried = try_out(rewards, golds, seed=config.seed)
        say(f"the rewards of conf={config.name}, tried on {len(golds)} rows; no model was loaded")
        for line in table(tried, rewards):
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
