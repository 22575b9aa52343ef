"""Runs vLLM's requests to their ends: its scheduler, cache and model runner, several tokens a turn of the scheduler.

vLLM's own loop asks its scheduler before every token and hands every token through several objects, which is nearly
half of a step's time with 256 sequences of a small model (docs/performance.md). Here the scheduler is asked
once for a burst, with slots in the cache for all of its tokens. Where every sequence has its prompt behind it, two CUDA
graphs draw token after token (vllm_decode.py); else the model runner does, at most two of them under way at a time (its
staging buffers are two deep). Positions, block tables and sampled ids lie on the card already, and a draw depends on
seed and position alone, so the length of a burst changes no token. What a sequence drew behind its end is dropped.
Left out: grammars, speculation, streaming, aborting.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy
import torch

BURST, BURST_WHILE_OTHERS_WAIT = 128, 8  # tokens a turn, at most; fewer where slots ahead are wanted by others
TOGETHER = 4  # tokens that are launched, and looked at, together
# A burst ends early once this share of its sequences is through: if others wait for their places; if none do.
ENDED_WHILE_OTHERS_WAIT, ENDED = 1 / 8, 1 / 2


@dataclass(slots=True)
class Sampled:
    """What a request gave: ids, logprobs of the distribution they were drawn from, and what it ended by."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False  # by a stop id, which is the last; else by its limit
    prompt_logprobs: torch.Tensor | None = None  # [prompt tokens - 1], where they were asked for


@dataclass(slots=True)
class Drawn:
    """One token of every sequence of a burst, a sequence a column of `tokens`."""

    tokens: Any  # int64 [S]
    logprobs: Any  # float32 [S]


class Graphs(Protocol):
    """What vllm_decode.py's DecodeGraphs does for bursts."""

    def begin(self, plan: Any) -> bool:
        """Begin a burst; False, with nothing done, where there is no graph for it."""
        ...

    def launch(self, first: int, count: int) -> Callable[[], list[Drawn]]:
        """Draw so many tokens more; what is returned waits for them."""
        ...


def run_requests(
    core: Any,
    requests: Sequence[Any],
    stop_ids: Sequence[int],
    finished: Callable[[str, Sampled], None],
    graphs: Graphs | None = None,
) -> None:
    """Sample all `requests` (EngineCoreRequest) on vLLM's in-process `core` (EngineCore).

    `finished` is called with a request's id and what it gave, as soon as its burst is over. vLLM's older model runner
    goes by the requests' own stop ids, which have to be the same. After an error in a burst, or in `finished`, a later
    call finds none of these requests.
    """
    for request in requests:
        core.add_request(*core.preprocess_add_request(request))
    worker = core.model_executor.driver_worker.worker
    if not worker.use_v2_model_runner:
        _run_one_by_one(core, finished)
        return
    bursts = Bursts(core.scheduler, worker, stop_ids, graphs)
    try:
        while core.scheduler.has_requests():
            for name, sampled in bursts.turn():
                finished(name, sampled)
    finally:
        bursts.end(list(core.scheduler.requests))


def _run_one_by_one(core: Any, finished: Callable[[str, Sampled], None]) -> None:
    """vLLM's own loop, for its older model runner, which keeps on the host what a next token needs."""
    waiting: dict[str, Sampled] = {}
    while core.scheduler.has_requests() or core.batch_queue:
        found, ran = core.step_fn()
        core.post_step(model_executed=ran)
        for output in found[0].outputs if found else ():
            sampled = waiting.setdefault(output.request_id, Sampled())
            sampled.token_ids += output.new_token_ids
            if output.new_logprobs is not None:
                sampled.logprobs += output.new_logprobs.logprobs[:, 0].tolist()
            if output.new_prompt_logprobs_tensors is not None:
                sampled.prompt_logprobs = output.new_prompt_logprobs_tensors.logprobs[:, 0]
            if output.finish_reason is not None:
                sampled.stopped = str(output.finish_reason) == "stop"
                finished(output.request_id, waiting.pop(output.request_id))


