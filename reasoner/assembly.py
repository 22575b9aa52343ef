"""Everything a run needs, made in order of cost: checks that load nothing, then data, then rewards, then the model.

So whatever the user handed in wrong is said in seconds, before gigabytes are read.
"""

import gc
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reasoner.config import Config
from reasoner.console import Console
from reasoner.data.columns import ColumnTemplate
from reasoner.data.task import Task, load_task
from reasoner.errors import ConfigError, ModelError
from reasoner.evaluate import Evaluator, accuracy_part
from reasoner.garbage import uncollected
from reasoner.grpo.ledger import Ledger
from reasoner.grpo.losses import Loss
from reasoner.memory import MemoryPlan, plan_memory
from reasoner.models.loading import load_model, load_tokenizer, recompute_layers
from reasoner.models.nf4 import shape_of
from reasoner.models.policy import Policy
from reasoner.models.sources import check_model, context_limit
from reasoner.models.stops import stop_ids
from reasoner.models.untrained import untrained_tokens
from reasoner.rewards.base import Rewards, load_rewards
from reasoner.rewards.rehearsal import rehearse
from reasoner.rollout.choice import choose, make_engine, obstacle, refusal, samples_from_base
from reasoner.rollout.engine import Engine
from reasoner.rollout.platform import engine_environment
from reasoner.types import Completion, Prompt

REHEARSED = 8  # prompts whose gold completions are scored before the model loads
GOLD_FORMS = ("{answer}", "#### {answer}", "\\boxed{{{answer}}}", "<answer>{answer}</answer>")
NO_CONTEXT_LIMIT = 1 << 30

EngineMaker = Callable[..., Engine]  # called as make(policy, decode, max_context=tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The parts of one run."""

    config: Config
    tokenizer: Any
    task: Task
    rewards: Rewards
    policy: Policy
    engine: Engine
    stop_ids: tuple[int, ...]
    evaluator: Evaluator
    memory: MemoryPlan | None  # of the card, where the engine keeps a cache on it
    loss: Loss | None = None  # in place of grpo.loss


def check_before_loading(config: Config) -> None:
    """Refuse what this machine or model can't do, all of it in one error, each with the override that helps."""
    refused: list[str] = []
    try:
        check_model(config.model)
    except ModelError as error:
        refused.append(str(error))
    refused += [
        f"{stage}.optim uses bitsandbytes' 8-bit states, which need a CUDA GPU: optim@{stage}.optim=adamw"
        for stage in ("sft", "grpo")
        if stage in config.stages and not _optimizer_runs_here(getattr(config, stage).optim.optimizer)
    ]
    if config.rollout.engine == "vllm" and (why := obstacle(config)):
        refused.append(refusal(why))
    if refused:
        raise ConfigError("; ".join(refused))
    if "grpo" in config.stages:
        make_ledger(config)
    limit = context_limit(config.model)
    longest = config.data.max_prompt_tokens + config.grpo.max_completion_tokens
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} and grpo.max_completion_tokens="
            f"{config.grpo.max_completion_tokens} together exceed the model's context of {limit} tokens: lower one"
        )


def make_ledger(config: Config) -> Ledger | None:
    """The ledger of `grpo.ledger`, with what its file holds. Raises ConfigError if that is none, or not this run's."""
    if config.grpo.ledger is None:
        return None
    part = accuracy_part(config)
    about = {"model": config.model.name, "reward": f"{part}: {config.reward.parts[part].fn}"}
    ledger = Ledger(Path(config.grpo.ledger).expanduser(), about)
    ledger.read()
    return ledger


def _optimizer_runs_here(optimizer: Mapping[str, Any]) -> bool:
    return torch.cuda.is_available() or not str(optimizer.get("_target_", "")).startswith("bitsandbytes")


