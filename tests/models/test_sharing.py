"""A prefix that stands once: logprobs, entropy and gradients are those of every sequence with its own copy (C22)."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reasoner.kernels.linear_logprobs import Logprobs
from reasoner.models import attention, sharing
from reasoner.models.attention import Layout, packed_attention
from reasoner.models.loading import recompute_layers
from reasoner.models.policy import Policy
from reasoner.models.rms_norm import PLAIN_FAMILIES, replace_norms
from reasoner.models.sharing import Places
from tests.models.tiny_models import FAMILIES, VOCABULARY, WINDOW, Batch, gradients, lora_of, make_policy

# Prompt and completions, in tokens: prompts longer than the window and of one token, groups of one, of unequal lengths.
GROUPS = ((9, (4, 7, 1)), (1, (3, 3)), (12, (5,)), (3, (2, 6, 30, 1)))
assert max(prompt for prompt, _ in GROUPS) > WINDOW


def shared_batch(groups: Sequence[tuple[int, Sequence[int]]] = GROUPS, seed: int = 2) -> Batch:
    """Random prompts, each before every one of its completions, whose tokens are trained."""
    draws = torch.Generator().manual_seed(seed)
    ids, lengths, shared, mask = [], [], [], []
    for prompt, completions in groups:
        its_ids = torch.randint(3, VOCABULARY, (prompt,), generator=draws)
        for i, length in enumerate(completions):
            ids += [its_ids, torch.randint(3, VOCABULARY, (length,), generator=draws)]
            lengths.append(prompt + length)
            shared.append(prompt if i else 0)
            mask += [False] * prompt + [True] * length
    return Batch(torch.cat(ids), Layout.of(lengths, shared=shared), torch.tensor(mask))


def unshared(batch: Batch) -> Batch:
    return dataclasses.replace(batch, layout=Layout.of(batch.layout.lengths))


def exact_policy(family: str) -> tuple[Policy, float]:
    """A policy with an adapter, and its tolerance: in float64 where no layer of transformers goes through float32."""
    exact = family in PLAIN_FAMILIES
    policy = make_policy(family, lora=lora_of(family), dtype=torch.float64 if exact else torch.float32)
    assert bool(replace_norms(policy.base, family)) == exact
    return policy, 1e-12 if exact else 2e-5


def learnt(policy: Policy, batch: Batch) -> tuple[Logprobs, dict[str, Tensor]]:
    """Logprobs, and the gradients of a sum in which every logprob and entropy has another weight."""
    weights = torch.linspace(-1, 1, len(batch.token_ids), dtype=torch.float64).to(policy.device)
    found = policy.logprobs(batch, temperature=0.7)
    return found, gradients(policy, (found.logprobs * weights + found.entropy * weights.flip(0)).sum())


def difference(policy: Policy, batch: Batch) -> float:
    """The largest between sharing and not sharing, of logprobs, entropies and gradients by their largest."""
    (ours, its_gradients), (truth, true_gradients) = learnt(policy, batch), learnt(policy, unshared(batch))
    pairs = [(ours.logprobs, truth.logprobs), (ours.entropy, truth.entropy)]
    pairs += [(its_gradients[name], true) for name, true in true_gradients.items()]
    assert all(true.abs().max() > 0 for _, true in pairs)
    found = torch.stack([((one - true).abs().max() / true.abs().max()).detach().double() for one, true in pairs])
    return float(found.nan_to_num(nan=torch.inf).max())


def test_what_is_computed_by_hand() -> None:
    """Two completions of a prompt of 2, a sequence alone, and three of one token."""
    shared = Layout.of([4, 3, 2, 2, 3, 2], shared=[0, 2, 0, 0, 1, 1]).sharing()
    assert shared is not None and shared.max_seqlen == 4
    assert shared.own.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 12, 13, 15]
    assert shared.cu_seqlens.tolist() == [0, 4, 5, 7, 9, 11, 12] and shared.cu_seqlens.dtype == torch.int32
    assert shared.places.rows.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 7, 9, 10, 7, 11]
    assert shared.places.copies.tolist() == [0, 4, 1, 5, 2, 3, 6, 7, 8, 9, 11, 14, 10, 12, 13, 15]
    assert shared.places.begins.tolist() == [0, 2, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15]
    assert Layout.of([4, 3]).sharing() is None and Layout.of([]).sharing() is None


@pytest.mark.parametrize(
    ("lengths", "shared"), [([4, 3], [0, 3]), ([2, 4], [0, 3]), ([3, 3], [1, 0]), ([3, 3], [0, -1])]
)
def test_a_prefix_that_no_sequence_has_is_refused(lengths: list[int], shared: list[int]) -> None:
    with pytest.raises(AssertionError, match="no sequence has such a prefix"):
        Layout.of(lengths, shared=shared)


def test_copies_gradients_are_summed_in_float32_and_rounded_once() -> None:
    """256 + 1 + 1 is 258 in bfloat16, but 256 + 1 is 256; a row that nobody takes gets 0."""
    x = torch.randn(3, 2, dtype=torch.bfloat16, requires_grad=True)
    taken = Places.of(torch.tensor([2, 0, 2, 2]), 3).take(x)
    assert taken.equal(x[[2, 0, 2, 2]])
    each = torch.tensor([[256.0, 1.0], [3.0, 5.0], [1.0, 256.0], [1.0, 1.0]], dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(taken, x, each)
    assert gradient.tolist() == [[3.0, 5.0], [0.0, 0.0], [258.0, 258.0]] and gradient.dtype == torch.bfloat16
    double = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Places.of(torch.tensor([2, 0, 2, 2]), 3).take, double)
    (gradient,) = torch.autograd.grad(Places.of(torch.tensor([], dtype=torch.int64), 3).take(double).sum(), double)
    assert not gradient.any()  # nobody asks for anything


@pytest.mark.parametrize("family", FAMILIES)
def test_c22_sharing_a_prompt_changes_nothing(family: str) -> None:
    policy, tolerance = exact_policy(family)
    assert policy.shares_prompts
    assert difference(policy, shared_batch()) < tolerance


@pytest.mark.parametrize(
    ("family", "offload"), [("qwen2", False), ("qwen2", True), ("gemma2", False), ("gpt_oss", True)]
)
def test_c22_with_layers_that_run_again(family: str, offload: bool) -> None:
    policy, tolerance = exact_policy(family)
    recompute_layers(policy.base, "tiny", offload=offload)
    policy.train_mode(dropout=False)
    assert difference(policy, shared_batch()) < tolerance


@pytest.mark.parametrize(
    "groups", [((1, (2, 1, 3)),), ((20, (1, 1, 1, 1, 1)),), ((6, (9, 2)), (6, (2, 9))), ((20, (3, 9)), (1, (3, 16)))]
)
def test_c22_of_other_groups(groups: tuple[tuple[int, tuple[int, ...]], ...]) -> None:
    """In the last of them, 9 queries are padded to 16 and stand beyond every key of their window."""
    for family in ("mistral", "gemma2"):
        policy, tolerance = exact_policy(family)
        assert difference(policy, shared_batch(groups)) < tolerance


def test_the_comparison_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants: a completion that sees the one before it, positions that go on, queries of a sequence's beginning, a
    prompt that learns from one completion alone."""
    policy, _ = exact_policy("llama")
    batch = shared_batch()
    whole = Layout.sharing

    def mutated(change: Any) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(Layout, "sharing", lambda layout: change(whole(layout)) if any(layout.shared) else None)
            return difference(policy, batch)

    assert mutated(lambda true: true) < 1e-12

    def sees_its_neighbour(true: sharing.Sharing) -> sharing.Sharing:
        rows = true.places.rows.clone()
        rows[13] = 9  # the second sequence's first key becomes the first one's first completion token
        return dataclasses.replace(true, places=Places.of(rows, len(true.own)))

    assert mutated(sees_its_neighbour) > 1e-3

    def one_teacher(true: sharing.Sharing) -> sharing.Sharing:
        ends = torch.cat([true.places.begins[1:], torch.tensor([len(true.places.copies)])])
        firsts = true.places.copies[true.places.begins]
        assert int((ends - true.places.begins).max()) == 4
        places = Places(true.places.rows, firsts, torch.arange(len(firsts)))
        return dataclasses.replace(true, places=places)

    assert mutated(one_teacher) > 1e-3
    with monkeypatch.context() as patch:
        hidden = Policy._hidden

        def counting_on(self: Policy, ids: Tensor, layout: Layout, shared: Any = None) -> Tensor:
            if shared is not None:
                layout = dataclasses.replace(layout, positions=torch.arange(len(ids)))
            return hidden(self, ids, layout, shared)

        patch.setattr(Policy, "_hidden", counting_on)
        assert difference(policy, batch) > 1e-3
    with monkeypatch.context() as patch:
        visible = attention._visible
        patch.setattr(
            attention,
            "_visible",
            lambda asking, held, *rest: visible(dataclasses.replace(asking, lengths=held.lengths), held, *rest),
        )
        assert difference(policy, batch) > 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_b5_a_completion_sees_none_of_its_siblings(family: str) -> None:
    """Other tokens there, or NaN, leave its bits as they were; and the prompt's."""
    policy, batch = make_policy(family), shared_batch(((5, (4, 6, 3)),))
    second = torch.arange(len(batch.token_ids)).ge(9 + 5) & torch.arange(len(batch.token_ids)).lt(9 + 11)
    before = policy.logprobs(batch, temperature=1.0).logprobs
    changed = torch.where(second, (batch.token_ids + 7) % 50 + 3, batch.token_ids)
    after = policy.logprobs(dataclasses.replace(batch, token_ids=changed), temperature=1.0).logprobs
    assert torch.equal(after[~second], before[~second]) and not torch.equal(after[second], before[second])
    policy.base.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, output: output.masked_fill((inputs[0] == 1)[..., None], float("nan"))
    )
    poisoned = torch.where(second, 1, batch.token_ids)
    after = policy.logprobs(dataclasses.replace(batch, token_ids=poisoned), temperature=1.0).logprobs
    assert torch.equal(after[~second], before[~second]) and after[second][1:].isnan().all()


