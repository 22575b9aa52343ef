"""The only home of attention: sequences of any length side by side in one row, none of which sees another.

`Layout` says where each sequence lies. `packed_attention` is what transformers calls in every layer once a model is
loaded with `attn_implementation=PACKED`; no mask function is registered under that name, so transformers builds no mask
and hands None. Left out: caches (a cached forward attends across sequences, so it raises), attention dropout (the base
stays in eval mode while it is trained) and a fused kernel for soft-capped scores and sinks, which take the plain
formula.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "reasoner_packed"


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

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> Self:
        """The layout of sequences of these lengths (tokens, each at least 1), in this order."""
        lengths = tuple(int(length) for length in lengths)
        assert all(length > 0 for length in lengths), f"a packed sequence has at least one token: {lengths}"
        positions = [torch.arange(length) for length in lengths]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        return cls(
            lengths=lengths,
            positions=torch.cat([torch.zeros(0, dtype=torch.int64), *positions]).to(device),
            cu_seqlens=cu_seqlens.to(torch.int32).to(device),
            max_seqlen=max(lengths, default=0),
        )

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def sequence_ids(self) -> Tensor:
        """The number of each token's sequence: int64 [N]."""
        counts = self.cu_seqlens.diff().long()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


@dataclass(frozen=True, slots=True)
class Scores:
    """How query-key products become attention weights, as a model's layer asks for it."""

    scale: float
    window: int | None  # a token sees itself and the window - 1 tokens before it
    soft_cap: float | None  # cap * tanh(score / cap), Gemma 2
    sinks: Tensor | None  # [heads], a logit that takes weight and gives no value, gpt-oss


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
    **other: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence: query [1, heads, N, d], key and value [1, kv_heads, N, d] -> [1, N, heads,
    d].

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
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if varlen_supported(q, v, scores):
        return _varlen(q, k, v, cu_seq_lens_q, int(max_length_q or q.shape[0]), scores)[None], None
    return _bucketed(q, k, v, cu_seq_lens_q.tolist(), scores)[None], None


AttentionInterface.register(PACKED, packed_attention)


def varlen_supported(query: Tensor, value: Tensor, scores: Scores) -> bool:
    """True where torch's fused variable-length kernel may run: CUDA, 16 bit, plain scores, heads of up to 256."""
    fits = query.shape[-1] == value.shape[-1] <= 256 and query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and fits and scores.soft_cap is None and scores.sinks is None


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scores: Scores) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # absent on some platforms without CUDA

    left = -1 if scores.window is None else scores.window - 1
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    # torch 2.11 lets heads share a key without being told; later ones want to be.
    told: dict[str, Any] = {}
    if "enable_gqa" in signature(varlen_attn).parameters:
        told["enable_gqa"] = query.shape[1] != key.shape[1]
    attended = varlen_attn(query, key, value, *lengths, scale=scores.scale, window_size=(left, 0), **told)
    assert isinstance(attended, Tensor)
    return attended


def _bucketed(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: list[int], scores: Scores) -> Tensor:
    """[N, heads, d] on any device: sequences of like length, within a factor of two, padded into one batch.

    Padding on the right needs no mask: causality hides it from every real token, and its own output is dropped.
    """
    groups = query.shape[1] // key.shape[1]
    pieces, order = [], []
    for tokens, slots, shape in _buckets(cu_seqlens, query.device):
        q, k, v = (_pad(x, tokens, slots, shape) for x in (query, key, value))
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v)) if groups > 1 else (k, v)
        pieces.append(_attend(q, k, v, scores).transpose(1, 2).flatten(0, 1).index_select(0, slots))
        order.append(tokens)
    return torch.cat(pieces).index_select(0, torch.cat(order).argsort()) if len(order) > 1 else pieces[0]


def _buckets(cu_seqlens: list[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
    """Each bucket's tokens (indices in the row), their slots in the padded batch, and its [sequences, length]."""
    by_power: dict[int, list[tuple[int, int]]] = {}
    for begin, end in pairwise(cu_seqlens):
        by_power.setdefault((end - begin - 1).bit_length(), []).append((begin, end - begin))
    for sequences in by_power.values():
        begins, lengths = torch.tensor(sequences).unbind(1)
        width = int(lengths.max())
        steps = torch.arange(width)
        real = steps < lengths[:, None]
        tokens = (begins[:, None] + steps)[real]
        yield tokens.to(device), real.flatten().nonzero()[:, 0].to(device), (len(sequences), width)


def _pad(x: Tensor, tokens: Tensor, slots: Tensor, shape: tuple[int, int]) -> Tensor:
    """[N, heads, d] -> [sequences, heads, length, d], padded with zeros: 0 x a neighbour's NaN would be NaN."""
    padded = x.new_zeros(shape[0] * shape[1], *x.shape[1:]).index_copy(0, slots, x.index_select(0, tokens))
    return padded.unflatten(0, shape).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """Causal attention over [sequences, heads, length, d]."""
    length = query.shape[2]
    windowed = scores.window is not None and scores.window < length
    if scores.soft_cap is None and scores.sinks is None:
        mask = _visible(length, scores.window, query.device) if windowed else None
        return scaled_dot_product_attention(query, key, value, mask, scale=scores.scale, is_causal=not windowed)
    products = query @ key.transpose(2, 3)
    weights = products.to(torch.promote_types(products.dtype, torch.float32)) * scores.scale
    if scores.soft_cap is not None:
        weights = scores.soft_cap * torch.tanh(weights / scores.soft_cap)
    weights = weights.masked_fill(~_visible(length, scores.window, query.device), float("-inf"))
    if scores.sinks is not None:
        sinks = scores.sinks.to(weights.dtype)[None, :, None, None].expand(*weights.shape[:3], 1)
        weights = torch.cat([weights, sinks], dim=-1)
    return weights.softmax(-1)[..., :length].to(value.dtype) @ value


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query (row) sees a key (column): bool [length, length]."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)
