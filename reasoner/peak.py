"""What the fullest micro-batch takes of a card, measured before step 1, and what layers have to let go for it to fit.

Left out: the other parts of the card's memory (memory.py), and which micro-batch is the fullest (worst_batch.py).
"""

import torch

from reasoner.config import Config
from reasoner.errors import OutOfMemory
from reasoner.grpo.batch import PackedBatch
from reasoner.models.adapted_linear import forget
from reasoner.models.attention import Layout
from reasoner.models.loading import layers_of, recompute_layers
from reasoner.models.policy import Policy
from reasoner.worst_batch import is_whole_step, longest_trained, worst_layout, worst_lengths

GIB = 1 << 30
# Of the room, where layers could recompute and keep what they made. No two batches are cut alike, and what one gave
# back does not fit the next: at nine tenths torch's allocator goes to the driver for every other layer, and all waits.
KEPT_SHARE = 0.7
TRIALS = 3


def rehearse(config: Config, policy: Policy, *, max_context: int, room: int) -> dict[str, int]:
    """Bytes that the fullest micro-batch of each training stage takes above what is held now, gradients included.

    Nothing is learnt: no gradient stays and random states are as before. With model.gradient_checkpointing=auto layers
    recompute if a stage takes more than KEPT_SHARE of `room` bytes without, but for as many of the last ones as fit
    into that; where `room` itself is not enough, all but the last keep their inputs on the host. Raises OutOfMemory,
    with a size that fits into `room`, if a stage's own does not fit on the card.
    """
    peaks: dict[str, int] = {}
    share = int(KEPT_SHARE * room)
    further = [False, True] if config.model.gradient_checkpointing == "auto" else []  # values of `offload`
    try:
        for stage in training_stages(config):
            free = _free_bytes(policy.device)
            found = _stage_peak(config, policy, stage, max_context)
            while further and (found is None or found > (room if further == [True] else share)):
                recompute_layers(policy.base, config.model.name, offload=further.pop(0))
                found = _stage_peak(config, policy, stage, max_context)
            if found is None:
                raise OutOfMemory(_smaller(config, policy, stage, max_context, free=free, room=room))
            peaks[stage] = found
        if further == [True]:
            return _keep_what_fits(config, policy, max_context, peaks, share)
    finally:
        policy.eval()
    return peaks


def _keep_what_fits(
    config: Config, policy: Policy, max_context: int, peaks: dict[str, int], room: int
) -> dict[str, int]:
    """Have as many of the last layers as fit into `room` keep what they made. -> the stages' peaks then.

    `peaks`: those with one that keeps; of a stage that came before layers recomputed, what it took then, which is more
    and fits too. What another one takes is the same for each, so that two measures tell of all; but the first may hide
    behind the loss head, and kernels take workspaces, so that what they tell is tried.
    """
    layers, kept, best = len(layers_of(policy.base)), 1, peaks
    tried, size = kept, min(2, layers - 1)
    for _ in range(TRIALS):
        if size <= kept or size == tried:
            break
        tried = size
        recompute_layers(policy.base, config.model.name, kept=tried)
        found = {stage: _stage_peak(config, policy, stage, max_context) for stage in peaks}
        measured = {stage: peak for stage, peak in found.items() if peak is not None}
        if len(measured) < len(peaks):
            size = tried // 2
            continue
        if all(peak <= room for peak in measured.values()):
            kept, best = tried, measured
        more = [(room - peak) * (tried - 1) // max(1, measured[stage] - peak) for stage, peak in peaks.items()]
        size = min(layers - 1, 1 + min(more))
    recompute_layers(policy.base, config.model.name, kept=kept)
    return best


def _stage_peak(config: Config, policy: Policy, stage: str, max_context: int) -> int | None:
    policy.train_mode(dropout=stage == "sft")
    worst = worst_layout(config, stage, max_context, shares=policy.shares_prompts)
    passes = 1 if is_whole_step(config, stage, max_context, shares=policy.shares_prompts) else 2
    return peak_bytes(policy, worst, entropy=_entropy_learns(config, stage), passes=passes)


def peak_bytes(policy: Policy, layout: Layout, *, entropy: bool, passes: int = 2) -> int | None:
    """Bytes above what is held now, at the peak of `passes` micro-batches in a row; None if they are too many.

    The second one runs beside the first one's gradients, as it does in a step that has several. Every token that is
    computed, but each sequence's first, is trained: prompts may be that short.
    """
    device = policy.device
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) if on_card else 0
    try:
        there = Layout.of(layout.lengths, device, shared=layout.shared)
        ids = torch.arange(sum(layout.lengths), device=device) % policy.head_weight.shape[0]
        firsts = torch.tensor(layout.shared, device=device)[there.sequence_ids].clamp(min=1)
        batch = PackedBatch(token_ids=ids, layout=there, completion_mask=there.positions >= firsts)
        with torch.random.fork_rng(devices=[device] if on_card else []):
            for _ in range(passes):
                found = policy.logprobs(batch, temperature=1.0)
                (found.logprobs.sum() + found.entropy.sum() if entropy else found.logprobs.sum()).backward()
        return torch.cuda.max_memory_allocated(device) - held if on_card else 0
    except torch.OutOfMemoryError:
        return None
    finally:
        forget()
        for weight in policy.trainable().values():
            weight.grad = None


def _smaller(config: Config, policy: Policy, stage: str, max_context: int, *, free: int, room: int) -> str:
    """The line that names what was too large and what fits."""
    key, longest = f"{stage}.tokens_per_micro_batch", longest_trained(config, stage, max_context)
    asked = getattr(config, stage).tokens_per_micro_batch
    was = f"{key}={asked} is out of memory ({free / GIB:.2f} GiB were free)"
    tokens = sum(worst_lengths(config, stage, max_context))
    while tokens > longest:
        tokens = max(longest, tokens // 2)
        cut = worst_layout(config, stage, max_context, shares=policy.shares_prompts, tokens=tokens)
        found = peak_bytes(policy, cut, entropy=_entropy_learns(config, stage))
        if found is not None and found <= room:
            return f"{was}: set {key}={tokens}, which fits{savings(config)}"
    most = getattr(config, stage).max_completion_tokens
    return (
        f"{was}, and so is one sequence of {longest} tokens alone: lower {stage}.max_completion_tokens={most}, to "
        f"{max(1, most // 2)} say, or data.max_prompt_tokens{savings(config)}"
    )


def savings(config: Config) -> str:
    """What is not switched on already, to end a remedy with."""
    found = [] if config.rollout.share_base else ["rollout.share_base=true"]
    if config.model.gradient_checkpointing in (True, False):
        further = "offload" if config.model.gradient_checkpointing else "true"
        found.append(f"model.gradient_checkpointing={further}")
    if config.model.lora and config.model.quantize == "none":
        found.append("model.quantize=nf4")
    return f", or set {' or '.join(found)}" if found else ""


def training_stages(config: Config) -> list[str]:
    return [stage for stage in ("sft", "grpo") if stage in config.stages]


def _entropy_learns(config: Config, stage: str) -> bool:
    return stage == "grpo" and config.grpo.entropy_coef > 0


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
