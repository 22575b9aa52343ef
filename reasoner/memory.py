"""GPU memory of a run, in parts: the worst micro-batch runs before step 1, and the engine's cache gets what is left.

Training and sampling take turns. The cache is given back while training, activations are gone while sampling; all other
parts stay. `peak.rehearse` measures, `parts_before` and `divide` are arithmetic, `plan_memory` does both. Left out: the
host's memory, and a share of the card as a setting (sizes can be added up, shares can't).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from reasoner.config import Config, data_of
from reasoner.errors import ModelError
from reasoner.models.policy import Policy
from reasoner.peak import GIB, rehearse, savings, training_stages

ENGINE = GIB // 2  # of vLLM beside its cache: CUDA graphs, input buffers, slack; 0.41 was seen at 1.5B
CACHE_SLACK = 1.05  # blocks that are filled in part
# Bytes a trained weight.
STATES, STATES_8BIT = 8, 2  # of optimizer state: two float32 moments; of bitsandbytes' 8-bit classes
FLOAT32, BFLOAT16 = 4, 2  # a gradient or the reference's copy; the engine's copy


@dataclass(frozen=True, slots=True)
class Held:
    """What the loaded policy holds, in bytes, and what its shape says of the rest.

    >>> Held(base=1_203_000_000, second_base=0, in_16_bits=2_620_000_000, masters=73_859_072, below=0,
    ...      num_trained=18_464_768, kv_token=28_672, score_row=607_744, prompt_token=66_048, packed=55_050_240)
    """

    base: int  # frozen weights
    second_base: int  # what the engine will load for itself with rollout.share_base=false
    in_16_bits: int  # what NF4 matrices are in 16 bits, with the adapter's A's beside them; 0 without any
    masters: int  # the weights that learn
    below: int  # rows below the base's matrices, where the engine's copy of A's will lie: allocated with the base
    num_trained: int
    kv_token: int  # the engine's cache of one token
    score_row: int  # the head's float32 scores of one token
    prompt_token: int  # what the engine's widest layer makes of one token
    packed: int  # the largest NF4 matrix that is multiplied with, in 16 bits; 0 without any


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The parts of a card's memory, in bytes."""

    total: int
    taken: int  # by CUDA itself and other programs
    base: int
    second_base: int
    adapter: int  # the weights that learn, the reference's copy if there is one, the engine's
    optimizer: int
    engine: int
    keep_free: int
    training: int  # the worst micro-batch and its gradients; gone while sampling
    dequantized: int  # the NF4 base in 16 bits (rollout.dequantize); given back while training
    scores: int  # the head's, of a token of every sequence that is sampled at once; given back while training
    prompts: int  # what a step makes that reads prompts; gone while training
    kv_bytes: int  # the engine's cache; given back while training
    kv_token: int  # of it, one token
    longest: int  # tokens of prompt and completion in the longest sequence that is sampled
    # What the worst micro-batch counts on: layers that run again in the backward, and keep their inputs on the host.
    recomputed: int = 0
    offloads: bool = False

    @property
    def always(self) -> int:
        """What training and sampling both hold."""
        of_run = self.base + self.second_base + self.adapter + self.optimizer + self.engine
        return self.taken + of_run + self.keep_free

    @property
    def while_training(self) -> int:
        """Together, with the cache away."""
        return self.always + self.training

    @property
    def while_sampling(self) -> int:
        """Together, without activations and gradients."""
        return self.always + self.dequantized + self.scores + self.prompts + self.kv_bytes

    @property
    def _layers(self) -> str:
        plural = "s" * (self.recomputed > 1)
        recomputed = f", {self.recomputed} layer{plural} recomputed" if self.recomputed else ""
        return f"{recomputed}{', their inputs on the host' * self.offloads}"

    def parts_gib(self) -> dict[str, float]:
        """The parts and both sums in GiB, for summary.json."""
        of_both = ("total", "taken", "base", "second_base", "adapter", "optimizer", "engine", "keep_free")
        names = (*of_both, "training", "dequantized", "scores", "prompts", "while_training", "while_sampling")
        sizes = {name: getattr(self, name) for name in names} | {"kv": self.kv_bytes}
        return {name: round(size / GIB, 3) for name, size in sizes.items()}

    def lines(self) -> list[str]:
        """The table for the console."""
        rows = [
            ("CUDA and other programs", self.taken, self.taken),
            ("base", self.base, self.base),
            ("the engine's own base (rollout.share_base)", self.second_base, self.second_base),
            ("weights that learn, and the engine's copy", self.adapter, self.adapter),
            ("optimizer", self.optimizer, self.optimizer),
            ("engine", self.engine, self.engine),
            (f"worst micro-batch{self._layers}", self.training, 0),
            ("base in 16 bits (rollout.dequantize)", 0, self.dequantized),
            ("scores of rollout.max_sequences tokens", 0, self.scores),
            ("reading prompts (rollout.max_batched_tokens, max_sequences)", 0, self.prompts),
            ("the engine's cache", 0, self.kv_bytes),
            ("kept free (rollout.keep_free_gib)", self.keep_free, self.keep_free),
            (f"together, of {self.total / GIB:.2f}", self.while_training, self.while_sampling),
        ]
        cells = [("GPU memory in GiB", "training", "sampling")]
        cells += [(name, _cell(training), _cell(sampling)) for name, training, sampling in rows if training or sampling]
        width = max(len(name) for name, _, _ in cells)
        tokens = self.kv_bytes // self.kv_token
        return [
            *(f"{name:<{width}}   {training:>8}   {sampling:>8}" for name, training, sampling in cells),
            f"the cache holds {tokens:,} tokens: {tokens // self.longest:,} sequences of {self.longest:,}, the longest",
        ]


