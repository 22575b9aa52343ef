"""Ways to get logprobs and the gradient of hidden from hidden states and a frozen head: ours, rivals', and the floor.

Each rival is imported where it is made, so that one that is not installed costs no other its row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from reasoner.kernels.linear_logprobs import linear_logprobs, linear_logprobs_torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRL_CHUNK = 32_768  # trl 1.16, trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE


@dataclass(frozen=True, eq=False)
class Data:
    """The inputs of one case."""

    hidden: Tensor
    weight: Tensor
    target_ids: Tensor
    upstream: Tensor  # [N], what arrives at the logprobs


Method = Callable[[Data], tuple[Tensor | None, Tensor | None]]
"""Runs once: logprobs (None where a method gives only a loss) and the gradient of hidden (None without)."""


def with_gradient(logprobs_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Method:
    """Forward and backward of what gives a logprob a token."""

    def run(data: Data) -> tuple[Tensor, Tensor | None]:
        hidden = data.hidden.detach().requires_grad_()
        logprobs = logprobs_of(hidden, data.weight, data.target_ids)
        logprobs.backward(data.upstream)
        return logprobs.detach(), hidden.grad

    return run


def without_gradient(logprobs_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Method:
    """The forward pass alone."""

    @torch.no_grad()
    def run(data: Data) -> tuple[Tensor, None]:
        return logprobs_of(data.hidden, data.weight, data.target_ids), None

    return run


def ours(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """The operation as the trainer calls it, on a card by Triton."""
    return linear_logprobs(hidden, weight, target_ids).logprobs


def ours_in_torch(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """The torch implementation of the same operation."""
    return linear_logprobs_torch(hidden, weight, target_ids, 1.0, None, 1.0).logprobs


def plain_float32(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """Logits cast to float32."""
    logits = torch.nn.functional.linear(hidden, weight).float()
    return -torch.nn.functional.cross_entropy(logits, target_ids, reduction="none")


def plain_bfloat16(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """Logits left in bfloat16."""
    logits = torch.nn.functional.linear(hidden, weight)
    return -torch.nn.functional.cross_entropy(logits, target_ids, reduction="none").float()


def cut_cross_entropy(filter_eps: str | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Apple's kernel: logprobs, negated."""
    from cut_cross_entropy import linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, target_ids, reduction="none", filter_eps=filter_eps).float()

    return run


def trl_chunked() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """TRL's own chunked head, with the entropy that its GRPO logs."""
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, target_ids, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))[
            0
        ]

    return run


def liger_cross_entropy() -> Method:
    """Liger's fused linear cross entropy: the sum over tokens, so every token's upstream number is 1."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def run(data: Data) -> tuple[None, Tensor | None]:
        hidden = data.hidden.detach().requires_grad_()
        loss(data.weight, hidden, data.target_ids).backward()
        return None, hidden.grad

    return run


def liger_grpo() -> Method:
    """Liger's fused linear GRPO loss on 16 sequences, no reference, on policy."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)

    def run(data: Data) -> tuple[None, Tensor | None]:
        hidden = data.hidden.detach().requires_grad_()
        ids = data.target_ids.view(16, -1)
        found = loss(hidden.view(16, ids.shape[1], -1), data.weight, ids, torch.ones_like(ids), data.upstream[:16])
        found[0].backward()
        return None, hidden.grad

    return run


@cache
def compiled_epilogue() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Logprob, entropy and the factor of the second matmul from a chunk's bfloat16 logits, fused by torch.compile."""

    def epilogue(logits: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logp = logits.float().log_softmax(1)
        share = logp.exp()
        at_target = torch.arange(logits.shape[1], device=logits.device) == target_ids[:, None]
        found = torch.where(at_target, logp, 0).sum(1), -(share * logp).sum(1)
        return *found, (at_target.float() - share).to(logits.dtype)

    return torch.compile(epilogue, dynamic=False) if DEVICE.type == "cuda" else epilogue


def compiled_chunk(data: Data, rows: int = 2048) -> tuple[Tensor, Tensor]:
    """Chunks of 2,048 rows, one pass: matmul, compiled epilogue, matmul; then the upstream numbers."""
    factor, logprobs, entropy = torch.empty_like(data.hidden), *torch.empty(2, len(data.hidden), device=DEVICE)
    for start in range(0, len(data.hidden), rows):
        part = slice(start, start + rows)
        logits = data.hidden[part] @ data.weight.T
        logprobs[part], entropy[part], share = compiled_epilogue()(logits, data.target_ids[part])
        factor[part] = share @ data.weight
    return logprobs, (factor * data.upstream[:, None]).to(factor.dtype)


OURS: dict[str, Callable[[], Method]] = {
    "ours": lambda: with_gradient(ours),
    "ours, no gradient": lambda: without_gradient(ours),
    "ours in torch": lambda: with_gradient(ours_in_torch),
}
RIVALS: dict[str, Callable[[], Method]] = {
    "compiled chunk of 2048": lambda: compiled_chunk,
    "Liger cross entropy": liger_cross_entropy,
    "TRL chunked": lambda: with_gradient(trl_chunked()),
    "cut-cross-entropy": lambda: with_gradient(cut_cross_entropy("auto")),
    "cut-cross-entropy, unfiltered": lambda: with_gradient(cut_cross_entropy(None)),
    "torch, bf16 logits": lambda: with_gradient(plain_bfloat16),
    "torch, fp32 logits": lambda: with_gradient(plain_float32),
    "TRL chunked, no gradient": lambda: without_gradient(trl_chunked()),
    "Liger GRPO loss": liger_grpo,
}
SLOW = ("Liger GRPO loss",)  # timed in 2 of the rounds
BY_DATA = ("cut-cross-entropy",)  # the rival whose time depends on the rows


class Floor:
    """The two matmuls with bfloat16 results, whole or in chunks of rows; the second one's left side is like odds."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.logits = data.hidden @ data.weight.T
        self.odds = torch.empty_like(self.logits)
        for rows in torch.arange(len(self.odds)).split(1024):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            self.odds[part] = (self.logits[part] - self.logits[part].amax(1, keepdim=True)).exp_()
        self.product = torch.empty_like(data.hidden)

    def first(self, rows: int) -> None:
        """Hidden times head."""
        for start in range(0, len(self.logits), rows):
            part = slice(start, start + rows)
            torch.mm(self.data.hidden[part], self.data.weight.T, out=self.logits[part])

    def second(self, rows: int) -> None:
        """Odds times head."""
        for start in range(0, len(self.logits), rows):
            part = slice(start, start + rows)
            torch.mm(self.odds[part], self.data.weight, out=self.product[part])

    def methods(self) -> dict[str, Callable[[Data], Any]]:
        """Each is one region."""
        whole, chunk = len(self.logits), 2816

        def both(first: int, second: int) -> Callable[[Data], None]:
            return lambda data: (self.first(first), self.second(second))[1]

        return {
            "floor: two matmuls": both(whole, whole),
            "floor: two matmuls, second in chunks": both(whole, chunk),
            "floor: one matmul": lambda data: self.first(whole),
            "floor: one matmul in chunks": lambda data: self.first(4096),
        }
