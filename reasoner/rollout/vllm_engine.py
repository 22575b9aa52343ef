# pyright: reportMissingImports=false
# (vLLM is there only on GPU machines.)
"""Samples with vLLM in this process, from the trainer's own weights: CUDA graphs, a paged cache, continuous batching.

The base is not copied (vllm_weights.py), the adapter is refilled in place (vllm_adapter.py), the cache is asleep while
the trainer works. Each prompt's draws come from a seed of its own, made of (seed, policy_step, the prompt's id, how
often that id came before in this call). The prefix cache serves the completions of one call: it is dropped at the next
and at every hand-over, and its blocks carry the policy step in their key. Left out: several GPUs, several adapters,
images.
"""

import gc
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasoner import config
from reasoner.errors import GuardTripped, ModelError
from reasoner.models.adapters import linear_rows
from reasoner.models.policy import Policy
from reasoner.rollout.canary import Canary, Reading
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
from reasoner.rollout.vllm_adapter import EngineAdapter
from reasoner.rollout.vllm_bursts import BURST, Sampled, run_requests
from reasoner.rollout.vllm_start import start
from reasoner.types import Completion, Prompt

PROBE_TOKENS = 128
GIB = 2**30


class VllmEngine:
    """An `Engine` over a policy with an adapter on a CUDA card."""

    capabilities = Capabilities(name="vllm", own_weights=True, images=False)

    def __init__(
        self,
        policy: Policy,
        decode: Decode,
        rollout: config.Rollout,
        *,
        max_context: int,
        kv_bytes: int,
        dequantize: bool = False,
        model_path: str | None = None,
    ):
        """`max_context`: tokens of prompt and completion together, of the longest there will be. `kv_bytes`: of the
        cache. `dequantize`: hold an NF4 base in 16 bits too while awake. `model_path`: a folder or hub id for an engine
        that loads weights of its own (rollout.share_base=false).

        Raises ModelError where the card has no room, or vLLM's model has no place for a part of the adapter.
        """
        self.policy, self.decode, self.max_context = policy, decode, max_context
        self.policy_step: int | None = None
        self.adapter = EngineAdapter(
            policy.trainable(),
            linear_rows(policy.base),
            policy.adapter_scaling,
            policy.head_weight.dtype,
            policy.weights.with_rows if policy.weights and model_path is None else {},
        )
        self._folder = Path(tempfile.mkdtemp(prefix="reasoner-vllm-"))
        self.llm: Any = None
        self._awake, self._cached = True, False
        self._numbers = itertools.count()  # of requests
        self._probe: tuple[int, ...] = ()  # tokens for the canary; of the first call to generate
        self._canary: Canary | None = None
        self.reading: Reading | None = None  # what the canary last found
        self._looked = False  # at the adapter that is loaded
        self._graphs: Any = None  # of a token, in bursts
        try:
            self.llm, self.built = start(
                self._folder,
                policy,
                self.adapter,
                rollout,
                max_context=max_context,
                kv_bytes=kv_bytes,
                dequantize=dequantize,
                model_path=model_path,
            )
            self.adapter.check_taken()
            self._graphs = self._make_graphs()
        except BaseException:
            gc.unfreeze()  # the policy was there when start() froze what is imported, and may be garbage soon
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def _make_graphs(self) -> Any:
        from reasoner.rollout.vllm_decode import decode_graphs

        return decode_graphs(self._core.model_executor.driver_worker.worker, self.built.scores, BURST)

    @property
    def _core(self) -> Any:
        return self.llm.engine_core.engine_core

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, policy_step: int, finished: Finished = unheard
    ) -> list[list[Completion]]:
        """See `Engine.generate`.

        Raises GuardTripped if the scores are not finite, or of other weights than the trainer's; ModelError if memory
        runs out.
        """
        assert self.policy_step in (None, policy_step), f"weights of {self.policy_step}, asked for {policy_step}"
        check_prompts(prompts, sampling, self.max_context, self.capabilities)
        if not prompts:
            return []
        self._forget()
        num = sampling.num_completions if sampling.temperature > 0 else 1  # the likeliest completion is one
        self._cached = True
        places: dict[str, tuple[int, int]] = {}
        requests = []
        for i, seed in enumerate(prompt_seeds(prompts, sampling, policy_step)):
            for k in range(num):
                parameters = _parameters(sampling, (seed >> 2) + k)  # two bits less, so that the sum is one of 64 too
                requests.append(self._request(prompts[i].token_ids, parameters, salt=str(policy_step)))
                places[requests[-1].request_id] = i, k
        done: list[list[Completion | None]] = [[None] * sampling.num_completions for _ in prompts]

        def end(name: str, sampled: Sampled) -> None:
            i, first = places[name]
            completion = self._completion(sampled, policy_step)
            for k in range(first, sampling.num_completions, num):  # the likeliest is given as often as asked
                done[i][k] = completion
                finished(i, k, completion)

        self._run(requests, sampling.stop_ids, end)
        found = [[completion for completion in several if completion is not None] for several in done]
        assert all(len(several) == sampling.num_completions for several in found), "a request did not end"
        if not self._looked:
            self._look(prompts, found, policy_step)
            self._looked = True
        return found

    def _look(self, prompts: Sequence[Prompt], found: Sequence[Sequence[Completion]], policy_step: int) -> None:
        """Compare both sides on the probe, which the first call chooses: the row with most of a completion in it.

        A call of its own: beside others vLLM would score every token of theirs too, in float32 over the vocabulary.
        """
        if not self._probe:
            pairs = zip(prompts, found, strict=True)
            rows = [(len(p.token_ids), p.token_ids + several[0].token_ids) for p, several in pairs]
            size = min(PROBE_TOKENS, self.max_context - 1)
            self._probe = max(rows, key=lambda row: min(size, len(row[1])) - row[0])[1][:size]
            self._canary = Canary(self._trainer_scores(policy_step))
        assert self._canary is not None
        given: list[Sampled] = []
        self._run([self._request(self._probe, _scoring())], (), lambda _, sampled: given.append(sampled))
        scores = given[0].prompt_logprobs
        assert scores is not None
        self.reading = self._canary.look(self._trainer_scores(policy_step), scores)

    def _trainer_scores(self, policy_step: int) -> Tensor:
        try:
            scores = self.policy.score(self._probe).cpu()
        except torch.OutOfMemoryError as error:
            raise _too_little_to_sample() from error
        if not scores.isfinite().all():
            raise _diverged(policy_step)
        return scores

    def load_adapter(self, state: Mapping[str, Tensor], policy_step: int) -> None:
        """Copy the adapter, and forget what the cache knows of the old one."""
        self.adapter.load(state)
        if self._awake and self.built.dequantized is not None:
            self.built.dequantized.take_adapter()
        self.policy_step, self._looked = policy_step, False
        self._forget()

    def _forget(self) -> None:
        """Drop the prefix cache: it is of other weights, or would make a call depend on the one before."""
        if self._cached:
            dropped = self.llm.reset_prefix_cache()
            assert dropped, "the prefix cache is in use between two calls"
            self._cached = False

    def sleep(self) -> None:
        """Unmap the cache; its contents are lost."""
        try:
            self.llm.sleep(level=1)
        except AssertionError as error:
            # The cache is unmapped by then; vLLM looks at the whole card, where a program beside us took more.
            if "Memory usage increased" not in str(error):
                raise
            executor = self.llm.model_executor
            executor.sleeping_tags, executor.is_sleeping = {"weights", "kv_cache"}, True
        self._awake = self._cached = False

    def wake(self) -> None:
        """Map the cache again, empty. Raises ModelError where the trainer left no room."""
        torch.cuda.empty_cache()
        try:
            self.llm.wake_up()
        except RuntimeError as error:
            free = torch.cuda.mem_get_info()[0] / GIB
            raise ModelError(
                f"no room to wake the cache ({free:.1f} GiB free): lower rollout.kv_gib or tokens_per_micro_batch"
            ) from error
        if self.built.dequantized is not None:
            self.built.dequantized.fill()
        self._awake = True

    def close(self) -> None:
        """Stop vLLM and give its memory back, so that this process may start another engine."""
        if self.llm is not None:
            with suppress(ModelError):  # no room to wake in: the memory goes with the process
                if not self._awake:
                    self.wake()
                self.llm.engine_core.shutdown()
                self.llm = self.built.dequantized = self.built.scores.buffer = self._graphs = None
                _give_back()
            self.llm = None
        shutil.rmtree(self._folder, ignore_errors=True)
        torch.cuda.empty_cache()

    def _request(self, token_ids: Sequence[int], parameters: Any, *, salt: str | None = None) -> Any:
        """What vLLM's core takes; its LLM.generate makes the same, with much checking around it."""
        from vllm.v1.engine import EngineCoreRequest

        return EngineCoreRequest(
            request_id=str(next(self._numbers)),
            prompt_token_ids=list(token_ids),
            mm_features=None,
            sampling_params=parameters,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=salt,
            data_parallel_rank=None,
        )

    def _run(self, requests: Sequence[Any], stop_ids: Sequence[int], finished: Callable[[str, Sampled], None]) -> None:
        """Sample; `finished` is called with the name of a request and what it gave, as soon as it is whole."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # others spin between vLLM's many small steps and slow it by a quarter
        try:
            run_requests(self._core, requests, stop_ids, finished, self._graphs)
        except torch.OutOfMemoryError as error:
            raise _too_little_to_sample() from error
        finally:
            torch.set_num_threads(threads)

    def _completion(self, sampled: Sampled, policy_step: int) -> Completion:
        if not math.isfinite(sum(sampled.logprobs)):
            raise _diverged(policy_step)
        return completed(
            tuple(sampled.token_ids),
            sampled.logprobs,
            stopped=sampled.stopped,
            decode=self.decode,
            policy_step=policy_step,
        )


def _give_back() -> None:
    """The memory and the process group of an engine that nothing refers to any more. vLLM keeps the blocks of its own
    allocator and the name of its graphs' pool for as long as the process lives, and no second engine starts beside
    them."""
    from vllm.device_allocator.cumem import CuMemAllocator, unmap_and_release
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    cleanup_dist_env_and_memory()  # collects garbage too: the parts of an engine hold one another
    type(current_platform)._global_graph_pool = None
    torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for each stream that graphs were captured on
    allocator = CuMemAllocator.get_instance()
    for pool, of_pool in allocator.allocator_and_pools.values():
        for block in pool.snapshot():
            if block["allocated_size"] == 0 and block["address"] in allocator.pointer_to_data:
                unmap_and_release(allocator.python_free_callback(block["address"]))
        _emptied.append((pool, of_pool))


_emptied: list[Any] = []  # PyTorch would free a pool's blocks once more when the pool itself goes


def _diverged(policy_step: int) -> GuardTripped:
    return GuardTripped(
        f"the model's scores are not finite at policy step {policy_step}: its weights have diverged; go on from an "
        "earlier checkpoint with a lower learning rate"
    )


def _too_little_to_sample() -> ModelError:
    return ModelError(
        "out of memory while sampling: lower rollout.max_sequences or rollout.max_batched_tokens, or raise "
        "rollout.keep_free_gib"
    )


def _parameters(sampling: Sampling, seed: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop_ids),
        ignore_eos=True,  # ours alone stop
        logprobs=0,  # of the sampled token, and of no other
        detokenize=False,
        seed=seed,  # also for the likeliest, which draws nothing: without one vLLM draws one from numpy's state
    )


def _scoring() -> Any:
    """Asks for the logprobs of a prompt's own tokens; the one token sampled after it is not wanted."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0, detokenize=False, seed=0)