@uncollected()
def assemble(
    config: Config,
    *,
    base_dir: Path,
    functions: Mapping[str, Callable[..., Any]],
    rows: Iterable[Mapping[str, Any]] | None,
    console: Console,
    make_own_engine: EngineMaker | None = None,
) -> Parts:
    """All parts of a run, with a line said about each. Raises the InputError of whatever is wrong first."""
    check_before_loading(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(config.model)
    task = load_task(config, tokenizer, rows)
    for line in task.lines():
        console.say(line)
    rewards = load_rewards(config.reward, functions=functions, base_dir=base_dir, columns=task.columns())
    for line in rewards.notices:
        console.say(line)
    try:
        _rehearse(config, rewards, task, console)
        engine_rows = make_own_engine is None and samples_from_base(config)
        policy = load_model(config.model, tokenizer, seed=config.seed, engine_rows=engine_rows)
    except BaseException:
        rewards.close()
        raise
    console.say(_described(config, policy))
    for note in policy.notes:
        console.say(f"note: {note}")
    stops = stop_ids(tokenizer, task.template, policy.model)
    untrained = untrained_tokens(policy, stops)
    if untrained and not config.model.scratch:
        console.say(
            f"warning: {config.model.name} never learned the stop tokens "
            f"{tokenizer.convert_ids_to_tokens(untrained)}, so completions may run to the limit: set "
            "data.template=plain, or train all weights with model.lora=null"
        )
    try:
        engine, memory = _sampler(config, policy, task, console, make_own_engine)
    except BaseException:
        rewards.close()
        raise
    evaluator = Evaluator(config, rewards, stops)
    return Parts(config, tokenizer, task, rewards, policy, engine, stops, evaluator, memory)


def _sampler(
    config: Config, policy: Policy, task: Task, console: Console, make_own: EngineMaker | None
) -> tuple[Engine, MemoryPlan | None]:
    """The engine, and how the card's memory is divided where it keeps a cache there."""
    gc.collect()  # of loading; it may hold memory that is divided now
    limit = context_limit(config.model) or NO_CONTEXT_LIMIT
    if make_own is not None:
        _recompute(config, policy)
        engine = make_own(policy, task.template.decode, max_context=limit)
        console.say(f"rollout.engine: {engine.capabilities.name}, handed in from Python; it plans its own memory")
        return engine, None
    name, chosen = choose(config, policy)
    console.say(chosen)
    if name == "hf":
        _recompute(config, policy)
        return make_engine(name, config, policy, task.template.decode, max_context=limit), None
    plan = plan_memory(config, policy, max_context=limit)
    for line in plan.lines():
        console.say(line)
    _, needed = engine_environment(platform.release())
    if needed:
        console.say(needed)
    sizes: Any = {"max_context": plan.longest, "kv_bytes": plan.kv_bytes, "dequantize": plan.dequantized > 0}
    engine = make_engine(name, config, policy, task.template.decode, **sizes)
    return engine, plan


def _recompute(config: Config, policy: Policy) -> None:
    """`gradient_checkpointing=auto` where no plan says what fits."""
    if config.model.gradient_checkpointing == "auto" and policy.device.type == "cuda":
        recompute_layers(policy.base, config.model.name)


def _closed(prefill: str) -> str:
    """What ends a thought that the template opened, so that an answer can follow."""
    return "</think>\n" if prefill.rstrip().endswith("<think>") else ""


def _described(config: Config, policy: Policy) -> str:
    total = sum(shape_of(weight).numel() for weight in policy.model.parameters())
    trained = sum(weight.numel() for weight in policy.trainable().values())
    revision = f" at {policy.revision}" if policy.revision else ""
    dtype = str(policy.head_weight.dtype).removeprefix("torch.")
    return (
        f"model {config.model.name}{revision}: {total / 1e6:.1f}M parameters, {trained / 1e6:.1f}M of them trained, "
        f"{dtype} on {policy.device}"
    )


def _rehearse(config: Config, rewards: Rewards, task: Task, console: Console) -> None:
    """Score gold and bad completions. Only a part that is named as the accuracy must give gold full marks."""
    part = accuracy_part(config)
    golds = gold_completions(rewards, task, part, config.data.completion)
    strict = part if part == "accuracy" or config.evaluate.accuracy else None
    for line in rehearse(rewards, golds, accuracy=strict):
        console.say(f"warning: {line}")
    worked = _worked(task)
    earned = _earned(rewards, worked, part)
    for line in rewards.costs():
        console.say(f"{line} (the rehearsal)")
    if strict and earned < len(worked):
        console.say(
            f"note: {len(worked)} worked examples earn {earned:g} from the reward part '{part}': SFT will teach what "
            "GRPO does not reward"
        )


def gold_completions(rewards: Rewards, task: Task, part: str, written: str | None = None) -> list[tuple[Prompt, str]]:
    """Prompts with a right completion: the answer in the form that earns most, or the worked one where that does.

    `written` is data.completion, which says what is right where no SFT reads it.
    """
    prompts = task.first_prompts(REHEARSED)
    told = [
        [(prompt, _closed(prompt.prefill) + form.format(answer=prompt.answer)) for prompt in prompts]
        for form in GOLD_FORMS
    ]
    if written:
        form = ColumnTemplate(written, "data.completion")
        whole = [prompt for prompt in prompts if all(form.has(prompt.columns, column) for column in form.columns)]
        told.append([(prompt, _closed(prompt.prefill) + form.fill(prompt.columns)) for prompt in whole])
    return max([*told, _worked(task)], key=lambda golds: _earned(rewards, golds, part))


def _worked(task: Task) -> list[tuple[Prompt, str]]:
    """The first worked examples of SFT, as prompts with the text of their completions."""
    return [(e.prompt, task.template.decode(e.completion_ids[:-1])) for e in task.examples[:REHEARSED]]


def _earned(rewards: Rewards, golds: Sequence[tuple[Prompt, str]], part: str) -> float:
    completions = [Completion((0,), (True,), (0.0,), text, "stop", 0, 0) for _, text in golds]
    scores = rewards.score([prompt for prompt, _ in golds], completions, only=part)
    return sum(score.parts.get(part, 0.0) for score in scores)
