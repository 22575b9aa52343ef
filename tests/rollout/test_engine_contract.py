"""What every engine owes the trainer, over engines and model families. Rows are PITFALLS.md A, C and D."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from reasoner.errors import ModelError
from reasoner.grpo.batch import PackedBatch
from reasoner.models.attention import Layout
from reasoner.models.policy import Policy
from reasoner.rollout.engine import Engine, Sampling
from reasoner.rollout.hf import HfEngine
from reasoner.types import Completion, Prompt
from tests.models.tiny_models import FAMILIES, lora_of, make_policy

VOCABULARY = 512
TOKENIZER_SIZE = 500  # A14: the head has more rows than that
HYBRID = {
    "attention": "sdpa",  # it does not pack
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 0,
}
PROMPTS = tuple((3 + i, *range(40 + 7 * i, 40 + 7 * i + (5 * i) % 11)) for i in range(6))  # 1 to 11 tokens, unsorted


def decode(ids: Sequence[int]) -> str:
    return " ".join(str(i) if i < TOKENIZER_SIZE else "?" for i in ids)


def make_hf(policy: Policy, **limits: int) -> Engine:
    return HfEngine(policy, decode, **{"max_context": 64, "max_sequences": 16, **limits})


ENGINES: dict[str, Callable[..., Engine]] = {"hf": make_hf}


@pytest.fixture(params=ENGINES)
def make_engine(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    return ENGINES[request.param]


@cache
def policy_of(family: str, adapter: bool) -> Policy:
    """Made once and changed by no test."""
    lora = lora_of(family) if adapter else None
    return make_policy(family, lora=lora, vocab_size=VOCABULARY, **(HYBRID if family == "qwen3_next" else {}))


POLICIES = [*((family, False) for family in (*FAMILIES, "qwen3_next")), ("llama", True), ("phi3", True)]


@pytest.fixture(params=POLICIES, ids=lambda param: param[0] + "_lora" * param[1])
def policy(request: pytest.FixtureRequest) -> Policy:
    return policy_of(*request.param)


@pytest.fixture
def llama() -> Policy:
    return policy_of("llama", False)


def prompts_of(*token_ids: tuple[int, ...]) -> list[Prompt]:
    return [Prompt(id=f"test:{i}", text="", answer="", columns={}, token_ids=ids) for i, ids in enumerate(token_ids)]


def sampling(**changes: object) -> Sampling:
    values = {"temperature": 1.0, "max_tokens": 12, "num_completions": 2, "stop_ids": (2, 5), "seed": 0}
    return Sampling(**{**values, **changes})  # type: ignore[arg-type]


def ids_of(completions: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in several] for several in completions]


def trainer_logprobs(policy: Policy, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], temperature: float):
    """The policy's own logprobs of completions after their prompts, one list a completion."""
    device = policy.device
    layout = Layout.of([len(prompt) + len(completion) for prompt, completion in sequences], device)
    token_ids = torch.tensor([i for prompt, completion in sequences for i in (*prompt, *completion)], device=device)
    mask = torch.tensor([i >= len(p) for p, c in sequences for i in range(len(p) + len(c))], device=device)
    with torch.no_grad():
        found = policy.logprobs(PackedBatch(token_ids, layout, mask), temperature=temperature).logprobs
    return [x[len(p) :].tolist() for x, (p, _) in zip(found.split(layout.lengths), sequences, strict=True)]


def worst_ratio(policy: Policy, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], **how) -> float:
    """max |exp(trainer's logprob - sampling logprob) - 1| over all tokens; `shift` misaligns the two by that many."""
    shift, temperature = how.get("shift", 0), how.get("temperature", 1.0)
    pairs = [(prompt, c) for prompt, several in zip(prompts, completions, strict=True) for c in several]
    current = trainer_logprobs(policy, [(p.token_ids, c.token_ids) for p, c in pairs], temperature)
    gaps = [
        abs(float(torch.tensor(now - then).exp()) - 1)
        for logprobs, (_, c) in zip(current, pairs, strict=True)
        for now, then in zip(logprobs[shift:], c.sampling_logprobs, strict=not shift)
    ]
    assert len(gaps) > 20
    return max(gaps)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_c1_d8_sampling_logprobs_are_the_trainers(make_engine, policy, temperature):
    """The ratio of the first update is 1: same temperature, same normalizer, same token, in every family."""
    prompts = prompts_of(*PROMPTS)
    completions = make_engine(policy).generate(prompts, sampling(temperature=temperature), policy_step=0)
    assert worst_ratio(policy, prompts, completions, temperature=temperature) < 1e-4