def test_c18_two_passes_give_the_same_bits() -> None:
    policy, batch = make_policy("qwen2", lora=lora_of("qwen2")), shared_batch()
    (first, its_gradients), (second, other) = learnt(policy, batch), learnt(policy, batch)
    assert torch.equal(first.logprobs, second.logprobs) and torch.equal(first.entropy, second.entropy)
    assert all(torch.equal(its_gradients[name], other[name]) for name in other)


def test_layers_compute_a_prompt_once_and_the_head_no_prompt_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, batch = make_policy("llama"), shared_batch()
    rows: list[int] = []
    handle = policy.base.model.layers[0].register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[1]))
    policy.logprobs(batch, temperature=1.0)
    handle.remove()
    assert rows == [sum(prompt + sum(completions) for prompt, completions in GROUPS)]
    assert rows[0] < len(batch.token_ids) == 115


def test_a_family_that_runs_one_sequence_a_pass_shares_nothing() -> None:
    settings = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    policy = make_policy("gpt2", **settings, bos_token_id=1, eos_token_id=2, attention="sdpa")
    batch = shared_batch()
    assert not policy.shares_prompts
    found, truth = (policy.logprobs(one, temperature=1.0).logprobs for one in (batch, unshared(batch)))
    assert torch.equal(found, truth)