def plan_memory(config: Config, policy: Policy, *, max_context: int) -> MemoryPlan:
    """Divide the card that the policy is on, with nothing else of the run there yet.

    `max_context`: tokens of prompt and completion together that the model takes. Raises OutOfMemory if the worst
    micro-batch does not fit, ModelError if the parts together don't.
    """

    def parts() -> MemoryPlan:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(policy.device)
        return parts_before(config, held, total=total, free=free, max_context=max_context)

    held = held_by(policy, share_base=config.rollout.share_base)
    before = parts()
    peaks = rehearse(config, policy, max_context=max_context, room=before.total - before.always)
    # CUDA itself took a little more for the kernels that ran.
    return replace(divide(config, parts(), peaks), recomputed=policy.recomputed, offloads=policy.offloads)


def held_by(policy: Policy, *, share_base: bool) -> Held:
    """The sizes of a loaded policy."""
    trained = list(policy.trainable().values())
    frozen = [weight for weight in policy.model.parameters() if not weight.requires_grad]
    base = policy.weights.nbytes if policy.weights is not None else sum(weight.nbytes for weight in frozen)
    own = base if policy.weights is not None else BFLOAT16 * sum(weight.numel() for weight in frozen)
    packed = policy.weights.fused_states.values() if policy.weights is not None else ()
    hf_config = policy.base.config.get_text_config()
    return Held(
        base=base,
        second_base=0 if share_base else own,
        in_16_bits=_in_16_bits(policy) if share_base else 0,
        masters=sum(weight.nbytes for weight in trained),
        below=policy.weights.nbytes_below if policy.weights is not None else 0,
        num_trained=sum(weight.numel() for weight in trained),
        kv_token=kv_token_bytes(hf_config),
        score_row=FLOAT32 * policy.head_weight.shape[0],
        prompt_token=prompt_token_bytes(hf_config),
        packed=max((BFLOAT16 * state.shape.numel() for state in packed), default=0),
    )


def _in_16_bits(policy: Policy) -> int:
    states = policy.weights.states.values() if policy.weights is not None else ()
    if not states:
        return 0
    beside = sum(weight.numel() for name, weight in policy.trainable().items() if "lora_A" in name)
    return BFLOAT16 * (sum(state.shape.numel() for state in states) + beside)


def kv_token_bytes(hf_config: Any) -> int:
    """Keys and values of one token in all layers, bfloat16. Layers with a window may need less."""
    heads = hf_config.num_attention_heads
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    return 2 * hf_config.num_hidden_layers * kv_heads * head_dim * BFLOAT16


def prompt_token_bytes(hf_config: Any) -> int:
    """What one token takes in an MLP, bfloat16: gate, up and their product, and four times the model's width for what
    came before. The engine frees each layer's before the next one's."""
    width = hf_config.hidden_size
    return BFLOAT16 * (3 * (getattr(hf_config, "intermediate_size", None) or 4 * width) + 4 * width)


def parts_before(config: Config, held: Held, *, total: int, free: int, max_context: int) -> MemoryPlan:
    """All parts but those that take turns, which are 0; `free` is what the card has with the policy loaded.

    Raises ModelError where rollout.dequantize=true has nothing to work on.
    """
    if config.rollout.dequantize is True and not held.in_16_bits:
        raise ModelError(
            "rollout.dequantize=true holds an NF4 base in 16 bits too, and this base is not NF4 or not shared with the "
            "engine: set it to auto"
        )
    stages = training_stages(config)
    copies = BFLOAT16 + (FLOAT32 if "grpo" in stages and config.grpo.kl_coef > 0 else 0)
    targets = [str(getattr(config, stage).optim.optimizer.get("_target_", "")) for stage in stages]
    states = [STATES_8BIT if t.startswith("bitsandbytes") and "8bit" in t.lower() else STATES for t in targets]
    return MemoryPlan(
        total=total,
        taken=max(0, total - free - held.base - held.masters - held.below),
        base=held.base,
        second_base=held.second_base,
        adapter=held.masters + copies * held.num_trained,  # what lies below is of the engine's copy
        optimizer=max(states, default=0) * held.num_trained,
        engine=ENGINE + held.packed,  # from NF4 a graph makes a matrix in memory of its own
        keep_free=int(config.rollout.keep_free_gib * GIB),
        training=0,
        dequantized=held.in_16_bits if config.rollout.dequantize is not False else 0,
        # With share_base=false there is no buffer for them, and vLLM's counts for penalties take as much.
        scores=config.rollout.max_sequences * held.score_row,
        prompts=_of_prompts(config, held),
        kv_bytes=0,
        kv_token=held.kv_token,
        longest=longest_sampled(config, max_context),
    )


