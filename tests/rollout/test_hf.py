"""The hf engine's own parts, against numbers worked out by hand. Rows are PITFALLS.md A and C."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from reasoner import config
from reasoner.errors import GuardTripped, ModelError
from reasoner.models.policy import Policy
from reasoner.rollout.engine import Sampling
from reasoner.rollout.hf import HfEngine, completion_lengths, head_logits, left_padded, pick, uniform_draws
from reasoner.types import Completion, Prompt
from tests.models.tiny_models import lora_of, make_policy

TOKENIZERS = Path(__file__).parents[2] / "../shared/data/tokenizers"


def prompt_of(*token_ids: int, name: str = "test:0") -> Prompt:
    return Prompt(id=name, text="", answer="", columns={}, token_ids=token_ids)


def engine_of(policy: Policy, decode: Callable[[Sequence[int]], str] = str, **limits: int) -> HfEngine:
    return HfEngine(policy, decode, **{"max_context": 64, "max_sequences": 8, **limits})


def sampling(**changes: object) -> Sampling:
    values = {"temperature": 1.0, "max_tokens": 8, "num_completions": 3, "stop_ids": (2,), "seed": 0}
    return Sampling(**{**values, **changes})  # type: ignore[arg-type]


def sampled_ids(policy: Policy, **changes: object) -> list[tuple[int, ...]]:
    (completions,) = engine_of(policy).generate([prompt_of(3, 9, 4)], sampling(**changes), policy_step=0)
    return [completion.token_ids for completion in completions]


def test_c1_pick_divides_logits_by_the_temperature_before_the_softmax():
    """softmax([1, 2, 3] / 0.5) = e^[2, 4, 6] / (e^2 + e^4 + e^6) = [0.0159, 0.1173, 0.8668]."""
    total = math.exp(2) + math.exp(4) + math.exp(6)
    edges = [math.exp(2) / total, (math.exp(2) + math.exp(4)) / total]
    draws = torch.tensor([0.0, edges[0] - 1e-6, edges[0] + 1e-6, edges[1] - 1e-6, edges[1] + 1e-6, 1 - 2**-53])
    ids, logprobs = pick(torch.tensor([[1.0, 2.0, 3.0]]).repeat(6, 1), draws.double(), 0.5)
    assert ids.tolist() == [0, 0, 1, 1, 2, 2]
    right = [math.log(math.exp(2 * (i + 1)) / total) for i in ids.tolist()]
    assert logprobs.tolist() == pytest.approx(right, abs=1e-6)


def test_pick_at_temperature_0_is_the_argmax_with_its_logprob_at_temperature_1():
    ids, logprobs = pick(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0.0], dtype=torch.float64), 0.0)
    assert ids.tolist() == [1]
    assert logprobs.tolist() == pytest.approx([-math.log(math.exp(-2) + 1 + math.exp(-1))], abs=1e-6)


@pytest.mark.parametrize("num_ids", [512, 50_000])
def test_a11_every_id_has_an_interval_of_draws_as_long_as_its_probability(num_ids):
    """The middle of each interval draws its id, up to what float32 probabilities can place; the rarest have one too."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_ids, generator=generator)
    probabilities = logits.double().softmax(0)
    middles = probabilities.cumsum(0) - probabilities / 2
    rare = probabilities.argsort()[:200]
    chosen = torch.cat([rare, torch.arange(0, num_ids, max(1, num_ids // 300))])
    ids, logprobs = pick(logits.repeat(len(chosen), 1), middles[chosen], 1.0)
    assert torch.isfinite(logprobs).all()
    wide = probabilities[chosen] > 1e-7  # what float32 probabilities can place
    assert torch.equal(ids[wide], chosen[wide])
    assert (ids - chosen).abs().max() <= 2
    assert torch.allclose(logprobs.double(), probabilities[ids].log(), atol=1e-5)


def test_pick_never_takes_what_has_no_probability():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    draws = torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    ids, logprobs = pick(logits.repeat(4, 1), draws, 1.0)
    assert ids.tolist() == [1, 1, 3, 3]
    assert logprobs.tolist() == pytest.approx([math.log(0.5)] * 4)


def test_c4_lengths_go_up_to_and_with_the_first_stop_id():
    rows = torch.tensor([[7, 2, 9, 9], [7, 8, 9, 2], [7, 8, 9, 9], [5, 2, 5, 2]])
    assert completion_lengths(rows, (2,)) == [2, 4, 4, 2]
    assert completion_lengths(rows, (2, 5)) == [2, 4, 4, 1]
    assert completion_lengths(rows, ()) == [4, 4, 4, 4]


def test_a15_prompts_are_padded_on_the_left_with_their_own_positions():
    ids, mask, positions = left_padded([(7,), (8, 9, 4)], 2)
    assert ids.tolist() == [[0, 0, 7], [8, 9, 4]]
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert positions.tolist() == [[0, 0, 0], [0, 1, 2]]


def test_d13_draws_belong_to_seed_step_prompt_and_how_often_it_came():
    a, b = prompt_of(3, name="a"), prompt_of(3, name="b")
    both = uniform_draws([a, b], sampling(), 4)
    assert both.shape == (6, 8) and both.dtype == torch.float64
    assert torch.equal(uniform_draws([b], sampling(), 4), both[3:])
    assert torch.equal(uniform_draws([b, a], sampling(), 4).roll(3, 0), both)
    assert torch.equal(uniform_draws([a, a], sampling(), 4)[:3], both[:3])
    different = [
        uniform_draws([a, a], sampling(), 4)[3:],
        both[3:],
        uniform_draws([a], sampling(), 5),
        uniform_draws([a], sampling(seed=1), 4),
    ]
    assert not any(torch.equal(other, both[:3]) for other in different)
    assert len(set(both.flatten().tolist())) == both.numel()


def test_every_token_is_drawn_with_its_own_number():
    """Where all ids are equally likely, token t is floor(V x draw t)."""
    policy, some = make_policy(), sampling(stop_ids=())
    with torch.no_grad():
        policy.head_weight.zero_()
    prompts = [prompt_of(3, name="a"), prompt_of(3, 4, name="b")]
    completions = engine_of(policy).generate(prompts, some, policy_step=4)
    draws = uniform_draws(prompts, some, 4)
    assert [list(c.token_ids) for several in completions for c in several] == (draws * 64).long().tolist()


def test_c20_a_16_bit_head_gives_float32_logits():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (5, 100))
    logits = head_logits(hidden, weight)
    truth = hidden.double() @ weight.double().T
    assert logits.dtype == torch.float32
    assert (logits - truth).abs().max() < 1e-4
    assert ((hidden @ weight.T) - truth).abs().max() > 0.01  # what the model's own forward would have given
    assert head_logits(hidden.double(), weight.double()).dtype == torch.float64


def chain(policy: Policy, ids: Sequence[int]) -> None:
    """Make a policy whose likeliest token after ids[k] is ids[k + 1], whatever came before."""
    base = policy.base
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
        embedding.zero_()
        head.zero_()
        for k, (here, following) in enumerate(pairwise(ids)):
            embedding[here, k] = head[following, k] = 10.0


def gpt2_completion(ids: Sequence[int], stop: int) -> tuple[Completion, Callable[[str], list[int]]]:
    """What the engine makes of a policy that says exactly `ids` after <|endoftext|>, and the tokenizer's encode."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / "gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    policy = make_policy("llama", vocab_size=len(tokenizer))
    chain(policy, [tokenizer.eos_token_id, *ids])
    engine = engine_of(policy, lambda some: tokenizer.decode(some, clean_up_tokenization_spaces=False))
    greedy = sampling(temperature=0.0, num_completions=1, stop_ids=(stop,))
    ((completion,),) = engine.generate([prompt_of(tokenizer.eos_token_id)], greedy, policy_step=0)
    return completion, tokenizer.encode


needs_gpt2 = pytest.mark.skipif(not (TOKENIZERS / "gpt2").is_dir(), reason="needs ../shared/data/tokenizers/gpt2")


@needs_gpt2
def test_a7_sampled_ids_are_kept_where_their_text_would_encode_to_others():
    completion, encode = gpt2_completion([256, 258, 13], stop=13)
    assert completion.token_ids == (256, 258, 13)
    assert encode(completion.text) == [262]


@needs_gpt2
def test_a9_text_keeps_special_tokens_and_leaves_out_the_final_stop_id():
    think, end_think, stop = 50257, 50258, 50256
    completion, _ = gpt2_completion([think, 64, end_think, 19, stop], stop=stop)
    assert completion.token_ids == (think, 64, end_think, 19, stop)
    assert completion.text == "<think>a</think>4"
    assert completion.finish_reason == "stop"


def test_a11_a_checkpoints_generation_config_changes_nothing():
    policy, spiced = make_policy(), make_policy()
    spiced.base.generation_config = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.01, repetition_penalty=5.0, eos_token_id=9, max_new_tokens=1
    )
    assert sampled_ids(spiced) == sampled_ids(policy)


def flags(policy: Policy) -> list[bool]:
    return [module.training for module in policy.model.modules()]


# transformers 5.24's name for it is not there in 5.17
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("fails", [False, True])
def test_modes_attention_and_gradients_are_as_before_sampling_also_after_an_error(fails):
    """Dropout and recomputation are off while sampling, so that ids do not change, and on again afterwards."""
    policy = make_policy(lora=lora_of("llama", dropout=0.5))
    quiet = sampled_ids(policy)
    policy.base.gradient_checkpointing_enable()
    policy.train_mode(dropout=True)
    before, attention = flags(policy), policy.base.config._attn_implementation
    assert True in before and False in before
    if fails:
        with pytest.raises(AssertionError, match="has no tokens"):
            engine_of(policy).generate([prompt_of()], sampling(), policy_step=0)
        handle = policy.base.model.register_forward_pre_hook(out_of_memory)
        with pytest.raises(ModelError, match=r"sampling 8 completions at once: lower rollout\.max_sequences"):
            sampled_ids(policy)
        handle.remove()
    else:
        assert sampled_ids(policy) == quiet
    assert flags(policy) == before
    assert policy.base.config._attn_implementation == attention == "reasoner_packed"
    assert torch.is_grad_enabled()


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("injected")


def test_scores_that_are_not_finite_trip_a_guard():
    policy = make_policy()
    with torch.no_grad():
        policy.base.model.norm.weight[0] = float("nan")
    with pytest.raises(GuardTripped, match="not finite at policy step 7"):
        engine_of(policy).generate([prompt_of(3)], sampling(), policy_step=7)


def test_images_are_refused():
    prompt = Prompt(id="test:0", text="", answer="", columns={}, token_ids=(3,), images=(object(),))
    with pytest.raises(ModelError, match="images"):
        engine_of(make_policy()).generate([prompt], sampling(), policy_step=0)


def test_a_model_without_a_key_value_cache_is_refused():
    policy = make_policy()

    def forward(input_ids: Tensor, cache_params: object = None) -> Tensor:
        return input_ids

    policy.base.model.forward = forward
    with pytest.raises(ModelError, match="LlamaModel keeps no key-value cache"):
        engine_of(policy)


def test_rows_that_ended_leave_the_batch_and_the_others_go_on_alike():
    """Completions that go on after others ended are those that would come with no stop id, cut at it."""
    policy = make_policy()
    many = {"num_completions": 8, "max_tokens": 30}
    free = sampled_ids(policy, stop_ids=(), **many)
    widths: list[int] = []
    handle = policy.base.model.register_forward_pre_hook(
        lambda _, __, inputs: widths.append(len(inputs["input_ids"])), with_kwargs=True
    )
    stops = tuple(range(2, 64, 6))
    stopped = sampled_ids(policy, stop_ids=stops, **many)
    sampled_ids(policy, stop_ids=(), num_completions=20, max_tokens=2)
    handle.remove()
    ends = [next((t + 1 for t, i in enumerate(ids) if i in stops), len(ids)) for ids in free]
    assert stopped == [ids[:end] for ids, end in zip(free, ends, strict=True)]
    assert widths[0] == 1  # the prompt is read once for its eight completions
    assert widths[1] > widths[-7]
    assert widths[-6:] == [1, 8, 1, 8, 1, 4]  # never more than max_sequences at once


@pytest.mark.gpu
def test_c20_on_cuda_bfloat16_sampling_logprobs_are_near_the_trainers_and_the_generator_is_left_alone():
    from tests.rollout.test_engine_contract import trainer_logprobs

    policy = make_policy("llama", lora=lora_of("llama"), vocab_size=512)
    policy.model.to("cuda")
    for weight in policy.base.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()
    state = torch.cuda.get_rng_state()
    engine = engine_of(policy, max_sequences=64)
    prompts = [prompt_of(3, *range(40, 40 + i), name=str(i)) for i in range(8)]
    completions = engine.generate(prompts, sampling(temperature=0.6, max_tokens=20), policy_step=0)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert engine.generate(prompts, sampling(temperature=0.6, max_tokens=20), policy_step=0) == completions
    pairs = [(p.token_ids, c.token_ids) for p, several in zip(prompts, completions, strict=True) for c in several]
    now = torch.tensor([x for row in trainer_logprobs(policy, pairs, 0.6) for x in row])
    then = torch.tensor([x for several in completions for c in several for x in c.sampling_logprobs])
    assert (now - then).abs().mean() < 0.05
    hidden, weight = torch.randn(5, 64).bfloat16().cuda(), torch.randn(100, 64).bfloat16().cuda()
    assert (head_logits(hidden, weight) - hidden.double() @ weight.double().T).abs().max() < 1e-4


def test_max_sequences_of_the_conf_reaches_the_engine():
    from reasoner.rollout.choice import make_engine

    conf = SimpleNamespace(rollout=config.Rollout(max_sequences=3))
    engine = make_engine("hf", conf, make_policy(), str, max_context=20, kv_bytes=0)
    assert isinstance(engine, HfEngine)
    assert (engine.max_sequences, engine.max_context) == (3, 20)


def test_rows_that_ended_are_handed_over_while_others_go_on():
    engine = engine_of(make_policy("llama", vocab_size=64))
    forwards, handed_at, logits = 0, dict[int, int](), engine._logits

    def counted(*inputs):
        nonlocal forwards
        forwards += 1
        return logits(*inputs)

    engine._logits = counted  # type: ignore[method-assign]
    asked = sampling(num_completions=8, stop_ids=tuple(range(0, 64, 6)), max_tokens=24)
    (found,) = engine.generate(
        [prompt_of(3, 9, 4)], asked, policy_step=0, finished=lambda i, k, one: handed_at.update({k: forwards})
    )
    lengths = {k: len(completion.token_ids) for k, completion in enumerate(found)}
    shortest, longest = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
    assert lengths[shortest] + 2 < lengths[longest]
    assert handed_at[shortest] < handed_at[longest] == lengths[longest]
    assert all(lengths[k] <= at for k, at in handed_at.items())
