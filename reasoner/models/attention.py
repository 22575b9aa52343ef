"""The only home of attention: sequences of any length side by side in one row, none of which sees another.

`Layout` says where each sequence lies. `packed_attention` is what transformers calls in every layer once a model is
loaded with `attn_implementation=PACKED`; no mask function is registered under that name, so transformers builds no mask
and hands None. A prefix that sequences share is computed once (sharing.py): only their own tokens ask, and each
sequence's keys are put together from the prefix's and its own. Left out: caches (a cached forward attends across
sequences, so it raises), attention dropout (the base stays in eval mode while it is trained) and a fused kernel for
soft-capped scores and sinks, which take the plain formula.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from reasoner.models.sharing import Sharing

PACKED = "reasoner_packed"
MOST_SEQUENCES = 65_535  # of one call of torch's kernel: they are a side of its grid
MOST_NUMBERS = 2**31  # of its float32 queries in the backward, whose places it reckons in 32 bits


class TooLarge(torch.OutOfMemoryError):
    """More than torch's kernel counts at once, whether or not there is memory for it. What helps is the same: fewer
    tokens at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where each sequence of a packed row lies: B sequences, N tokens together. Make it with `Layout.of`.

    >>> layout = Layout.of([2, 3])
    >>> layout.positions, layout.cu_seqlens, layout.max_seqlen, layout.sequence_ids
    (tensor([0, 1, 0, 1, 2]), tensor([0, 2, 5], dtype=torch.int32), 3, tensor([0, 0, 1, 1, 1]))
    """

    lengths: tuple[int, ...]  # [B], on the host: cutting a batch needs no wait for a GPU
    positions: Tensor  # int64 [N], from 0 in every sequence
    cu_seqlens: Tensor  # int32 [B + 1], where sequences begin; the last is N
    max_seqlen: int
    # [B]: how many of a sequence's first tokens are those of the last sequence before it that has a 0 here
    shared: tuple[int, ...]

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device | str | None = None,
        *,
        shared: Sequence[int] | None = None,
    ) -> Self:
        """The layout of sequences of these lengths (tokens, each at least 1), in this order; without `shared` all
        tokens are their own. A sequence has at least one token of its own."""
        lengths = tuple(int(length) for length in lengths)
        assert all(length > 0 for length in lengths), f"a packed sequence has at least one token: {lengths}"
        shared = tuple(shared) if shared is not None else (0,) * len(lengths)
        assert _fits(lengths, shared), f"no sequence has such a prefix: {shared} of {lengths}"
        positions = [torch.arange(length) for length in lengths]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        return cls(
            lengths=lengths,
            positions=torch.cat([torch.zeros(0, dtype=torch.int64), *positions]).to(device),
            cu_seqlens=cu_seqlens.to(torch.int32).to(device),
            max_seqlen=max(lengths, default=0),
            shared=shared,
        )

    def part(self, first: int, last: int) -> Self:
        """The layout of the sequences first .. last - 1 by themselves, the first of which shares nothing. Made of this
        one's tensors where they are, so that nothing is copied to a device and nothing waits for it."""
        begin, length = sum(self.lengths[:first]), sum(self.lengths[first:last])
        return type(self)(
            lengths=self.lengths[first:last],
            positions=self.positions[begin : begin + length],
            cu_seqlens=self.cu_seqlens[first : last + 1] - begin,
            max_seqlen=max(self.lengths[first:last], default=0),
            shared=(0, *self.shared[first + 1 : last]) if first < last else (),
        )

    def sharing(self) -> Sharing | None:
        """Which tokens are computed and where the others are found; None where every token is its own."""
        if not any(self.shared):
            return None
        return Sharing.of(self.lengths, self.shared, self.positions, self.sequence_ids)

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def sequence_ids(self) -> Tensor:
        """The number of each token's sequence: int64 [N]."""
        counts = self.cu_seqlens.diff().long()
        numbers = torch.arange(len(counts), device=counts.device)
        return torch.repeat_interleave(numbers, counts, output_size=len(self.positions))  # told, it does not wait


def _fits(lengths: Sequence[int], shared: Sequence[int]) -> bool:
    """Whether every shared prefix is shorter than its sequence and no longer than the one it stands in."""
    owner = 0
    for length, taken in zip(lengths, shared, strict=True):
        owner = owner if taken else length
        if not 0 <= taken < length or taken > owner:
            return False
    return True


