"""vLLM on the trainer's weights, on a real card: nothing is copied, every change arrives, sleep loses nothing.

An engine takes seconds to start, so each test makes one and asks it everything. Rows are PITFALLS.md D1-D4 and D11-D14.
"""

import random
from collections.abc import Iterator, Sequence

import numpy
import pytest
import torch

from reasoner import config
from reasoner.errors import GuardTripped, ModelError
from reasoner.models.policy import Policy
from reasoner.rollout.engine import Sampling, asleep
from reasoner.types import Completion, Prompt
from tests.rollout.vllm_models import FAMILIES, VOCABULARY, change, make_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("default"),  # vLLM's imports warn of their own dependencies
]
KV_BYTES = 256 << 20
CONTEXT = 512
PROMPTS = tuple(tuple(3 + (7 * i + k) % 480 for k in range(20 + 11 * i)) for i in range(8))
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def start(policy: Policy, *, dequantize: bool = False, **settings) -> object:
    from reasoner.rollout.vllm_engine import VllmEngine

    rollout = config.Rollout(**{"max_sequences": 64, "max_batched_tokens": 1024, **settings})
    return VllmEngine(policy, str, rollout, max_context=CONTEXT, kv_bytes=KV_BYTES, dequantize=dequantize)


@pytest.fixture
def engines() -> Iterator[list]:
    """Engines to close, whatever happened."""
    made: list = []
    yield made
    for engine in made:
        engine.close()


def prompts_of(rows: Sequence[tuple[int, ...]] = PROMPTS) -> list[Prompt]:
    return [Prompt(id=f"test:{i}", text="", answer="", columns={}, token_ids=ids) for i, ids in enumerate(rows)]


def sampling(**changes) -> Sampling:
    return Sampling(
        **{"temperature": 1.0, "max_tokens": 24, "num_completions": 4, "stop_ids": (), "seed": 0, **changes}
    )