def test_c1_greedy_logprobs_are_the_trainers_at_temperature_1(make_engine, policy):
    prompts = prompts_of(*PROMPTS)
    completions = make_engine(policy).generate(prompts, sampling(temperature=0.0), policy_step=0)
    assert worst_ratio(policy, prompts, completions) < 1e-4


class Cooled(HfEngine):
    """Mutant: a temperature of its own below the one asked for."""

    def _logits(self, *args) -> Tensor:
        return super()._logits(*args) / 0.9


class TopK(HfEngine):
    """Mutant: `generate`'s hidden default, A11."""

    def _logits(self, *args) -> Tensor:
        logits = super()._logits(*args)
        return logits.masked_fill(logits < logits.topk(50).values[:, -1:], float("-inf"))


@pytest.mark.parametrize("mutant", [Cooled, TopK])
def test_c1_a11_the_ratio_shows_an_engine_with_another_distribution(llama, mutant):
    prompts = prompts_of(*PROMPTS)
    engine = mutant(llama, decode, max_context=64, max_sequences=16)
    completions = engine.generate(prompts, sampling(), policy_step=0)
    assert worst_ratio(llama, prompts, completions) > 0.01


def test_c1_the_ratio_shows_a_trainer_with_another_temperature_or_shift(make_engine, llama):
    prompts = prompts_of(*PROMPTS)
    completions = make_engine(llama).generate(prompts, sampling(temperature=0.6), policy_step=0)
    assert worst_ratio(llama, prompts, completions, temperature=1.0) > 0.01
    assert worst_ratio(llama, prompts, completions, temperature=0.6, shift=1) > 0.01


def chi_square(policy: Policy, engine: Engine, num_samples: int = 6000) -> tuple[float, set[int]]:
    """How far first tokens are from the trainer's distribution (mean V - 1, deviation sqrt(2 V)), and the ids seen."""
    (prompt,) = prompts_of((3, 40, 41))
    draw = sampling(max_tokens=1, num_completions=num_samples, stop_ids=())
    seen = Counter(c.token_ids[0] for c in engine.generate([prompt], draw, policy_step=0)[0])
    every = [(prompt.token_ids, (i,)) for i in range(VOCABULARY)]
    expected = num_samples * torch.tensor(trainer_logprobs(policy, every, 1.0)).flatten().double().exp()
    assert float(expected.sum()) == pytest.approx(num_samples, rel=1e-4)
    found = torch.tensor([seen[i] for i in range(VOCABULARY)], dtype=torch.float64)
    return float(((found - expected) ** 2 / expected).sum()), set(seen)


def test_a11_a14_c3_samples_follow_the_trainers_distribution_over_the_whole_head(make_engine):
    """No hidden top-k of 50: hundreds of ids are seen, those beyond the tokenizer too, as often as the trainer says."""
    flat = make_policy("llama", vocab_size=VOCABULARY)
    with torch.no_grad():
        flat.head_weight.mul_(0.5)
    statistic, seen = chi_square(flat, make_engine(flat, max_sequences=6000))
    assert len(seen) > 400
    assert any(i >= TOKENIZER_SIZE for i in seen)
    assert statistic < VOCABULARY + 5 * (2 * VOCABULARY) ** 0.5
    mutant = TopK(flat, decode, max_context=64, max_sequences=6000)
    assert chi_square(flat, mutant)[0] > 2 * VOCABULARY


def test_a10_c4_every_stop_id_ends_a_completion_and_belongs_to_it(make_engine, llama):
    prompts = prompts_of(*PROMPTS)
    stops = tuple(range(0, VOCABULARY, 9))
    completions = make_engine(llama).generate(prompts, sampling(stop_ids=stops, num_completions=40), policy_step=0)
    ends = Counter()
    for completion in (c for several in completions for c in several):
        assert not set(completion.token_ids[:-1]) & set(stops)
        stopped = completion.token_ids[-1] in stops
        ends[completion.token_ids[-1]] += stopped
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(completion.token_ids) == 12
        assert completion.sampled == (True,) * len(completion.token_ids)
        assert len(completion.sampling_logprobs) == len(completion.token_ids)
        assert completion.text == decode(completion.token_ids[:-1] if stopped else completion.token_ids)
    assert sum(count > 0 for count in ends.values()) > 10
    assert {c.finish_reason for several in completions for c in several} == {"stop", "length"}


