"""Bursts against a stand-in for vLLM's scheduler and worker, which are only there on a GPU machine.

The stand-in draws every token as a function of its sequence and position, as vLLM's seeded sampler does, and asserts
what the real worker relies on: computed tokens counted right, slots allocated, at most two steps under way.
"""

import enum
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy
import pytest
import torch

from reasoner.rollout import vllm_bursts
from reasoner.rollout.vllm_bursts import Sampled, run_requests

CONTEXT, STOPS = 90, (3, 11)


def token(name: str, position: int) -> int:
    return (37 * int(name) + 101 * position + position * position) % 43


def logprob(name: str, position: int) -> float:
    return -float(position) - int(name) / 128  # exact in float32


class Status(enum.Enum):
    WAITING = 0
    FINISHED_STOPPED = 1


@dataclass
class Request:
    request_id: str
    num_prompt: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    slots: int = 0
    is_prefill_chunk: bool = False
    status: Status = Status.WAITING

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens)

    def append_output_token_ids(self, ids: list[int]) -> None:
        self.tokens += ids

    def take_prefill_stats(self) -> None: ...


@dataclass
class Cached:
    req_ids: list
    new_block_ids: list
    num_computed_tokens: list


@dataclass
class Plan:
    scheduled_new_reqs: list
    scheduled_cached_reqs: Cached
    num_scheduled_tokens: dict
    total_num_scheduled_tokens: int = 0
    preempted_req_ids: set | None = None

    @classmethod
    def make_empty(cls) -> "Plan":
        return cls([], Cached([], [], []), {})


