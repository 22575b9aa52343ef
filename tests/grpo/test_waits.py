"""A micro-batch is queued without a wait for the device: each would leave a card idle until Python is back."""

import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reasoner.grpo.batch import RolloutBatch, loss_inputs, pack, train_batch
from reasoner.grpo.losses import Dapo, Gspo
from reasoner.grpo.mismatch import Mismatch
from reasoner.update import StepCounts
from tests.grpo.test_shared_prompts import make_groups
from tests.models.tiny_models import lora_of, make_policy

# Operations whose answer the host needs before it can go on.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2", "is_nonzero"}
# What a card does by other means: attention is one kernel over all lengths there, and the loss head's kernels make a
# row of a wrong target NaN.
CPU_ALONE = {"_bucketed", "check_targets"}


class Waits(TorchDispatchMode):
    """Notes the operations that wait, but those of what a card does by other means."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if (name in WAITS or masked or counted) and not _callers() & CPU_ALONE:
            self.found.append(f"{name} in {_callers(1)}")
        return func(*args, **(kwargs or {}))


def _callers(depth: int | None = None) -> set[str]:
    frame, names = sys._getframe(2), []
    while frame is not None:
        if "reasoner" in frame.f_code.co_filename:
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return set(names[:depth] if depth else names)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("loss", [Dapo(), Gspo()], ids=lambda loss: type(loss).__name__)
def test_a_micro_batch_waits_for_nothing(share: bool, loss: Any):
    policy = make_policy("llama", lora=lora_of("llama"))
    packed = pack(make_groups(), share_prompts=share)
    assert any(packed.layout.shared) == share
    rollout = RolloutBatch(
        packed.token_ids,
        packed.layout,
        packed.completion_mask,
        sampling_logprobs=torch.full(packed.token_ids.shape, -4.0),
        advantages=torch.linspace(-1, 1, packed.layout.num_sequences),
        counts=StepCounts(tokens=60, sequences=13, groups=5, constant=90.0),
    )
    pieces = train_batch(rollout, old_logprobs=None, ref_logprobs=None).split(40)
    assert len(pieces) > 1
    with Waits() as waits:
        for piece in pieces:
            inputs, _ = Mismatch("truncate", "token", 2.0)(loss_inputs(piece, policy.logprobs(piece, temperature=1.0)))
            loss(inputs).sum.backward()
    assert waits.found == []


def test_a_wait_is_seen():
    mask = torch.tensor([True, False])
    with Waits() as waits:
        float(mask.sum())
        mask[mask]
        mask.nonzero()
        torch.repeat_interleave(torch.arange(2), torch.tensor([1, 2]))
    assert len(waits.found) >= 4
