"""Layers' inputs on the host: the same bits with copies that come late, host memory used again, nothing kept behind."""

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reasoner import train
from reasoner.errors import ConfigError, OutOfMemory
from reasoner.models.loading import recompute_layers
from reasoner.models.offload import Chunks, Offload, Offloaded, Stream
from reasoner.models.policy import Policy
from tests.models.tiny_models import Batch, gradients, lora_of, make_batch, make_policy

LAYERS = 5
RECOMPUTING = LAYERS - 1  # all but the last
MIB = 1 << 20


class LateStream(Stream):
    """Copies happen when somebody waits for them or for a later one, and what is to be filled is filled with ones."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.queue: list[list[tuple[Tensor, Tensor]]] = []
        self.done = 0
        self.asked: list[int] = []  # for each copy, how many inputs had been asked for as it began
        self.num_asked = self.hasty = 0  # hasty: waited for without a layer in between

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> int:
        for to, _ in pairs:
            to.fill_(255)
        self.queue.append(list(pairs))
        self.asked.append(self.num_asked)
        return len(self.queue)

    def wait(self, copied: int | None) -> None:
        if copied is None:
            return
        self.hasty += self.num_asked > 0 and self.asked[copied - 1] == self.num_asked
        while self.done < copied:
            for to, source in self.queue[self.done]:
                to.copy_(source)
            self.queue[self.done] = []
            self.done += 1


class Counting(Offload):
    """Tells its late stream of each input that is asked for."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), chunk=1000, small=0)
        self.stream: LateStream = LateStream()

    def unpack(self, packed: Any) -> Tensor:
        self.stream.num_asked += 1
        return super().unpack(packed)


def offloading(policy: Policy, place: Offload) -> Policy:
    """The policy, its layers' inputs kept by `place`."""
    recompute_layers(policy.base, "tiny")
    for layer in policy.base.model.layers:
        layer._gradient_checkpointing_func = Offloaded(layer._gradient_checkpointing_func, place)
    policy.train_mode(dropout=False)
    return policy


def tiny(**changes: Any) -> Policy:
    return make_policy("llama", lora=lora_of("llama"), num_hidden_layers=LAYERS, **changes)


def learn(policy: Policy, batch: Batch) -> dict[str, Tensor]:
    return gradients(policy, policy.logprobs(batch, temperature=1.0).logprobs.sum())


def test_gradients_are_bit_equal_with_copies_that_are_late() -> None:
    plain, place = tiny(), Counting()
    late = place.stream
    ours = offloading(tiny(), place)
    recompute_layers(plain.base, "tiny")
    plain.train_mode(dropout=False)
    for lengths in ((1, 7, 30), (5,), (1, 7, 30), (40, 13)):
        batch = make_batch(lengths)
        late.num_asked = 0
        truth, found = learn(plain, batch), learn(ours, batch)
        assert all(torch.equal(found[name], truth[name]) for name in truth) and late.num_asked == RECOMPUTING
    # Out of each that recomputes and back into each but the last of them, whose input is still there.
    assert len(late.queue) == 4 * (2 * RECOMPUTING - 1) and late.hasty == 0


def test_a_second_backward_and_two_passes_at_once_find_their_inputs() -> None:
    policy = offloading(tiny(), Offload(torch.device("cpu"), chunk=4096, small=0))
    weights = list(policy.trainable().values())
    first, second = make_batch((9, 4)), make_batch((3, 20))
    truth = [learn(policy, first), learn(policy, second)]
    losses = [policy.logprobs(batch, temperature=1.0).logprobs.sum() for batch in (first, second)]
    for loss, right in ((losses[0], truth[0]), (losses[1], truth[1]), (losses[0], truth[0])):
        found = torch.autograd.grad(loss, weights, retain_graph=True)
        assert all(map(torch.equal, found, right.values()))


