"""The layout record, and the attention function's refusals: what it can't honour must not pass silently."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from reasoner.models.attention import PACKED, Layout, check_size, packed_attention
from tests.models.tiny_models import make_batch, make_model


def test_layout_of_three_sequences() -> None:
    layout = Layout.of([2, 1, 3])
    assert layout.lengths == (2, 1, 3) and layout.num_sequences == 3 and layout.max_seqlen == 3
    assert layout.positions.tolist() == [0, 1, 0, 0, 1, 2] and layout.positions.dtype == torch.int64
    assert layout.cu_seqlens.tolist() == [0, 2, 3, 6] and layout.cu_seqlens.dtype == torch.int32
    assert layout.sequence_ids.tolist() == [0, 0, 1, 2, 2, 2] and layout.sequence_ids.dtype == torch.int64


def test_layout_of_nothing_and_of_an_empty_sequence() -> None:
    empty = Layout.of([])
    assert empty.positions.tolist() == [] and empty.cu_seqlens.tolist() == [0] and empty.max_seqlen == 0
    assert empty.sequence_ids.tolist() == []
    with pytest.raises(AssertionError, match="at least one token"):
        Layout.of([2, 0])


QUERY, KEY = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
MODULE = torch.nn.Module()
WHOLE: dict[str, Any] = {"cu_seq_lens_q": Layout.of([4, 2]).cu_seqlens, "max_length_q": 4}


def test_groups_of_query_heads_share_a_key_head() -> None:
    attended, weights = packed_attention(MODULE, QUERY, KEY, KEY, None, **WHOLE)
    wide = KEY.repeat_interleave(2, dim=1)
    alone = [
        scaled_dot_product_attention(QUERY[:, :, part], wide[:, :, part], wide[:, :, part], is_causal=True)
        for part in (slice(0, 4), slice(4, 6))
    ]
    assert weights is None and attended.shape == (1, 6, 4, 8)
    torch.testing.assert_close(attended, torch.cat(alone, dim=2).transpose(1, 2))


def test_gradients_arrive_as_heads_are_projected_and_not_by_way_of_zeros() -> None:
    """Tokens before heads in memory, so that no projection has to copy its own."""
    leaves = [torch.randn(1, 6, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    attended, _ = packed_attention(MODULE, *(x.transpose(1, 2) for x in leaves), None, **WHOLE)
    seen, waiting = set(), [attended.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    names = {type(node).__name__ for node in seen}
    assert "SqueezeBackward1" in names and "SelectBackward0" not in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seq_lens_q": None}, "cu_seq_lens_q"),
        ({"attention_mask": torch.ones(1, 6)}, "mask"),
        ({"key": torch.randn(1, 2, 9, 8)}, "cache"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "causal"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_what_it_can_not_honour_raises(change: dict[str, Any], message: str) -> None:
    inputs = {"query": QUERY, "key": KEY, "value": KEY, "attention_mask": None, **WHOLE}
    packed_attention(MODULE, **inputs)
    with pytest.raises(ValueError, match=message):
        packed_attention(MODULE, **{**inputs, **change})


def test_keywords_that_are_off_pass() -> None:
    packed_attention(MODULE, QUERY, KEY, KEY, None, **WHOLE, use_cache=False, output_attentions=None)


def test_b5_a_forward_with_a_cache_or_a_mask_raises_instead_of_leaking() -> None:
    model, batch = make_model("llama"), make_batch((3, 4))
    assert model.config._attn_implementation == PACKED
    packed = {"position_ids": batch.layout.positions[None], "cu_seq_lens_q": batch.layout.cu_seqlens}
    model(input_ids=batch.token_ids[None], use_cache=False, **packed)
    with pytest.raises(ValueError, match="use_cache"):
        model(input_ids=batch.token_ids[None], use_cache=True, **packed)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(input_ids=batch.token_ids[None], use_cache=False)


@pytest.mark.parametrize(
    ("num_sequences", "num_tokens", "heads", "width", "takes"),
    [
        (1, 162_240, 32, 128, True),  # the longest measured on an 8B Llama
        (1, 2**31 // (32 * 128) - 129, 32, 128, True),
        (1, 2**31 // (32 * 128) - 128, 32, 128, False),  # padding counts
        (1, 2**24, 2, 33, False),  # a head of 33 takes the place of 64
        (65_535, 65_535, 1, 32, True),
        (65_536, 65_536, 1, 32, False),
    ],
)
def test_more_than_the_fused_kernel_counts_is_refused_like_too_little_memory(
    num_sequences: int, num_tokens: int, heads: int, width: int, takes: bool
) -> None:
    with nullcontext() if takes else pytest.raises(torch.OutOfMemoryError, match="fewer tokens in a micro-batch"):
        check_size(num_sequences, num_tokens, heads, width)
