"""TRL's side of benchmarks/beside_trl.py: its GRPOTrainer on our task's prompts, timed by wrapping its methods.

TRL 1.16 and vLLM are imported only when the side runs. Left out: TRL's other vLLM mode (a server of its own).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from reasoner.compose import compose_conf
from reasoner.config import Config, validate
from reasoner.data.order import Order
from reasoner.data.task import Task, load_task
from reasoner.models.loading import load_tokenizer
from reasoner.rewards.math import accuracy

if TYPE_CHECKING:
    from benchmarks.beside_trl import Record

SHARE_AT_DEFAULTS, SHARE_TUNED = 0.2, 0.1  # of the card, for vLLM; tuned the cache has its own size
MICRO_AT_DEFAULTS = 64
MAX_LENGTH = 640  # tokens that vLLM allows for prompt and completion
BFLOAT16_BYTES = 2
# Faster than vLLM's default compilation on this task, and what our own engine uses.
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


class Spans:
    """Seconds by name, each without what was measured inside it; wraps methods of living objects."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def wrap(self, owner: Any, method: str, name: str, *, only: Callable[[], bool] = lambda: True) -> None:
        """Measure the owner's method under this name, where `only` allows it."""
        original = getattr(owner, method)

        def measured(*arguments: Any, **named: Any) -> Any:
            if not only():
                return original(*arguments, **named)
            _finish_gpu_work()
            began = time.perf_counter()
            self._inner.append(0.0)
            try:
                return original(*arguments, **named)
            finally:
                _finish_gpu_work()
                spent = time.perf_counter() - began
                self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
                self._inner[-1] += spent

        setattr(owner, method, measured)


def _finish_gpu_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Counter:
    """TRL's reward function: ours on each text. Keeps the mean of the last step and its tokens."""

    __name__ = "accuracy"

    def __init__(self) -> None:
        self.mean, self.tokens = float("nan"), 0

    def __call__(
        self, completions: Sequence[str], answer: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        """A reward for each completion."""
        scores = [accuracy(text, gold) for text, gold in zip(completions, answer, strict=True)]
        self.mean, self.tokens = sum(scores) / len(scores), sum(len(ids) for ids in completion_ids)
        return scores


def trl_side(given: argparse.Namespace, record: "Record") -> None:
    """TRL's steps."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_FLASHINFER_SAMPLER"):
        os.environ.setdefault(name, "0")
    for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"):
        os.environ.setdefault(name, "1")
    from benchmarks.beside_trl import settings

    config = validate(compose_conf("smol", settings(given, "none")).values)
    tokenizer = load_tokenizer(config.model)
    record.mark("imports")
    task = load_task(config, tokenizer)
    record.mark("data")
    trainer, judge = make_trainer(given, record, config, task, tokenizer)
    spans = Spans()
    spans.wrap(trainer, "_generate_and_score_completions", "other")
    spans.wrap(trainer, "_calculate_rewards", "reward")
    spans.wrap(trainer, "_get_per_token_logps_and_entropies", "logprobs", only=lambda: not torch.is_grad_enabled())
    if given.trial:
        spans.wrap(trainer, "_generate_single_turn", "generate")
    else:
        sampler = trainer.vllm_generation
        record.set(kv_gib=cache_gib(sampler.llm))
        spans.wrap(sampler, "generate", "generate")
        spans.wrap(sampler, "sync_weights", "sync")
        tell_first_sample(sampler, record)
    trainer.add_callback(make_watch(given, record, trainer, spans, judge, task))
    trainer.train()


def make_trainer(
    given: argparse.Namespace, record: "Record", config: Config, task: Task, tokenizer: Any
) -> tuple[Any, Counter]:
    """The trainer, with our settings under TRL's names, and its reward function."""
    if not given.trial:
        use_our_graphs(given)
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    record.mark("imports")
    steps = given.natural + given.fixed
    numbers = Order(len(task.prompts), config.seed).take(0, steps * config.grpo.prompts_per_step)
    prompts = [task.prompts[i] for i in numbers]
    rows = Dataset.from_list([{"prompt": prompt.text, "answer": prompt.answer} for prompt in prompts])
    theirs = tokenizer([prompt.text for prompt in prompts])["input_ids"]
    equal = all(tuple(a) == b.token_ids for a, b in zip(theirs, prompts, strict=True))
    options = trl_options(given, config, steps)
    record.set(settings={**options, "output_dir": "DIR"}, prompt_ids_equal_ours=equal)
    lora = config.model.lora
    assert lora is not None
    judge = Counter()
    trainer = GRPOTrainer(
        model=str(given.model),
        reward_funcs=[judge],
        args=GRPOConfig(**options),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=lora.r, lora_alpha=int(lora.alpha), target_modules=list(lora.targets), task_type="CAUSAL_LM"
        ),
    )
    record.mark("trainer, model and vLLM")
    return trainer, judge