@pytest.mark.parametrize("window", [None, 4])
def test_the_fused_kernel_is_told_of_queries_and_of_keys(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch's, which needs a card: masks aligned at a sequence's end, as its kernel documents."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):  # type: ignore[no-untyped-def]
        left, right = window_size
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        assert right == 0 and enable_gqa
        pieces = []
        for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
            query = torch.arange(b - a)[:, None] + (d - c) - (b - a)
            key = torch.arange(d - c)
            mask = (key <= query) & ((key >= query - left) if left >= 0 else True)
            heads = [x[e:f].transpose(0, 1) for x, e, f in ((q, a, b), (k, c, d), (v, c, d))]
            pieces.append(scaled_dot_product_attention(*heads, mask, scale=scale, enable_gqa=True).transpose(0, 1))
        return torch.cat(pieces)

    layout = shared_batch().layout
    shared = layout.sharing()
    assert shared is not None
    draws = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, len(shared.own), 8, generator=draws)
    key, value = (torch.randn(1, 2, len(shared.own), 8, generator=draws) for _ in range(2))
    lengths = {
        "cu_seq_lens_q": shared.cu_seqlens,
        "cu_seq_lens_k": layout.cu_seqlens,
        "max_length_q": shared.max_seqlen,
        "max_length_k": layout.max_seqlen,
    }
    found = []
    for fused in (False, True):
        monkeypatch.setattr(attention, "varlen_supported", lambda *_, fused=fused: fused)
        monkeypatch.setattr(varlen, "varlen_attn", attend)
        args = (torch.nn.Module(), query, key, value, None)
        found.append(packed_attention(*args, sliding_window=window, sharing=shared, **lengths)[0])
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-6)
