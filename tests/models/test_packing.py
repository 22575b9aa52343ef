"""Packed logprobs are those of each sequence alone, family by family, and nothing crosses between sequences."""

import dataclasses

import pytest
import torch

from reasoner.models import attention
from reasoner.models.attention import Layout
from reasoner.models.loading import recompute_layers
from reasoner.models.policy import Policy
from tests.models.tiny_models import (
    FAMILIES,
    LENGTHS,
    Batch,
    gradients,
    lora_of,
    make_batch,
    make_model,
    make_policy,
    one_at_a_time,
)


def plain_twin(policy: Policy, family: str) -> torch.nn.Module:
    """The same weights under transformers' own attention."""
    policy.base.set_attn_implementation(policy.family.decode_attention)
    return policy.model


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logprobs_are_those_of_one_sequence_at_a_time(family: str) -> None:
    # B5, H5: temperature 0.7 on top of each family's soft cap or scale; LoRA on with a B that is not zero.
    batch = make_batch()
    policy = make_policy(family, lora=lora_of(family))
    assert policy.family.packs and policy.family.known
    packed = policy.logprobs(batch, temperature=0.7)
    truth = one_at_a_time(plain_twin(policy, family), batch, temperature=0.7)
    spread = truth[batch.completion_mask].std()
    assert packed.logprobs.dtype == torch.float32
    assert spread > 0.3, "a flat model would hide a leak"
    torch.testing.assert_close(packed.logprobs, truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma2", "gemma3_text", "phi3", "cohere", "granite", "gpt_oss"]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_gradients_are_those_of_one_sequence_at_a_time(family: str, recompute: bool) -> None:
    # B7 with recomputation: gradients reach the adapters through a frozen base.
    batch = make_batch()
    weights = torch.linspace(-1, 1, len(batch.token_ids), dtype=torch.float64)
    # Of these two transformers' own forward goes through float32, whatever the model's dtype is.
    dtype, tolerance = (torch.float32, 1e-5) if family in ("gemma2", "gpt_oss") else (torch.float64, 1e-9)
    policy = make_policy(family, lora=lora_of(family), dtype=dtype)
    if recompute:
        recompute_layers(policy.base, "tiny")
    policy.train_mode(dropout=False)
    packed = gradients(policy, (policy.logprobs(batch, temperature=1.0).logprobs * weights).sum())
    policy.eval()
    truth = gradients(policy, (one_at_a_time(plain_twin(policy, family), batch) * weights).sum())
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, truth[name], atol=tolerance, rtol=tolerance)


def test_b5_a_neighbour_gets_no_gradient_and_changes_nothing() -> None:
    policy = make_policy("llama")
    first, second = make_batch((9,), seed=3), make_batch((11,), seed=4)
    both = Batch(torch.cat([first.token_ids, second.token_ids]), Layout.of([9, 11]), torch.arange(20) > 9)
    embedding = policy.base.get_input_embeddings()
    seen: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        output = output.detach().requires_grad_()
        seen.append(output)
        return output

    handle = embedding.register_forward_hook(keep)
    loss = policy.logprobs(both, temperature=1.0).logprobs.sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, seen)
    assert torch.count_nonzero(gradient[0, :9]) == 0
    assert torch.count_nonzero(gradient[0, 9:19]) > 0
    alone = policy.logprobs(second, temperature=1.0).logprobs
    torch.testing.assert_close(policy.logprobs(both, temperature=1.0).logprobs[9:], alone, atol=1e-6, rtol=0)


def test_b6_swapping_the_neighbour_changes_nothing_and_first_tokens_are_never_trained() -> None:
    policy = make_policy("gemma2")
    batch = make_batch((9, 11), seed=5)
    other = dataclasses.replace(batch, token_ids=torch.cat([make_batch((9,), seed=6).token_ids, batch.token_ids[9:]]))
    before, after = (policy.logprobs(one, temperature=1.0) for one in (batch, other))
    assert torch.equal(before.logprobs[9:], after.logprobs[9:]) and torch.equal(before.entropy[9:], after.entropy[9:])
    assert before.logprobs[0] == 0 and before.logprobs[9] == 0
    with pytest.raises(AssertionError, match="first token"):
        policy.logprobs(dataclasses.replace(batch, completion_mask=torch.arange(20) == 9), temperature=1.0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_c16_a_neighbours_nan_stays_there(family: str, bad: int) -> None:
    policy, batch = make_policy(family), make_batch((5, 6, 7), seed=7)  # one bucket: padded side by side
    with torch.no_grad():
        policy.base.get_input_embeddings().weight[1] = float("nan")
        batch.token_ids[batch.layout.sequence_ids == bad] = 1
        hidden = policy._hidden(batch.token_ids, batch.layout)
    assert torch.equal(hidden.isnan().all(1), batch.layout.sequence_ids == bad)
    assert torch.equal(hidden.isnan().any(1), batch.layout.sequence_ids == bad)


def test_b3_index_t_speaks_of_token_t() -> None:
    policy = make_policy("qwen3")
    batch = Batch(torch.tensor([5, 9, 20, 2]), Layout.of([4]), torch.tensor([False, False, True, True]))
    found = policy.logprobs(batch, temperature=1.0)
    logits = make_model("qwen3", attention="sdpa")(input_ids=batch.token_ids[None]).logits[0]
    truth = logits.log_softmax(-1)
    torch.testing.assert_close(
        found.logprobs, torch.stack([*truth.new_zeros(2), truth[1, 20], truth[2, 2]]), atol=1e-5, rtol=0
    )
    entropy = -(truth.exp() * truth).sum(-1)
    torch.testing.assert_close(
        found.entropy, torch.stack([*truth.new_zeros(2), entropy[1], entropy[2]]), atol=1e-5, rtol=0
    )


def test_a14_head_rows_without_a_token_count_in_the_normalizer_as_in_transformers() -> None:
    # 64 rows, tokens below 40 alone: banning the rest here and not in the engine would make every ratio wrong.
    policy = make_policy("llama")
    batch = make_batch(high=40)
    truth = one_at_a_time(make_model("llama", attention="sdpa"), batch)
    found = policy.logprobs(batch, temperature=1.0).logprobs
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=0)
    with torch.no_grad():
        policy.head_weight[40:] = policy.head_weight[40:] * 3
    assert (policy.logprobs(batch, temperature=1.0).logprobs - found)[batch.completion_mask].abs().max() > 0.1