class Bursts:
    """A scheduler and a worker of vLLM, and what their unfinished requests gave so far."""

    def __init__(self, scheduler: Any, worker: Any, stop_ids: Sequence[int], graphs: Graphs | None):
        self.scheduler, self.worker, self.graphs = scheduler, worker, graphs
        self.stop_ids = numpy.array(stop_ids, dtype=numpy.int64)
        self.sampled: dict[str, Sampled] = {}
        self._decoding: set[str] = set()  # requests that have a token which is not computed yet, and nothing else

    def turn(self) -> list[tuple[str, Sampled]]:
        """Ask the scheduler once, and sample what it says. -> the requests that ended, with what they gave."""
        most = self._most()
        self.scheduler.num_lookahead_tokens = most - 1  # behind the first token, which is all the scheduler knows of
        plan = self.scheduler.schedule()
        self._decoding -= plan.preempted_req_ids or set()
        names = list(plan.num_scheduled_tokens)
        length = self.length_of(plan, most) if names else 0
        if names and self.graphs and self._decoding.issuperset(names) and self.graphs.begin(plan):
            return self._take(names, self._by_graphs(self.graphs, names, length), dict.fromkeys(names, 1), {})
        first = self._start(plan)
        if not names:
            return []  # it only told the runner which requests are gone
        drawn = self._by_runner(plan, first, names, length)
        counted = dict(zip(first.model_runner_output.req_ids, first.num_sampled_tokens_np.tolist(), strict=True))
        return self._take(names, drawn, counted, first.prompt_logprobs_dict)

    def _most(self) -> int:
        """Tokens of the next burst, at most: the cache has slots for all sequences' own, so that none is put off."""
        if self._others_wait:
            return BURST_WHILE_OTHERS_WAIT
        blocks = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        groups = len(self.scheduler.kv_cache_config.kv_cache_groups)
        each = blocks // max(1, groups * len(self.scheduler.running))
        return max(1, min(BURST, each * self.scheduler.block_size))

    def length_of(self, plan: Any, most: int) -> int:
        """Tokens of the burst that begins with this plan, `most` at most: 1 while prompts are still being read."""
        running = [self.scheduler.requests[name] for name in plan.num_scheduled_tokens]
        filling = self._others_wait and len(self.scheduler.running) < self.scheduler.max_num_running_reqs
        if any(request.is_prefill_chunk for request in running) or (filling and plan.scheduled_new_reqs):
            return 1
        context = min(self.scheduler.max_model_len - request.num_tokens for request in running)
        wanted = max(request.max_tokens - request.num_output_tokens for request in running)
        return max(1, min(most, context, wanted))

    @property
    def _others_wait(self) -> bool:
        return bool(len(self.scheduler.waiting) or len(self.scheduler.skipped_waiting))

    def _by_graphs(self, graphs: Graphs, names: Sequence[str], length: int, taken: int = 0) -> list[Drawn]:
        """The tokens of a burst that `graphs` has begun, in turn. Some are under way while others are looked at.

        `taken`: tokens of the turn before them."""
        enough = self._enough(names, taken)
        drawn: list[Drawn] = []
        under_way: list[Callable[[], list[Drawn]]] = []
        for first in range(0, length, TOGETHER):
            under_way.append(graphs.launch(first, min(TOGETHER, length - first)))
            if len(under_way) > 1:
                drawn += under_way.pop(0)()
                if enough(drawn):
                    break
        for wait in under_way:
            drawn += wait()
        return drawn

    def _by_runner(self, plan: Any, first: Any, names: list[str], length: int) -> list[Drawn]:
        """The tokens of a burst whose first one the model runner has under way, by graphs from the second on."""
        if length > 1 and self.graphs and self.graphs.begin(self._next(plan, names, 1)):
            return [self._drawn(first, names), *self._by_graphs(self.graphs, names, length - 1, taken=1)]
        enough = self._enough(names)
        drawn: list[Drawn] = []
        under_way = [first]
        for number in range(1, length):
            under_way.append(self._start(self._next(plan, names, number)))
            drawn.append(self._drawn(under_way.pop(0), names))
            if enough(drawn):
                break
        drawn.append(self._drawn(under_way.pop(), names))
        return drawn

    def _enough(self, names: Sequence[str], taken: int = 0) -> Callable[[list[Drawn]], bool]:
        """Whether so many of a burst's sequences are through that it should end. To be asked as its tokens come.

        `taken`: tokens before those that it is asked about."""
        requests = [self.scheduler.requests[name] for name in names]
        limits = numpy.array([request.max_tokens - request.num_output_tokens - taken for request in requests])
        share = len(names) * (ENDED_WHILE_OTHERS_WAIT if self._others_wait else ENDED)
        stopped = numpy.zeros(len(names), dtype=bool)
        seen = 0

        def enough(drawn: list[Drawn]) -> bool:
            nonlocal stopped, seen
            for one in drawn[seen:]:
                stopped |= numpy.isin(one.tokens, self.stop_ids)
            seen = len(drawn)
            return (stopped | (limits <= seen)).sum() >= share

        return enough

    def _next(self, first: Any, names: list[str], number: int) -> Any:
        """The plan of a burst's token `number`, for the sequences of its `first` plan, which is number 0."""
        # The scheduler has counted the burst's first step; each later one computes the token drawn before it.
        computed = [self.scheduler.requests[name].num_computed_tokens + number - 1 for name in names]
        plan = type(first).make_empty()
        plan.scheduled_cached_reqs = replace(
            plan.scheduled_cached_reqs,
            req_ids=names,
            new_block_ids=[None] * len(names),
            num_computed_tokens=computed,
        )
        plan.num_scheduled_tokens = dict.fromkeys(names, 1)
        plan.total_num_scheduled_tokens = len(names)
        return plan

    def _start(self, plan: Any) -> Any:
        """Have a step done on the card; its results are copied to the host when it is through."""
        done = self.worker.execute_model(plan)
        return self.worker.sample_tokens(None) if done is None else done

    def _drawn(self, step: Any, names: list[str]) -> Drawn:
        """A step's results, once it is through, in the order of `names`."""
        step.copy_event.synchronize()
        tokens = step.sampled_token_ids[:, 0]
        tensors = step.logprobs_tensors
        logprobs = numpy.zeros(len(tokens), numpy.float32) if tensors is None else tensors.logprobs[:, 0].numpy()
        own = step.model_runner_output.req_ids
        if own == names:
            return Drawn(tokens, logprobs)
        places = {name: i for i, name in enumerate(own)}
        order = numpy.array([places[name] for name in names])
        return Drawn(tokens[order], logprobs[order])

    def _take(
        self, names: Sequence[str], drawn: Sequence[Drawn], counted: Mapping[str, int], of_prompts: Mapping[str, Any]
    ) -> list[tuple[str, Sampled]]:
        """Add what a burst drew to its requests, tell the scheduler, and give those that ended.

        `counted`: 0 for a request of which only a part of the prompt was read. `of_prompts`: scores of prompts.
        """
        tokens = numpy.stack([one.tokens for one in drawn], axis=1)  # [S, length]
        logprobs = numpy.stack([one.logprobs for one in drawn], axis=1)
        stops = numpy.isin(tokens, self.stop_ids)
        ends = numpy.where(stops.any(1), stops.argmax(1) + 1, len(drawn) + 1).tolist()
        ended: list[tuple[str, Sampled]] = []
        for name, ids, scores, end in zip(names, tokens.tolist(), logprobs.tolist(), ends, strict=True):
            sampled = self.sampled.setdefault(name, Sampled())
            of_prompt = of_prompts.get(name)
            if of_prompt is not None:
                sampled.prompt_logprobs = of_prompt.logprobs[:, 0]
            if not counted[name]:
                continue
            request = self.scheduler.requests[name]
            left = request.max_tokens - len(sampled.token_ids)
            kept = min(end, left, len(drawn))
            sampled.token_ids += ids[:kept]
            sampled.logprobs += scores[:kept]
            if end <= kept or left <= kept:
                sampled.stopped = end <= kept
                ended.append((name, self.sampled.pop(name)))
                self._decoding.discard(name)
            else:
                request.append_output_token_ids(ids[:kept])
                request.num_computed_tokens += len(drawn) - 1
                request.take_prefill_stats()  # left there, they would be taken for those of a prompt read again
                self._decoding.add(name)
        self.end([name for name, _ in ended])
        return ended

    def end(self, names: Sequence[str]) -> None:
        """Tell the scheduler that these requests are over."""
        if names:
            status = type(self.scheduler.requests[names[0]].status).FINISHED_STOPPED
            self.scheduler.finish_requests(names, status)