@dataclass(frozen=True, slots=True)
class Scores:
    """How query-key products become attention weights, as a model's layer asks for it."""

    scale: float
    window: int | None  # a token sees itself and the window - 1 tokens before it
    soft_cap: float | None  # cap * tanh(score / cap), Gemma 2
    sinks: Tensor | None  # [heads], a logit that takes weight and gives no value, gpt-oss

    def plain(self, length: int) -> bool:
        """Whether, for so many tokens, nothing but causality shapes the weights."""
        return self.soft_cap is None and self.sinks is None and (self.window is None or self.window >= length)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_ids: Tensor | None = None,
    is_causal: bool | None = None,
    sharing: Sharing | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence: query [1, heads, N, d], key and value [1, kv_heads, N, d] -> [1, N, heads,
    d]. With `sharing` N are the tokens that are computed, and `cu_seq_lens_k` speaks of whole sequences.

    Raises ValueError where an answer would be silently wrong: no `cu_seq_lens_q`, a mask, a cache, dropout, attention
    that is not causal, or a keyword that this function does not know.
    """
    asked = sorted(name for name, setting in other.items() if setting is not None and setting is not False)
    if asked:
        raise ValueError(
            f"packed attention does not know {', '.join(asked)}: give this model family a row in "
            "reasoner/models/families.py"
        )
    if cu_seq_lens_q is None or attention_mask is not None or key.shape[2] != query.shape[2]:
        raise ValueError(
            "packed attention needs cu_seq_lens_q and takes neither a mask nor a cache: pass use_cache=False"
        )
    if dropout or is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError("packed attention is causal and has no dropout")
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    # Not x[0], whose gradient is written into zeros, in another order than the projections have theirs.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    of_keys, longest = cu_seq_lens_q, max_length_q
    if sharing is not None:
        assert cu_seq_lens_k is not None, "it comes with sharing"
        of_keys, longest = cu_seq_lens_k, max_length_k
        k, v = sharing.places.take(k), sharing.places.take(v)
    if varlen_supported(q, v, scores):
        lengths = (cu_seq_lens_q, of_keys, int(max_length_q or len(q)), int(longest or len(k)))
        return _varlen(q, k, v, lengths, scores)[None], None
    return _bucketed(q, k, v, _spans(cu_seq_lens_q), _spans(of_keys), scores)[None], None


AttentionInterface.register(PACKED, packed_attention)


def varlen_supported(query: Tensor, value: Tensor, scores: Scores) -> bool:
    """True where torch's fused variable-length kernel may run: CUDA, 16 bit, plain scores, heads of up to 256."""
    fits = query.shape[-1] == value.shape[-1] <= 256 and query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and fits and scores.soft_cap is None and scores.sinks is None


def check_size(num_sequences: int, num_tokens: int, heads: int, width: int) -> None:
    """Raises TooLarge for queries [num_tokens, heads, width] that the kernel would read at wrong places, which ends a
    process with an illegal access."""
    # It holds them for each sequence with up to 128 rows of padding, in heads of a multiple of 32.
    numbers = (num_tokens + 128 * num_sequences) * heads * (-(-width // 32) * 32)
    if num_sequences > MOST_SEQUENCES or numbers >= MOST_NUMBERS:
        raise TooLarge(
            f"attention over {num_tokens:,} tokens in {num_sequences:,} sequences is more than torch's kernel counts "
            "at once: fewer tokens in a micro-batch"
        )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[Tensor, Tensor, int, int], scores: Scores
) -> Tensor:
    """`lengths`: where sequences begin among queries and among keys, and the longest of each. A sequence with fewer
    queries than keys asks with its last tokens: masks are aligned there."""
    check_size(len(lengths[0]) - 1, *query.shape)
    varlen_attn, told_of_groups = _varlen_attn()
    left = -1 if scores.window is None else scores.window - 1
    told: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if told_of_groups else {}
    attended = varlen_attn(query, key, value, *lengths, scale=scores.scale, window_size=(left, 0), **told)
    assert isinstance(attended, Tensor)
    return attended


@cache  # asked for in every layer
def _varlen_attn() -> tuple[Callable[..., Any], bool]:
    """torch's function, and whether it wants to be told that heads share a key: torch 2.11 has no word for it."""
    from torch.nn.attention.varlen import varlen_attn  # absent on some platforms without CUDA

    return varlen_attn, "enable_gqa" in signature(varlen_attn).parameters


Spans = list[tuple[int, int]]  # where each sequence begins, and how long it is


def _spans(cu_seqlens: Tensor) -> Spans:
    return [(begin, end - begin) for begin, end in pairwise(cu_seqlens.tolist())]


def _bucketed(query: Tensor, key: Tensor, value: Tensor, queries: Spans, keys: Spans, scores: Scores) -> Tensor:
    """[N, heads, d] on any device: sequences of like length, within a factor of two, padded into one batch.

    A sequence's queries are those of its last keys. Padding on the right needs no mask where there are as many queries
    as keys: causality hides it from every real token, and its own output is dropped.
    """
    groups = query.shape[1] // key.shape[1]
    pieces, order = [], []
    for members in _buckets(queries, keys):
        asking = Padded.of([queries[i] for i in members], query.device)
        held = Padded.of([keys[i] for i in members], query.device)
        q, k, v = asking.batch(query), held.batch(key), held.batch(value)
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v)) if groups > 1 else (k, v)
        visible = None
        if asking.lengths != held.lengths or not scores.plain(held.shape[1]):
            visible = _visible(asking, held, scores.window, query.device)
        pieces.append(asking.row(_attend(q, k, v, visible, scores)))
        order.append(asking.tokens)
    return torch.cat(pieces).index_select(0, torch.cat(order).argsort()) if len(order) > 1 else pieces[0]