class Scheduler:
    max_model_len = CONTEXT
    block_size = 4
    kv_cache_config = SimpleNamespace(kv_cache_groups=["all layers"])

    def __init__(self, places: int, budget: int):
        self.max_num_running_reqs, self.budget = places, budget
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.skipped_waiting: list[Request] = []
        self.running: list[Request] = []
        self.gone: set[str] = set()
        self.asked = 0
        self.num_blocks = 10_000
        self.preempts: tuple[int, ...] = ()  # when it is asked so often, it takes the last request's place away
        self.kv_cache_manager = SimpleNamespace(block_pool=SimpleNamespace(get_num_free_blocks=self._free))

    def _free(self) -> int:
        return self.num_blocks - sum(-(-request.slots // self.block_size) for request in self.running)

    def has_requests(self) -> bool:
        return bool(self.requests or self.gone)

    def schedule(self) -> Plan:
        self.asked += 1
        left, plan = self.budget, Plan.make_empty()
        if self.asked in self.preempts:
            put_off = self.running.pop()
            put_off.num_computed_tokens = put_off.slots = 0
            plan.preempted_req_ids = {put_off.request_id}
        new: list[Request] = []
        while self.waiting and len(self.running) + len(new) < self.max_num_running_reqs:
            new.append(self.waiting.pop(0))
        for request in (*self.running, *new):
            count = min(request.num_tokens - request.num_computed_tokens, left)
            if count == 0:
                if request in new:
                    new.remove(request)
                    self.waiting.append(request)
                continue
            left -= count
            if request not in new:
                plan.scheduled_cached_reqs.req_ids.append(request.request_id)
                plan.scheduled_cached_reqs.num_computed_tokens.append(request.num_computed_tokens)
            request.num_computed_tokens += count
            request.slots = min(request.num_computed_tokens + self.num_lookahead_tokens, CONTEXT)
            request.is_prefill_chunk = request.num_computed_tokens < request.num_tokens
            plan.num_scheduled_tokens[request.request_id] = count
        self.running += new
        if self.asked in self.preempts:
            self.waiting.insert(0, put_off)
        plan.scheduled_new_reqs = [request.request_id for request in new]
        plan.total_num_scheduled_tokens = sum(plan.num_scheduled_tokens.values())
        self.gone = set()
        assert self._free() >= 0, "a sequence would be put off for slots that others may never fill"
        return plan

    def finish_requests(self, names: list[str], status: Status) -> None:
        for name in names:
            request = self.requests.pop(name)
            request.status = status
            (self.running if request in self.running else self.waiting).remove(request)
            self.gone.add(name)


class Worker:
    use_v2_model_runner = True

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.computed: dict[str, int] = {}  # what lies on the card
        self.under_way = 0
        self.steps = 0

    def execute_model(self, plan: Plan):
        if not plan.num_scheduled_tokens:
            return "nothing to do"
        self.plan = plan
        for name in plan.scheduled_new_reqs:
            self.computed[name] = 0
        cached = plan.scheduled_cached_reqs
        assert [self.computed[name] for name in cached.req_ids] == cached.num_computed_tokens
        return None

    def sample_tokens(self, grammar: None):
        self.steps += 1
        self.under_way += 1
        assert self.under_way <= 2
        scheduled = self.plan.num_scheduled_tokens
        names = sorted(scheduled, key=lambda name: scheduled[name])
        counts, tokens, logprobs = [], [], []
        for name in names:
            self.computed[name] += scheduled[name]
            request = self.scheduler.requests[name]
            position = self.computed[name]  # of the token that is drawn
            assert position <= request.slots and position < CONTEXT + 1
            counts.append(int(position >= request.num_tokens))  # what it drew before is read again
            tokens.append(token(name, position))
            logprobs.append(logprob(name, position))

        def synchronize() -> None:
            self.under_way -= not done
            done.append(True)

        done: list[bool] = []
        return SimpleNamespace(
            sampled_token_ids=numpy.array(tokens)[:, None],
            logprobs_tensors=SimpleNamespace(logprobs=torch.tensor(logprobs)[:, None]),
            num_sampled_tokens_np=numpy.array(counts),
            prompt_logprobs_dict={name: SimpleNamespace(logprobs=torch.ones(4, 1)) for name in names if name == "0"},
            model_runner_output=SimpleNamespace(req_ids=names),
            copy_event=SimpleNamespace(synchronize=synchronize),
        )


class Graphs:
    """A stand-in for vllm_decode.py: no host between tokens, but sequences with a prompt to read are none for it."""

    def __init__(self, worker: Worker, most: int):
        self.worker, self.most = worker, most
        self.steps = self.under_way = 0

    def begin(self, plan: Plan) -> bool:
        if len(plan.num_scheduled_tokens) > self.most:
            return False
        worker = self.worker
        assert not plan.scheduled_new_reqs and set(plan.num_scheduled_tokens.values()) == {1}
        cached = plan.scheduled_cached_reqs
        assert [worker.computed[name] for name in cached.req_ids] == cached.num_computed_tokens
        for name in plan.num_scheduled_tokens:
            assert worker.computed[name] >= worker.scheduler.requests[name].num_tokens - 1
        self.names, self.drawn = list(plan.num_scheduled_tokens), 0
        return True

    def launch(self, first: int, count: int):
        assert first == self.drawn and self.under_way <= 1
        self.under_way += 1
        self.drawn += count
        found = []
        for _ in range(count):
            self.steps += 1
            places = []
            for name in self.names:
                self.worker.computed[name] += 1
                position = self.worker.computed[name]
                assert position <= self.worker.scheduler.requests[name].slots and position < CONTEXT + 1
                places.append((token(name, position), logprob(name, position)))
            tokens, logprobs = zip(*places, strict=True)
            found.append(vllm_bursts.Drawn(numpy.array(tokens), numpy.array(logprobs, dtype=numpy.float32)))

        def wait() -> list:
            self.under_way -= 1
            return found

        return wait


def make_core(places: int, budget: int) -> SimpleNamespace:
    scheduler = Scheduler(places, budget)

    def add(request: Request, wave: int) -> None:
        scheduler.requests[request.request_id] = request
        scheduler.waiting.append(request)

    return SimpleNamespace(
        preprocess_add_request=lambda request: (request, 0),
        add_request=add,
        scheduler=scheduler,
        model_executor=SimpleNamespace(driver_worker=SimpleNamespace(worker=Worker(scheduler))),
    )


def run(
    lengths: list[tuple[int, int]],
    *,
    places: int = 8,
    budget: int = 64,
    stops: tuple[int, ...] = STOPS,
    graphs: int = 0,
    num_blocks: int = 10_000,
    preempts: tuple[int, ...] = (),
) -> tuple[dict[str, Sampled], Worker]:
    """`graphs`: for so many sequences at most."""
    core = make_core(places, budget)
    core.scheduler.num_blocks, core.scheduler.preempts = num_blocks, preempts
    worker = core.model_executor.driver_worker.worker
    worker.graphs = Graphs(worker, graphs) if graphs else None
    found: dict[str, Sampled] = {}

    def finished(name: str, sampled: Sampled) -> None:
        assert name not in found
        found[name] = sampled

    run_requests(core, [Request(str(i), *pair) for i, pair in enumerate(lengths)], stops, finished, worker.graphs)
    return found, worker


def expected(name: str, num_prompt: int, max_tokens: int) -> tuple[list[int], list[float], bool]:
    ids, scores = [], []
    while len(ids) < max_tokens:
        position = num_prompt + len(ids)
        ids.append(token(name, position))
        scores.append(logprob(name, position))
        if ids[-1] in STOPS:
            return ids, scores, True
    return ids, scores, False


def test_the_older_model_runner_goes_token_by_token():
    """vLLM's own steps: some give nothing, some a part of a prompt's scores, and requests end in any order."""

    def output(name: str, ids: list[int], reason: str | None = None, scores: object = None) -> SimpleNamespace:
        logprobs = SimpleNamespace(logprobs=numpy.array([[-float(i)] for i in ids])) if ids else None
        return SimpleNamespace(
            request_id=name, new_token_ids=ids, new_logprobs=logprobs, new_prompt_logprobs_tensors=scores,
            finish_reason=reason,
        )  # fmt: skip

    of_prompt = SimpleNamespace(logprobs=torch.tensor([[-1.0], [-2.0]]))
    steps: list[list[SimpleNamespace] | None] = [
        [output("0", [5]), output("1", [6], None, of_prompt)],
        None,
        [output("1", [3], "stop")],
        [output("0", [7], "length")],
    ]
    added: list[str] = []
    core = SimpleNamespace(
        preprocess_add_request=lambda name: (name, 0),
        add_request=lambda name, wave: added.append(name),
        scheduler=SimpleNamespace(has_requests=lambda: len(steps) > 1),
        batch_queue=steps,  # the last result is still under way when the scheduler has nothing left
        post_step=lambda model_executed: None,
        model_executor=SimpleNamespace(
            driver_worker=SimpleNamespace(worker=SimpleNamespace(use_v2_model_runner=False))
        ),
    )

    def step_fn():
        outputs = steps.pop(0)
        return (None if outputs is None else {0: SimpleNamespace(outputs=outputs)}), True

    core.step_fn = step_fn
    found: dict[str, Sampled] = {}
    run_requests(core, ["0", "1"], STOPS, found.__setitem__)
    assert added == ["0", "1"] and list(found) == ["1", "0"]
    assert (found["0"].token_ids, found["0"].logprobs, found["0"].stopped) == ([5, 7], [-5.0, -7.0], False)
    assert (found["1"].token_ids, found["1"].stopped) == ([6, 3], True)
    scores = found["1"].prompt_logprobs
    assert scores is not None and scores.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("graphs", [0, 2, 64])
@pytest.mark.parametrize("burst", [1, 2, 5, 32, 128])
@pytest.mark.parametrize(("places", "budget"), [(8, 64), (3, 64), (40, 7), (2, 5), (40, 400)])
def test_the_length_of_bursts_changes_no_token(
    burst: int, graphs: int, places: int, budget: int, monkeypatch: pytest.MonkeyPatch
):
    """Ends inside a burst, limits, prompts in parts, more sequences than places, the end of the context."""
    monkeypatch.setattr(vllm_bursts, "BURST", burst)
    monkeypatch.setattr(vllm_bursts, "BURST_WHILE_OTHERS_WAIT", min(burst, 8))
    lengths = [(5 + 7 * i % 31, 1 + 11 * i % 59) for i in range(20)] + [(CONTEXT - 9, 9), (1, CONTEXT - 1)]
    found, worker = run(lengths, places=places, budget=budget, graphs=graphs)
    assert graphs < 64 or (worker.graphs.steps > 0 and worker.graphs.under_way == 0)
    assert sorted(found, key=int) == [str(i) for i in range(len(lengths))]
    for i, (num_prompt, max_tokens) in enumerate(lengths):
        ids, scores, stopped = expected(str(i), num_prompt, max_tokens)
        assert (found[str(i)].token_ids, found[str(i)].logprobs, found[str(i)].stopped) == (ids, scores, stopped), i
    assert {found[str(i)].stopped for i in range(20)} == {True, False}
    assert worker.under_way == 0 and found["0"].prompt_logprobs is not None and found["1"].prompt_logprobs is None


def test_the_scheduler_is_asked_once_a_burst():
    lengths = [(4, 64)] * 6
    ends = [len(expected(str(i), *pair)[0]) for i, pair in enumerate(lengths)]
    _, worker = run(lengths)
    assert worker.scheduler.asked <= 2 + max(ends) // 8  # without bursts: one for each of the longest's tokens
    assert worker.steps <= max(ends) + 1  # and hardly a step in vain: the one under way when the last one ends


def test_tokens_ahead_take_no_slots_that_another_sequence_needs():
    """Four sequences of 4 + 60 tokens fill 64 blocks of 4; a burst of 128 ahead of each would want twice as many."""
    found, worker = run([(4, 60)] * 4, stops=(), graphs=64, num_blocks=66)
    assert len(found) == 4 and worker.graphs.steps == 59  # behind the first token, with which prompts are read


@pytest.mark.parametrize("budget", [64, 7])
def test_a_request_that_lost_its_place_reads_again_what_it_had_and_goes_on(
    budget: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vllm_bursts, "BURST", 16)
    lengths = [(4, 64), (9, 80), (6, 60)]
    found, worker = run(lengths, stops=(), graphs=64, budget=budget, preempts=(5, 7))
    assert worker.graphs.steps > 40 and worker.scheduler.asked > 8
    for i, (num_prompt, max_tokens) in enumerate(lengths):
        ids = [token(str(i), num_prompt + k) for k in range(max_tokens)]
        assert found[str(i)].token_ids == ids and found[str(i)].logprobs[-1] == logprob(
            str(i), num_prompt + len(ids) - 1
        )


def test_a_burst_by_graphs_ends_soon_after_half_of_its_sequences_did():
    ends = sorted(len(expected(str(i), 4, 64)[0]) for i in range(8))
    _, worker = run([(4, 64)] * 8, graphs=64)
    assert worker.scheduler.asked > 2 and worker.graphs.steps + worker.steps <= ends[-1] + 3 * vllm_bursts.TOGETHER


def test_places_that_are_free_are_filled_before_the_burst_is_over():
    """While sequences wait, a burst ends when an eighth of it is through; when none do, at half of it."""
    lengths = [(4, 64)] * 8 + [(4, 4)] * 22  # of ten places two are wanted again and again
    found, worker = run(lengths, places=10, stops=())
    assert len(found) == 30 and worker.steps < 68, worker.steps


def test_a_call_after_an_error_finds_nothing_of_the_one_before():
    core = make_core(places=3, budget=64)

    def refuse(name: str, sampled: Sampled) -> None:
        raise ValueError(name)

    with pytest.raises(ValueError):
        run_requests(core, [Request(str(i), 5, 5 + 20 * i) for i in range(6)], (), refuse)
    assert not core.scheduler.requests and not core.scheduler.waiting and not core.scheduler.running
    found: dict[str, Sampled] = {}
    run_requests(core, [Request("9", 4, 30)], (), found.__setitem__)
    assert list(found) == ["9"] and found["9"].token_ids == [token("9", 4 + i) for i in range(30)]