def trl_options(given: argparse.Namespace, config: Config, steps: int) -> dict[str, Any]:
    """GRPOConfig's arguments for this side."""
    grpo, tuned = config.grpo, given.side == "trl-tuned"
    completions = grpo.prompts_per_step * grpo.completions_per_prompt
    micro = min(given.micro if tuned else MICRO_AT_DEFAULTS, completions)
    cuda = torch.cuda.is_available()
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="trl-"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": completions // micro,
        "num_generations": grpo.completions_per_prompt,
        "max_completion_length": grpo.max_completion_tokens,
        "temperature": config.rollout.temperature,
        "learning_rate": grpo.optim.lr,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": grpo.optim.warmup_steps,
        "max_grad_norm": grpo.optim.max_grad_norm,
        "adam_beta2": 0.99,
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused" if cuda else "adamw_torch",
        "beta": grpo.kl_coef,
        "loss_type": "dapo",
        "epsilon": grpo.loss["clip_low"],
        "epsilon_high": grpo.loss["clip_high"],
        "shuffle_dataset": False,
        "max_steps": steps,
        "seed": config.seed,
        "bf16": cuda,
        "model_init_kwargs": {"dtype": "bfloat16" if cuda else "float32"},
        "gradient_checkpointing": tuned,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_vllm": not given.trial,
    }
    if not given.trial:
        options |= {
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": SHARE_TUNED if tuned else SHARE_AT_DEFAULTS,
            "vllm_enable_sleep_mode": tuned,
            "vllm_max_model_length": MAX_LENGTH,
        }
    return options


def use_our_graphs(given: argparse.Namespace) -> None:
    """Let TRL make its vLLM with our CUDA graphs, and when tuned with a cache of the same bytes as ours."""
    import trl.generation.vllm_generation as vllm_generation  # pyright: ignore[reportMissingImports]

    made = vllm_generation.LLM
    more: dict[str, Any] = {"compilation_config": GRAPHS}
    if given.side == "trl-tuned":
        more["kv_cache_memory_bytes"] = int(given.kv_gib * 2**30)
    vllm_generation.LLM = lambda *arguments, **named: made(*arguments, **named, **more)


def cache_gib(llm: Any) -> float | None:
    """GiB of vLLM's cache: its blocks, each with the keys and values of so many tokens. None if it does not say."""
    try:
        settings, model = llm.llm_engine.vllm_config.cache_config, llm.llm_engine.model_config.hf_text_config
        tokens = settings.num_gpu_blocks * settings.block_size
    except (AttributeError, TypeError) as error:
        print(f"vLLM does not say how large its cache is: {error}")
        return None
    width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return tokens * 2 * model.num_hidden_layers * model.num_key_value_heads * width * BFLOAT16_BYTES / 2**30


def tell_first_sample(sampler: Any, record: "Record") -> None:
    """Have the record told when the first prompts are answered."""
    generate = sampler.generate

    def told(*arguments: Any, **named: Any) -> Any:
        answered = generate(*arguments, **named)
        record.first_sampled()
        return answered

    sampler.generate = told


def evaluate(trainer: Any, task: Task, config_tokens: int, record: "Record", problems: int | None) -> None:
    """Answer the held-out sets greedily with TRL's own engine and weights."""
    sampler, tokenizer = trainer.vllm_generation, trainer.processing_class
    kept = sampler.temperature, sampler.max_completion_length
    sampler.temperature, sampler.max_completion_length = 0.0, config_tokens
    if not sampler.enable_sleep_mode:
        sampler.sync_weights()  # asleep, generate does it
    for name, every in task.sets.items():
        prompts = every[:problems]
        _, answered, *_ = sampler.generate([list(prompt.token_ids) for prompt in prompts], None, 1)
        stops = set(trainer.eos_token_ids)
        ids = [one[:-1] if one and one[-1] in stops else one for one in map(list, answered)]
        texts = [tokenizer.decode(one, skip_special_tokens=False, clean_up_tokenization_spaces=False) for one in ids]
        record.heldout(name, texts, [prompt.answer for prompt in prompts])
    sampler.temperature, sampler.max_completion_length = kept


def make_watch(
    given: argparse.Namespace, record: "Record", trainer: Any, spans: Spans, judge: Counter, task: Task
) -> Any:
    """The callback that records each step, and between the phases evaluates and makes completions as long as can be."""
    from transformers import TrainerCallback

    from benchmarks.beside_trl import EVAL_TOKENS

    class Watch(TrainerCallback):
        began = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            record.begin()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            spans.seconds.clear()
            _finish_gpu_work()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _finish_gpu_work()
            seconds = time.perf_counter() - self.began
            phase = "natural" if state.global_step <= given.natural else "fixed"
            update = seconds - sum(spans.seconds.values())
            numbers = {**spans.seconds, "update": update, "seconds": seconds}
            record.step(phase, **numbers, tokens=judge.tokens, reward_mean=judge.mean)
            if state.global_step == given.natural and not given.trial:
                evaluate(trainer, task, EVAL_TOKENS, record, given.problems)
                trainer.vllm_generation.generation_kwargs = {"ignore_eos": True}
                record.begin()

    return Watch()