def _of_prompts(config: Config, held: Held) -> int:
    """An engine's step over prompts: its widest layer, with the matrix that it makes of NF4; or, afterwards, two more
    copies of the scores, which vLLM's own sampler takes for the first token of every sequence."""
    sequences = config.rollout.max_sequences
    tokens = max(config.rollout.max_batched_tokens, sequences)
    return max(tokens * held.prompt_token + held.packed, 2 * sequences * held.score_row)


def divide(config: Config, before: MemoryPlan, peaks: Mapping[str, int]) -> MemoryPlan:
    """The plan with its parts that take turns: the largest of the stages' peaks, and the engine's cache, with the
    base in 16 bits where rollout.dequantize says so (auto: where the cache stays whole beside it).

    The cache is rollout.kv_gib, else the smaller of what is left while sampling and what rollout.max_sequences of
    the longest sequences fill. Raises ModelError if training, or the cache of one such sequence, does not fit.
    """
    stage = max(peaks, key=lambda name: peaks[name], default="")
    plan = replace(before, training=peaks.get(stage, 0))
    if plan.while_training > plan.total:
        size = getattr(config, stage).tokens_per_micro_batch
        raise _too_little(
            f"training with {stage}.tokens_per_micro_batch={size}",
            plan.while_training,
            plan,
            f"lower that, rollout.keep_free_gib or model.lora.r{savings(config)}",
        )
    one = math.ceil(plan.longest * plan.kv_token * CACHE_SLACK)
    left = plan.total - plan.always - plan.scores - plan.prompts
    keys = "rollout.max_batched_tokens, rollout.max_sequences, grpo.max_completion_tokens, data.max_prompt_tokens"
    shorter = f"lower {keys} or rollout.keep_free_gib{savings(config)}"
    if left < one:
        needed = plan.total - left + one
        raise _too_little(f"sampling one sequence of {plan.longest} tokens", needed, plan, shorter)
    asked = config.rollout.kv_gib
    wanted = config.rollout.max_sequences * one if asked is None else int(asked * GIB)
    if config.rollout.dequantize == "auto" and left - plan.dequantized < wanted:
        plan = replace(plan, dequantized=0)
    left -= plan.dequantized
    if left < one:
        raise _too_little("rollout.dequantize=true", plan.while_sampling + one, plan, "set it to auto or false")
    if asked is None:
        return replace(plan, kv_bytes=min(left, wanted))
    kv_bytes = wanted
    if kv_bytes > left:
        most = f"set it to at most {_down(left)}, or to null for what is left"
        raise _too_little(f"rollout.kv_gib={asked:g}", plan.while_sampling + kv_bytes, plan, most)
    if kv_bytes < one:
        raise ModelError(
            f"rollout.kv_gib={asked:g} is less than the {_up(one)} GiB that one sequence of {plan.longest} tokens "
            f"needs (there are {_down(left)}): raise it, set it to null for what is left, or {shorter}"
        )
    return replace(plan, kv_bytes=kv_bytes)


def longest_sampled(config: Config, max_context: int) -> int:
    """Tokens of the longest prompt with the longest completion, in GRPO and in evaluation."""
    sets = [data_of(config, node, f"evaluate.sets.{name}") for name, node in config.evaluate.sets.items()]
    evaluated = config.evaluate.max_completion_tokens or config.grpo.max_completion_tokens
    practised = data_of(config, config.grpo.data, "grpo.data").max_prompt_tokens + config.grpo.max_completion_tokens
    prompts = [data.max_prompt_tokens for data in sets or [config.data]]
    return min(max_context, max(practised, max(prompts) + evaluated))


def _too_little(what: str, needed: int, plan: MemoryPlan, remedy: str) -> ModelError:
    return ModelError(
        f"{what} needs {_up(needed)} GiB of GPU memory, and the card has {_down(plan.total)} "
        f"({plan.taken / GIB:.2f} of them taken by CUDA and other programs): {remedy}"
    )


def _up(size: int) -> str:
    """GiB, rounded up: what is needed is never said to be what is there."""
    return f"{math.ceil(size / GIB * 100) / 100:.2f}"


def _down(size: int) -> str:
    return f"{math.floor(size / GIB * 100) / 100:.2f}"


def _cell(size: int) -> str:
    return f"{size / GIB:.2f}" if size else "-"