def test_host_memory_is_used_again_and_inputs_leave_the_device() -> None:
    place = Offload(torch.device("cpu"), chunk=4096, small=0)
    policy = offloading(tiny(), place)
    seen: list[weakref.ref[Tensor]] = []
    for layer in policy.base.model.layers[:RECOMPUTING]:
        layer.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    batch = make_batch((50, 14))
    loss = policy.logprobs(batch, temperature=1.0).logprobs.sum()
    assert [one() is not None for one in seen] == [False] * len(seen)
    assert (
        place.chunks.num == RECOMPUTING * 2 and not place.chunks._free
    )  # 64 rows of 32 float32 numbers are two chunks
    del loss
    gc.collect()
    assert len(place.chunks._free) == place.chunks.num  # a pass without a backward gives its chunks back
    for _ in range(3):
        learn(policy, batch)
    assert place.chunks.num == RECOMPUTING * 2 == len(place.chunks._free)


def test_small_tensors_and_numbers_stay() -> None:
    place = Offload(torch.device("cpu"), small=64)
    small, whole = torch.zeros(15), torch.zeros(64, dtype=torch.int64)
    assert place.pack(small) is small and place.pack(whole) is whole and place.unpack(whole) is whole
    large = torch.arange(16.0)
    parked = place.pack(large)
    assert parked is not large and torch.equal(place.unpack(parked), large)


def test_chunks_are_counted_by_their_bytes() -> None:
    chunks = Chunks(100, pinned=False)
    taken = [chunks.take(nbytes) for nbytes in (1, 100, 101)]
    assert [len(one) for one in taken] == [1, 1, 2] and chunks.num == 4
    chunks.give_back(taken[2])
    assert len(chunks.take(150)) == 2 and chunks.num == 4


def test_a_host_without_memory_to_lock_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    chunks = Chunks(1 << 29, pinned=False)
    chunks.take(1)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(OutOfMemory, match=r"no more page-locked memory after 0\.50 GiB .*gradient_checkpointing=true"):
        chunks.take(1)


def test_a_run_on_the_cpu_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"there is no CUDA GPU: set it to true"):
        train("tiny", overrides=["model.gradient_checkpointing=offload", f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def on_card() -> Policy:
    """Twelve layers, 512 wide, so that an input of 8,192 tokens is 8 MiB."""
    sizes = {"hidden_size": 512, "head_dim": 64, "intermediate_size": 1024, "num_hidden_layers": 12}
    policy = make_policy("llama", lora=lora_of("llama"), max_position_embeddings=8192, **sizes)
    return Policy(policy.model.to("cuda", torch.bfloat16), policy.family, revision=None)


def batch_on_card(lengths: tuple[int, ...]) -> Batch:
    from reasoner.models.attention import Layout

    batch = make_batch(lengths)
    return Batch(batch.token_ids.cuda(), Layout.of(lengths, "cuda"), batch.completion_mask.cuda())


@pytest.mark.gpu
@cuda
def test_on_a_card_the_bits_are_those_without_in_fifty_passes() -> None:
    # No sequence is longer than a block of torch's fused attention: several blocks would add up a query's gradient in
    # any order.
    batches = [batch_on_card(lengths) for lengths in ((64,) * 126, (17, 64, 40) * 30)]
    policy = on_card()
    truths = []
    for offload in (False, True):
        recompute_layers(policy.base, "tiny", offload=offload)
        policy.train_mode(dropout=False)
        assert policy.offloads is offload
        if not offload:
            truths = [learn(policy, batch) for batch in batches]
            again = learn(policy, batches[0])
            assert all(torch.equal(again[name], truths[0][name]) for name in again), "the pass itself is not repeatable"
    for turn in range(50):
        found = learn(policy, batches[turn % 2])
        assert all(torch.equal(found[name], truths[turn % 2][name]) for name in found), turn


@pytest.mark.gpu
@cuda
def test_on_a_card_memory_is_lower_by_the_layers_inputs() -> None:
    batch, policy, peaks = batch_on_card((4096, 4096)), on_card(), []
    for offload in (False, True):
        recompute_layers(policy.base, "tiny", offload=offload)
        policy.train_mode(dropout=False)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            learn(policy, batch)
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
    # All but the few that are on their way.
    assert peaks[0] - peaks[1] > 8 * 8 * MIB
