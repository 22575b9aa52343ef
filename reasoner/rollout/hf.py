"""Samples from the policy's own weights with its transformers model: no second copy, no server, any device.

The loop is ours, not `model.generate`, by measurement (0.9 M Llama, 32 prompts x 8 completions x 4 tokens, one CPU
core): `generate` and a bare loop like it both took 365 ms, this one 120 ms. There a prompt is read once for each of its
completions and rows that ended are carried to the end; here a prompt is read once, its cache is repeated, and rows that
ended leave. Nothing of generation_config.json is read, so it can change nothing. The head is applied in float32 as the
trainer applies it; the model's own logits would be rounded to 16 bits.

A token is drawn by inverting the distribution function at one uniform number, which depends on (seed, policy_step, the
prompt's id, which completion, which token) alone: how rows are cut into batches, on which rank a prompt falls and which
rows have ended changes no draw.

Left out: continuous batching and paged caches (a server's business) and images.
"""

import inspect
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from reasoner.errors import GuardTripped, ModelError
from reasoner.models.policy import Policy
from reasoner.rollout.engine import (
    Capabilities,
    Decode,
    Finished,
    Sampling,
    check_prompts,
    completed,
    prompt_seeds,
    unheard,
)
from reasoner.types import Completion, Prompt

# Rows that ended leave when they are this share of those held: each time costs one copy of the cache.
DROP_SHARE = 0.25
# All but cuDNN's, which plans anew for every shape, and here every token has a shape of its own: 130 ms a token against
# 75 (1.5B in bfloat16 with LoRA, 256 rows, H100).
ATTENTION_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class HfEngine:
    """An `Engine` over a policy's transformers model, adapter layers included."""

    capabilities = Capabilities(name="hf", own_weights=False, images=False)

    def __init__(self, policy: Policy, decode: Decode, *, max_context: int, max_sequences: int):
        """`max_context`: tokens of prompt and completion together; `max_sequences`: completions sampled at once."""
        self.policy = policy
        self.decode = decode
        self.max_context = max_context
        self.max_sequences = max_sequences
        self.policy_step: int | None = None
        self._backbone = getattr(policy.base, policy.base.base_model_prefix)
        self._cache_keyword = _cache_keyword(self._backbone)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, policy_step: int, finished: Finished = unheard
    ) -> list[list[Completion]]:
        """See `Engine.generate`. Raises GuardTripped if the scores are not finite, ModelError if memory runs out."""
        assert self.policy_step in (None, policy_step), f"weights of {self.policy_step}, asked for {policy_step}"
        check_prompts(prompts, sampling, self.max_context, self.capabilities)
        num, done = sampling.num_completions, dict[int, Completion]()
        draws = uniform_draws(prompts, sampling, policy_step)
        order = sorted(range(len(prompts) * num), key=lambda row: -len(prompts[row // num].token_ids))
        with self._sampling_mode():
            for start in range(0, len(order), self.max_sequences):
                rows = order[start : start + self.max_sequences]
                token_ids = [prompts[row // num].token_ids for row in rows]
                for left, ids, logprobs in self._sample(token_ids, draws[rows], sampling):
                    if not torch.isfinite(logprobs).all():
                        raise GuardTripped(
                            f"the model's scores are not finite at policy step {policy_step}: its weights have "
                            "diverged; go on from an earlier checkpoint with a lower learning rate"
                        )
                    lengths = completion_lengths(ids, sampling.stop_ids)
                    for k, its_ids, its_logprobs, n in zip(left, ids.tolist(), logprobs.tolist(), lengths, strict=True):
                        stopped = its_ids[n - 1] in sampling.stop_ids
                        one = completed(
                            its_ids[:n],
                            its_logprobs[:n],
                            stopped=stopped,
                            decode=self.decode,
                            policy_step=policy_step,
                        )
                        done[rows[k]] = one
                        finished(rows[k] // num, rows[k] % num, one)
        return [[done[i * num + k] for k in range(num)] for i in range(len(prompts))]

    def stream(self, prompt: Prompt, sampling: Sampling, *, policy_step: int) -> Generator[int, None, None]:
        """One completion's ids, each as soon as it is sampled; the ids that `generate` gives for the same arguments.

        Raises ModelError as `generate` does. The model is in sampling mode until the iterator is through or closed.
        """
        assert self.policy_step in (None, policy_step), f"weights of {self.policy_step}, asked for {policy_step}"
        check_prompts([prompt], sampling, self.max_context, self.capabilities)
        device = self.policy.device
        draws = uniform_draws([prompt], sampling, policy_step)[0].to(device)
        with self._sampling_mode():
            token_ids, mask, position = (x.to(device) for x in left_padded([prompt.token_ids], sampling.max_tokens))
            width = token_ids.shape[1]
            cache = DynamicCache(config=self.policy.base.config)
            logits = self._logits(token_ids, mask[:, :width], position, cache)
            position = position[:, -1:]
            for t in range(sampling.max_tokens):
                picked, _ = pick(logits, draws[t : t + 1], sampling.temperature)
                yield int(picked)
                if int(picked) in sampling.stop_ids or t + 1 == sampling.max_tokens:
                    return
                position = position + 1
                logits = self._logits(picked[:, None], mask[:, : width + t + 1], position, cache)

    def load_adapter(self, state: Mapping[str, Tensor], policy_step: int) -> None:
        """The weights are the policy's own already; from now on `generate` must be asked for this step."""
        self.policy_step = policy_step

    def sleep(self) -> None:
        """Nothing to free: the cache lives only inside `generate`."""

    def wake(self) -> None:
        """Nothing to do, as in `sleep`."""

    def close(self) -> None:
        """Nothing to give back: the model is the policy's."""

    @contextmanager
    def _sampling_mode(self) -> Iterator[None]:
        """No gradients, dropout or recomputation, attention that takes cache and mask; afterwards all is as it was."""
        base = self.policy.base
        modes = [(module, module.training) for module in base.modules()]
        attention = base.config._attn_implementation
        assert attention is not None
        base.eval()
        base.set_attn_implementation(self.policy.family.decode_attention)
        try:
            # inference_mode is 4% faster, but buffers that a layer makes anew there could not be trained with.
            with torch.no_grad(), sdpa_kernel(ATTENTION_BACKENDS):
                yield
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"out of memory while sampling {self.max_sequences} completions at once: lower rollout.max_sequences"
            ) from error
        finally:
            base.set_attn_implementation(attention)
            for module, training in modes:
                module.training = training

    def _sample(
        self, prompts: Sequence[tuple[int, ...]], draws: Tensor, sampling: Sampling
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """One completion for each of R prompts, in pieces as rows leave: which rows (R' of them), ids and logprobs
        [R', max_tokens]; what follows a stop id means nothing."""
        device, max_tokens = self.policy.device, sampling.max_tokens
        unique = {token_ids: i for i, token_ids in enumerate(dict.fromkeys(prompts))}
        owner = torch.tensor([unique[token_ids] for token_ids in prompts], device=device)
        token_ids, mask, positions = (x.to(device) for x in left_padded(list(unique), max_tokens))
        width = token_ids.shape[1]
        cache = DynamicCache(config=self.policy.base.config)
        logits = self._logits(token_ids, mask[:, :width], positions, cache)[owner]
        _take_rows(cache, owner)
        mask, position = mask[owner], positions[owner, -1:]

        ids = torch.zeros(len(prompts), max_tokens, dtype=torch.int64, device=device)
        logprobs = logits.new_zeros(len(prompts), max_tokens)
        stops = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)
        draws = draws.to(device)
        rows = torch.arange(len(prompts), device=device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for t in range(max_tokens):
            picked, picked_logprobs = pick(logits, draws[rows, t], sampling.temperature)
            ids[rows, t], logprobs[rows, t] = picked, picked_logprobs
            ended |= torch.isin(picked, stops)
            num_ended = int(ended.sum())
            if num_ended == len(ended) or t + 1 == max_tokens:
                break
            if num_ended >= DROP_SHARE * len(ended):
                left = rows[ended]
                yield left.tolist(), ids[left], logprobs[left]
                going = (~ended).nonzero()[:, 0]
                rows, ended, picked, position, mask = (x[going] for x in (rows, ended, picked, position, mask))
                _take_rows(cache, going)
            position = position + 1
            logits = self._logits(picked[:, None], mask[:, : width + t + 1], position, cache)
        yield rows.tolist(), ids[rows], logprobs[rows]

    def _logits(self, token_ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Scores of the token after the last one given: float32 [R, V]. The cache grows by token_ids [R, T]."""
        inputs = {"input_ids": token_ids, "attention_mask": mask, "position_ids": positions, self._cache_keyword: cache}
        hidden = self._backbone(**inputs, use_cache=True).last_hidden_state[:, -1]
        logits = head_logits(hidden, self.policy.head_weight).mul_(self.policy.family.logit_scale)
        if (cap := self.policy.family.soft_cap) is not None:
            logits = logits.div_(cap).tanh_().mul_(cap)
        return logits


def pick(logits: Tensor, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids drawn from softmax(logits / temperature), logits [R, V], and their logprobs under it: int64 [R], [R].

    `draws` [R] in [0, 1) are the only chance in it: each id of a probability above 0 has an interval of draws as long
    as that. At temperature 0 the id is the argmax, with its logprob at temperature 1. `logits` is overwritten.
    """
    if temperature == 0:
        ids = logits.argmax(1, keepdim=True)
        return ids[:, 0], (logits.gather(1, ids) - logits.logsumexp(1, keepdim=True))[:, 0]
    logits /= temperature
    logits -= logits.logsumexp(1, keepdim=True)
    # float64: with 150,000 ids the sum in float32 would swallow the rare ones.
    distribution = logits.exp().cumsum(1, dtype=torch.float64)
    ids = torch.searchsorted(distribution, draws[:, None] * distribution[:, -1:], right=True)
    ids = ids.clamp_(max=logits.shape[1] - 1)  # a draw of 1 - 2^-53 may round up to the total
    return ids[:, 0], logits.gather(1, ids)[:, 0]


def uniform_draws(prompts: Sequence[Prompt], sampling: Sampling, policy_step: int) -> Tensor:
    """One number in [0, 1) for each token to sample: float64 [prompts x num_completions, max_tokens].

    The rows of a prompt come from a generator of their own, of the prompt's seed.
    """
    rows = [torch.zeros(0, sampling.max_tokens, dtype=torch.float64)]
    for seed in prompt_seeds(prompts, sampling, policy_step):
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(sampling.num_completions, sampling.max_tokens, dtype=torch.float64, generator=generator))
    return torch.cat(rows)


def left_padded(prompts: Sequence[tuple[int, ...]], max_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [P, L], mask [P, L + max_tokens], positions [P, L], all int64; the last column is each prompt's last token.

    >>> left_padded([(7,), (8, 9)], 1)
    (tensor([[0, 7], [8, 9]]), tensor([[0, 1, 1], [1, 1, 1]]), tensor([[0, 0], [0, 1]]))

    The padding's id is 0 in every vocabulary: the mask hides it, so it need not be a pad token.
    """
    width = max(len(ids) for ids in prompts)
    token_ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * (len(ids) + max_tokens) for ids in prompts])
    return token_ids, mask, (mask[:, :width].cumsum(1) - 1).clamp(min=0)


def completion_lengths(ids: Tensor, stop_ids: Sequence[int]) -> list[int]:
    """Tokens of each row of ids [R, T] up to and with its first stop id, else T."""
    stops = torch.isin(ids, torch.tensor(stop_ids, dtype=ids.dtype, device=ids.device))
    first = stops.int().argmax(1) + 1
    return torch.where(stops.any(1), first, ids.shape[1]).tolist()


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [R, D] @ weight [V, D].T, summed and given in float32 or, from a float64 head, float64: [R, V]."""
    if weight.is_cuda and weight.dtype == hidden.dtype and weight.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # CUDA only; spares a float32 copy of the head
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return hidden.to(dtype) @ weight.to(dtype).T


def _take_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Make the cache that of these rows, which may repeat or be missing."""
    # Written for beam search, but unlike batch_select_indices it is there for linear attention too.
    cache.reorder_cache(cast(torch.LongTensor, rows))


def _cache_keyword(backbone: torch.nn.Module) -> str:
    # transformers renamed it within 5.x, and takes an unknown keyword without a word.
    known = inspect.signature(backbone.forward).parameters
    for keyword in ("cache", "past_key_values"):
        if keyword in known:
            return keyword
    raise ModelError(f"{type(backbone).__name__} keeps no key-value cache for the hf engine: choose another model")