def gaps(policy: Policy, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> torch.Tensor:
    """Engine's - trainer's logprobs of every sampled token: [completions, tokens], equal lengths."""
    rows = []
    for prompt, several in zip(prompts, completions, strict=True):
        for completion in several:
            scored = policy.score(prompt.token_ids + completion.token_ids)[len(prompt.token_ids) - 1 :]
            rows.append(torch.tensor(completion.sampling_logprobs) - scored.cpu())
    return torch.stack(rows)


def activations(engine) -> set[tuple[type, str | None]]:
    """What stands for the activation in the MLPs of vLLM's module, and what its gate and up make of their output."""
    model = engine._core.model_executor.driver_worker.worker.get_model()
    mlps = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    return {(type(mlp.act_fn), mlp.gate_up_proj.quant_method.part.activation) for mlp in mlps}


# The family, whether its base is NF4, and whether a 16-bit base has the adapter's A's as rows below it.
CASES = [(family, True, True) for family in FAMILIES]
CASES += [("llama", False, True), ("qwen2", False, True), ("phi3", False, True), ("gemma3_text", False, True)]
CASES += [("qwen2", False, False)]
NAMES = [f"{f}-{'nf4' if nf4 else 'bf16' if rows else 'bf16-apart'}" for f, nf4, rows in CASES]


@pytest.mark.parametrize(("family", "nf4", "rows"), CASES, ids=NAMES)
def test_one_base_two_readers(family: str, nf4: bool, rows: bool, engines: list) -> None:
    policy = make_policy(family, nf4=nf4, rows=rows)
    assert policy.weights is not None and bool(policy.weights.states) == nf4
    checksum = policy.weights.checksum()
    before = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
    allocated = torch.cuda.memory_allocated()
    engine = start(policy, dequantize=nf4 and family != "llama")
    engines.append(engine)
    assert (engine.built.dequantized is not None) == (nf4 and family != "llama")
    parts = list(engine.adapter._parts.values())
    assert {part.matrix is not None for part in parts} == {rows and not nf4}
    assert activations(engine) == {(torch.nn.Identity, "gelu_tanh" if family.startswith("gemma") else "silu")}
    assert engine.built.peak < 48 << 20, (engine.built, allocated)
    prompts = prompts_of()
    old = None
    for step in range(3):  # three adapters in a row each arrive
        change(policy, seed=10 + step)
        if step:  # D4: what the cache knows of the old adapter is wrong, and a hand-over forgets it
            engine.adapter.load(policy.trainable())
            engine._cached = False  # as if it had been dropped
            stale = engine.generate(prompts, sampling(max_tokens=1, num_completions=1), policy_step=step - 1)
            stale_gap = gaps(policy, prompts, stale).abs().mean()
        engine.load_adapter(policy.trainable(), step)
        completions = engine.generate(prompts, sampling(), policy_step=step)
        off = gaps(policy, prompts, completions)
        assert off.abs().mean() < 0.03 and abs(float(off.exp().mean()) - 1) < 0.02, (step, off.abs().mean())
        if step:
            assert stale_gap > 5 * off[:, 0].abs().mean(), (stale_gap, off[:, 0].abs().mean())
            change(policy, seed=10 + step - 1)
            old = gaps(policy, prompts, completions).abs().mean()
            change(policy, seed=10 + step)
            assert old > 3 * off.abs().mean()  # the old adapter would be seen
    leaves = LEAVES if family != "phi3" else ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    for number, leaf in enumerate(leaves):  # D2: each projection alone
        change(policy, seed=50 + number, std=0.1, only=leaf)
        engine.load_adapter(policy.trainable(), 100 + number)
        completions = engine.generate(prompts, sampling(), policy_step=100 + number)
        off = gaps(policy, prompts, completions).abs().mean()
        with policy.model.disable_adapter():
            without = gaps(policy, prompts, completions).abs().mean()
        assert off < 0.03 and without > 2 * off, (leaf, off, without)
    for name, weight in policy.trainable().items():  # D1: ours are not scaled in place
        if "lora_A" in name:
            assert torch.equal(weight, before[name])
    for _ in range(3):  # D12
        with asleep(engine):
            (-policy.logprobs(batch_of(policy), temperature=1.0).logprobs.sum()).backward()
            for weight in policy.trainable().values():
                assert weight.grad is not None and weight.grad.isfinite().all()
                weight.grad = None
        again = engine.generate(prompts, sampling(), policy_step=99 + len(leaves))
        assert gaps(policy, prompts, again).abs().mean() < 0.03
    assert policy.weights.checksum() == checksum
    for name, weight in policy.trainable().items():
        assert torch.equal(engine.adapter._targets[name], weight.bfloat16())  # the A's, too, are the last that came


def test_a_rank_that_is_no_multiple_of_8_is_padded(engines: list) -> None:
    policy = make_policy("qwen2", nf4=False, r=5)
    engine = start(policy)
    engines.append(engine)
    prompts = prompts_of()
    for step in range(2):
        change(policy, seed=20 + step)
        engine.load_adapter(policy.trainable(), step)
        completions = engine.generate(prompts, sampling(), policy_step=step)
        off = gaps(policy, prompts, completions).abs().mean()
        with policy.model.disable_adapter():
            without = gaps(policy, prompts, completions).abs().mean()
        assert off < 0.03 and without > 2 * off, (step, off, without)
    for part in engine.adapter._parts.values():
        padding = part.matrix[len(part.b) + len(part.a) :]
        assert 0 < len(padding) < 8 and not padding.any()


def batch_of(policy: Policy):
    from reasoner.models.attention import Layout
    from reasoner.models.policy import OneSequence

    ids = torch.arange(3, 203, device=policy.device)
    layout = Layout.of([200], policy.device)
    return OneSequence(ids, layout, layout.positions > 0)


def test_the_contract_of_engines(engines: list) -> None:
    """C3, C4, D13, D14, D18 as for every engine (test_engine_contract.py), on one engine."""
    policy = make_policy("llama", nf4=True)
    states = torch.get_rng_state(), torch.cuda.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    engine = start(policy)
    engines.append(engine)
    prompts = prompts_of()
    first = engine.generate(prompts, sampling(), policy_step=3)
    assert torch.equal(torch.get_rng_state(), states[0]) and torch.equal(torch.cuda.get_rng_state(), states[1])
    assert random.getstate() == states[2] and numpy.random.get_state()[1].tolist() == states[3]
    assert engine.generate(prompts, sampling(), policy_step=3) == first  # an adapter and all, bit for bit
    assert engine.generate(prompts, sampling(), policy_step=4) != first
    assert engine.generate(prompts, sampling(seed=1), policy_step=3) != first
    assert len({c.token_ids for several in first for c in several}) == 4 * len(prompts)
    twice = engine.generate([prompts[0], prompts[0]], sampling(num_completions=8), policy_step=0)
    assert len({c.token_ids for several in twice for c in several}) == 16
    greedy = engine.generate(prompts, sampling(temperature=0.0), policy_step=0)
    assert all(len({c.token_ids for c in several}) == 1 and len(several) == 4 for several in greedy)
    assert gaps(policy, prompts, greedy).abs().mean() < 0.03
    cold = engine.generate(prompts, sampling(temperature=0.6), policy_step=0)
    for several, prompt in zip(cold, prompts, strict=True):  # D8: of the distribution that was sampled from
        for c in several:
            ids = torch.tensor(prompt.token_ids + c.token_ids, device="cuda")
            found = policy.logprobs(one(ids), temperature=0.6).logprobs[len(prompt.token_ids) :]
            assert (torch.tensor(c.sampling_logprobs) - found.detach().cpu()).abs().mean() < 0.06
    stops = tuple(range(0, VOCABULARY, 9))
    stopped = engine.generate(prompts, sampling(stop_ids=stops, num_completions=16), policy_step=0)
    for c in (c for several in stopped for c in several):
        assert not set(c.token_ids[:-1]) & set(stops) and len(c.sampling_logprobs) == len(c.token_ids)
        assert c.finish_reason == ("stop" if c.token_ids[-1] in stops else "length")
        assert c.text == str(c.token_ids[:-1] if c.finish_reason == "stop" else c.token_ids)
    with pytest.raises(ModelError, match=r"prompt test:0 has 500 tokens .* 24, .* context of 512"):
        engine.generate(prompts_of([tuple(range(500))]), sampling(), policy_step=0)
    assert engine.generate([], sampling(), policy_step=0) == []
    many = engine.generate(prompts_of(PROMPTS[:1]), sampling(max_tokens=1, num_completions=4000), policy_step=0)
    seen = {c.token_ids[0] for c in many[0]}
    assert len(seen) > 150 and max(seen) < VOCABULARY  # no hidden top-k


@pytest.mark.parametrize("nf4", [False, True])
def test_a_token_does_not_depend_on_who_draws_it(nf4: bool, engines: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """D14: the graphs of vllm_decode.py against vLLM's own sampler, which draws a token alone; T = 1, 0.7 and 0."""
    policy = make_policy("llama", nf4=nf4)
    engine = start(policy, dequantize=nf4)
    engines.append(engine)
    graphs, prompts = engine._graphs, prompts_of()
    assert graphs is not None
    for temperature in (1.0, 0.7, 0.0):
        ways = []
        for used in (graphs, None):
            engine._graphs = used
            ways.append(engine.generate(prompts, sampling(temperature=temperature, max_tokens=60), policy_step=0))
        pairs = [(a, b) for many, other in zip(*ways, strict=True) for a, b in zip(many, other, strict=True)]
        same = sum(a.token_ids == b.token_ids for a, b in pairs)
        assert same >= 0.8 * len(pairs), (temperature, same)  # a near tie may fall to either side
        for a, b in pairs:
            if a.token_ids == b.token_ids:
                apart = torch.tensor(a.sampling_logprobs) - torch.tensor(b.sampling_logprobs)
                assert apart.abs().max() < 0.1
    assert graphs._captured  # it was not vLLM's sampler twice


def one(ids: torch.Tensor):
    from reasoner.models.attention import Layout
    from reasoner.models.policy import OneSequence

    layout = Layout.of([len(ids)], ids.device)
    return OneSequence(ids, layout, layout.positions > 0)


def test_the_canary_stops_an_engine_that_does_not_follow(engines: list, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("llama", nf4=True)
    engine = start(policy)
    engines.append(engine)
    engine.generate(prompts_of(), sampling(), policy_step=0)
    for step in range(3):
        change(policy, seed=20 + step)
        engine.load_adapter(policy.trainable(), step)
        engine.generate(prompts_of(), sampling(), policy_step=step)
        assert engine.reading.arrived > 0.8
    monkeypatch.setattr(engine.adapter, "load", lambda state: None)
    with pytest.raises(GuardTripped, match="samples from other weights"):
        for step in (3, 4):
            change(policy, seed=27 + step)
            engine.load_adapter(policy.trainable(), step)
            engine.generate(prompts_of(), sampling(), policy_step=step)


def test_a_closed_engine_gives_its_memory_back() -> None:
    from vllm.device_allocator.cumem import CuMemAllocator

    policy = make_policy("llama", nf4=False)
    start(policy).close()  # what libraries take once
    held = torch.cuda.memory_allocated()
    for asleep_before in (False, True):
        engine = start(policy)
        assert CuMemAllocator.get_instance().get_current_usage() >= KV_BYTES
        if asleep_before:
            engine.sleep()
        engine.close()
        assert CuMemAllocator.get_instance().get_current_usage() == 0
        assert torch.cuda.memory_allocated() - held < 16 << 20


def test_it_sleeps_while_a_program_beside_it_takes_memory(engines: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM compares the whole card's free memory before and after, and called that a fault."""
    policy = make_policy("llama", nf4=True)
    engine = start(policy)
    engines.append(engine)
    runner = engine._core.model_executor.driver_worker.worker.model_runner
    assert runner.sampler.penalties_state.output_bin_counts is None  # each sleep would copy them to the host
    assert engine._graphs is not None
    before = engine.generate(prompts_of(), sampling(), policy_step=0)
    free = iter([8 << 30, 7 << 30])
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda *a: (next(free), 16 << 30))
        engine.sleep()
    assert engine.llm.model_executor.is_sleeping
    engine.wake()
    assert engine.generate(prompts_of(), sampling(), policy_step=0) == before


def test_weights_that_diverged_are_not_called_a_bug_of_ours(engines: list) -> None:
    policy = make_policy("llama", nf4=False)
    engine = start(policy)
    engines.append(engine)
    engine.generate(prompts_of(), sampling(), policy_step=0)
    next(iter(policy.trainable().values())).data.fill_(float("nan"))
    engine.load_adapter(policy.trainable(), 1)
    with pytest.raises(GuardTripped, match="scores are not finite at policy step 1: its weights have diverged"):
        engine.generate(prompts_of(), sampling(), policy_step=1)


def test_a_base_with_its_parts_in_disorder_is_refused_by_name(engines: list) -> None:
    policy = make_policy("llama", nf4=False)
    assert policy.weights is not None
    lost = "model.layers.1.self_attn.k_proj.weight"
    policy.weights.tensors[lost] = policy.weights.tensors[lost].clone()
    with pytest.raises(ValueError, match=rf"{lost}.* no neighbours"):
        start(policy)