def _buckets(queries: Spans, keys: Spans) -> list[list[int]]:
    """The sequences by the powers of two that their queries and their keys fit in."""
    by_power: dict[tuple[int, int], list[int]] = {}
    for i, ((_, asking), (_, held)) in enumerate(zip(queries, keys, strict=True)):
        by_power.setdefault(((asking - 1).bit_length(), (held - 1).bit_length()), []).append(i)
    return list(by_power.values())


@dataclass(frozen=True, slots=True)
class Padded:
    """A bucket's sequences: places of their tokens in the row, and in a batch of sequences padded on the right."""

    lengths: tuple[int, ...]
    tokens: Tensor  # int64, in the row
    slots: Tensor  # int64, in the batch
    shape: tuple[int, int]  # sequences, longest

    @classmethod
    def of(cls, spans: Spans, device: torch.device) -> Self:
        """Of these sequences."""
        begins, lengths = torch.tensor(spans).unbind(1)
        width = int(lengths.max())
        steps = torch.arange(width)
        real = steps < lengths[:, None]
        tokens, slots = (begins[:, None] + steps)[real], real.flatten().nonzero()[:, 0]
        return cls(tuple(lengths.tolist()), tokens.to(device), slots.to(device), (len(spans), width))

    def batch(self, x: Tensor) -> Tensor:
        """[N, heads, d] -> [sequences, heads, length, d], padded with zeros: 0 x a neighbour's NaN would be NaN."""
        padded = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return padded.index_copy(0, self.slots, x.index_select(0, self.tokens)).unflatten(0, self.shape).transpose(1, 2)

    def row(self, x: Tensor) -> Tensor:
        """[sequences, heads, length, d] -> [its tokens, heads, d]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.slots)


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scores: Scores) -> Tensor:
    """Attention over [sequences, heads, length, d] of what is visible, or causal if that is None."""
    if scores.soft_cap is None and scores.sinks is None:
        return scaled_dot_product_attention(query, key, value, visible, scale=scores.scale, is_causal=visible is None)
    assert visible is not None
    products = query @ key.transpose(2, 3)
    weights = products.to(torch.promote_types(products.dtype, torch.float32)) * scores.scale
    if scores.soft_cap is not None:
        weights = scores.soft_cap * torch.tanh(weights / scores.soft_cap)
    weights = weights.masked_fill(~visible, float("-inf"))
    if scores.sinks is not None:
        sinks = scores.sinks.to(weights.dtype)[None, :, None, None].expand(*weights.shape[:3], 1)
        weights = torch.cat([weights, sinks], dim=-1)
    return weights.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value


def _visible(asking: Padded, held: Padded, window: int | None, device: torch.device) -> Tensor:
    """True where a query (row) sees a key (column): bool [1 or sequences, 1, queries, keys]."""
    places = torch.arange(asking.shape[1])[None]
    if asking.lengths != held.lengths:
        asked, there = torch.tensor(asking.lengths)[:, None], torch.tensor(held.lengths)[:, None]
        # A query of padding stands with the last one, so that it sees a key: of none, softmax would be NaN.
        places = torch.minimum(places, asked - 1) + there - asked
    query, key = places.to(device)[:, None, :, None], torch.arange(held.shape[1], device=device)
    return key <= query if window is None else (key <= query) & (key > query - window)