def test_prompts_cost_no_vocabulary_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("llama")
    batch = dataclasses.replace(make_batch((9, 11)), completion_mask=torch.arange(20) > 16)
    rows: list[int] = []
    original = policy.logprobs.__func__.__globals__["linear_logprobs"]

    def counting(hidden: torch.Tensor, *arguments: object, **options: object) -> object:
        rows.append(len(hidden))
        return original(hidden, *arguments, **options)

    monkeypatch.setitem(policy.logprobs.__func__.__globals__, "linear_logprobs", counting)
    policy.logprobs(batch, temperature=1.0)
    assert rows == [3]


def test_nothing_to_train_gives_zeros() -> None:
    batch = dataclasses.replace(make_batch((4, 3)), completion_mask=torch.zeros(7, dtype=torch.bool))
    found = make_policy("llama").logprobs(batch, temperature=1.0)
    assert found.logprobs.tolist() == [0.0] * 7 and found.entropy.tolist() == [0.0] * 7


def test_c18_two_passes_give_the_same_bits_and_dropout_wakes_only_when_asked() -> None:
    policy = make_policy("llama", lora=lora_of("llama", dropout=0.5))
    batch = make_batch()
    first = policy.logprobs(batch, temperature=1.0).logprobs
    policy.train_mode(dropout=False)
    assert torch.equal(policy.logprobs(batch, temperature=1.0).logprobs, first)
    policy.train_mode(dropout=True)
    assert not torch.allclose(policy.logprobs(batch, temperature=1.0).logprobs, first)
    policy.eval()
    assert torch.equal(policy.logprobs(batch, temperature=1.0).logprobs, first)


def test_a_family_outside_the_table_runs_one_sequence_a_pass() -> None:
    settings = {
        "vocab_size": 64,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    policy = make_policy("gpt2", **settings, attention="sdpa")
    batch = make_batch()
    assert not policy.family.packs and "one a pass" in policy.notes[0]
    torch.testing.assert_close(
        policy.logprobs(batch, temperature=1.0).logprobs, one_at_a_time(policy.model, batch), atol=1e-5, rtol=0
    )


HYBRIDS = {
    "qwen3_next": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_5_text": {},
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_run_one_sequence_a_pass(family: str) -> None:
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    layers = {"layer_types": ["linear_attention", "full_attention"]}
    policy = make_policy(family, attention="sdpa", **linear, **layers, **HYBRIDS[family])
    batch = make_batch((3, 9, 5))
    assert policy.family.known and not policy.family.packs
    torch.testing.assert_close(
        policy.logprobs(batch, temperature=1.0).logprobs, one_at_a_time(policy.model, batch), atol=1e-5, rtol=0
    )


def test_the_comparison_sees_broken_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants that the tests above must catch: all as one sequence, no window, no cap, no sinks."""
    batch = make_batch()

    def error(family: str) -> float:
        policy = make_policy(family, lora=lora_of(family))
        packed = policy.logprobs(batch, temperature=1.0).logprobs
        return float((packed - one_at_a_time(plain_twin(policy, family), batch)).detach().abs().max())

    original = attention._spans
    monkeypatch.setattr(attention, "_spans", lambda ends: original(ends[[0, -1]]))
    assert error("llama") > 0.1
    monkeypatch.setattr(attention, "_spans", original)
    kept = attention.Scores
    monkeypatch.setattr(attention, "Scores", lambda scale, window, cap, sinks: kept(scale, None, cap, sinks))
    assert error("mistral") > 0.1
    monkeypatch.setattr(attention, "Scores", lambda scale, window, cap, sinks: kept(scale, window, None, sinks))
    assert error("gemma2") > 1e-3
    monkeypatch.setattr(attention, "Scores", lambda scale, window, cap, sinks: kept(scale, window, cap, None))
    assert error("gpt_oss") > 1e-3


def test_lengths_cover_several_buckets() -> None:
    spans = attention._spans(Layout.of(LENGTHS).cu_seqlens)
    assert sorted(attention._buckets(spans, spans)) == [[0, 3], [1], [2], [4, 5], [6]]