def test_c4_a_stop_id_as_the_last_token_allowed_is_a_stop(make_engine, llama):
    (prompt,) = prompts_of((3, 40))
    ((first,),) = make_engine(llama).generate(
        [prompt], sampling(temperature=0.0, num_completions=1, stop_ids=(), max_tokens=3), policy_step=0
    )
    assert first.finish_reason == "length" and len(first.token_ids) == 3
    last = sampling(temperature=0.0, num_completions=1, stop_ids=first.token_ids[-1:], max_tokens=3)
    ((second,),) = make_engine(llama).generate([prompt], last, policy_step=0)
    assert second.finish_reason == "stop" and second.token_ids == first.token_ids


def test_a15_a_prompt_gives_the_same_alone_and_beside_longer_ones_in_the_callers_order(make_engine, policy):
    prompts = prompts_of(*PROMPTS)
    greedy = sampling(temperature=0.0, num_completions=1, stop_ids=(2,))
    together = make_engine(policy).generate(prompts, greedy, policy_step=0)
    alone = [make_engine(policy).generate([prompt], greedy, policy_step=0)[0] for prompt in prompts]
    assert ids_of(together) == ids_of(alone)
    assert len({several[0].token_ids for several in together}) == len(prompts)


def test_d13_draws_depend_on_seed_and_step_alone(make_engine, llama):
    prompts = prompts_of(*PROMPTS)
    first = ids_of(make_engine(llama).generate(prompts, sampling(), policy_step=3))
    assert ids_of(make_engine(llama).generate(prompts, sampling(), policy_step=3)) == first
    assert ids_of(make_engine(llama).generate(prompts, sampling(), policy_step=4)) != first
    assert ids_of(make_engine(llama).generate(prompts, sampling(seed=1), policy_step=3)) != first
    for num_at_once in (1, 5, 100):
        engine = make_engine(llama, max_sequences=num_at_once)
        assert ids_of(engine.generate(prompts, sampling(), policy_step=3)) == first
    backwards = make_engine(llama).generate(prompts[::-1], sampling(), policy_step=3)
    assert ids_of(backwards[::-1]) == first


def test_d13_the_processes_own_random_state_is_left_alone(make_engine, policy):
    before = torch.get_rng_state(), random.getstate()
    make_engine(policy).generate(prompts_of(*PROMPTS), sampling(), policy_step=0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_d14_completions_of_a_prompt_differ_also_where_the_prompt_comes_twice(make_engine, llama):
    (prompt,) = prompts_of((3, 40))
    eight, again = make_engine(llama).generate([prompt, prompt], sampling(num_completions=8), policy_step=0)
    assert len({completion.token_ids for completion in (*eight, *again)}) > 12


def test_d18_a_prompt_that_leaves_no_room_is_refused_before_sampling(make_engine, llama):
    calls = []
    hook = llama.base.register_forward_pre_hook(lambda *_: calls.append(1))
    backbone_hook = llama.base.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        engine = make_engine(llama, max_context=14)
        with pytest.raises(ModelError, match=r"prompt test:1 has 3 tokens .* 12, .* context of 14"):
            engine.generate(prompts_of((3,), (3, 4, 5)), sampling(), policy_step=0)
        assert not calls
        engine.generate(prompts_of((3,), (3, 4)), sampling(stop_ids=()), policy_step=0)
        assert calls
    finally:
        hook.remove()
        backbone_hook.remove()


def test_completions_name_the_weights_they_came_from(make_engine, llama):
    engine = make_engine(llama)
    engine.load_adapter(llama.trainable(), 5)
    ((completion, _),) = engine.generate(prompts_of((3, 40)), sampling(), policy_step=5)
    assert (completion.policy_step_min, completion.policy_step_max) == (5, 5)
    with pytest.raises(AssertionError, match="weights of 5, asked for 4"):
        engine.generate(prompts_of((3, 40)), sampling(), policy_step=4)


def test_no_prompts_no_completions(make_engine, llama):
    assert make_engine(llama).generate([], sampling(), policy_step=0) == []


def test_each_completion_is_handed_over_once(make_engine, llama):
    engine = make_engine(llama, max_sequences=8)
    handed: list[tuple[int, int, Completion]] = []
    stops = tuple(range(0, VOCABULARY, 7))
    asked = sampling(num_completions=6, stop_ids=stops, max_tokens=20)
    found = engine.generate(prompts_of(*PROMPTS), asked, policy_step=0, finished=lambda *one: handed.append(one))
    assert len(handed) == len({(i, k) for i, k, _ in handed}) == 36
    assert all(found[i][k] is completion for i, k, completion in handed)
