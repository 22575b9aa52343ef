"""Layers that recompute, with the one thing each keeps, its input, in the host's memory instead of the GPU's.

The copies run on a stream of their own: out while the next layer computes, back while the layer above goes backward,
so that they cost time only where a layer is faster than its copy. Host memory is page-locked, taken in chunks and kept
for the next pass. Copies change no bit. Left out: anything but the inputs of layers, and disks.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from reasoner.errors import OutOfMemory

CHUNK = 16 << 20  # bytes; a power of two, to which page-locked memory is rounded up
SMALL = 1 << 20  # bytes of a tensor that is not worth the way


class Chunks:
    """Page-locked host memory in pieces of one size, taken and given back, never returned to the system."""

    def __init__(self, size: int, *, pinned: bool):
        self.size, self.pinned = size, pinned
        self.num = 0  # there are in all
        self._free: list[Tensor] = []

    def take(self, nbytes: int) -> list[Tensor]:
        """Enough for so many bytes. Raises OutOfMemory where the host has none left to lock."""
        needed = -(-nbytes // self.size)
        while len(self._free) < needed:
            self._free.append(self._new())
            self.num += 1
        return [self._free.pop() for _ in range(needed)]

    def _new(self) -> Tensor:
        try:
            return torch.empty(self.size, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            raise OutOfMemory(
                f"the host has no more page-locked memory after {self.num * self.size / 2**30:.2f} GiB for layers' "
                "inputs: set model.gradient_checkpointing=true, or fewer tokens in a micro-batch"
            ) from error

    def give_back(self, chunks: Sequence[Tensor]) -> None:
        """For others to take."""
        self._free.extend(chunks)


class Stream:
    """Copies beside the computation: a second stream where there is a GPU, at once on the CPU.

    All copies are on one stream, so a chunk that was read for a copy back may be written by the next copy out.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Copy each (to, from) after what is computed so far; what `wait` takes."""
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side) if self._side is not None else nullcontext():
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
        return None if self._side is None else self._side.record_event()

    def wait(self, copied: Any) -> None:
        """Have the computation wait for a copy."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)


class Parked:
    """One tensor in host chunks; `here` is it on the device, where it still or already is."""

    def __init__(self, tensor: Tensor, chunks: list[Tensor], owner: "Offload"):
        self.here: Tensor | None = tensor
        self.copied: Any = None
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.chunks, self.owner = chunks, owner
        self.before: weakref.ref[Parked] | None = None  # what was parked before it, and is wanted after it
        self.copied = owner.stream.copy(self._pairs(tensor, out=True))

    def fetch(self) -> None:
        """Begin to copy it back."""
        if self.here is None:
            self.here = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.copied = self.owner.stream.copy(self._pairs(self.here, out=False))

    def leave(self) -> Tensor:
        """The tensor, once its last copy is over; from now on it is in the chunks alone."""
        tensor = self.here
        assert tensor is not None
        self.owner.stream.wait(self.copied)
        self.here = None
        return tensor

    def _pairs(self, tensor: Tensor, *, out: bool) -> list[tuple[Tensor, Tensor]]:
        pieces = tensor.view(-1).view(torch.uint8).split(self.owner.chunks.size)
        hosts = [chunk[: len(piece)] for chunk, piece in zip(self.chunks, pieces, strict=True)]
        return list(zip(hosts, pieces, strict=True)) if out else list(zip(pieces, hosts, strict=True))

    def __del__(self) -> None:
        if self.here is not None:  # its memory may be used again only after the copy
            self.leave()
        self.owner.chunks.give_back(self.chunks)


class Offload:
    """Where the layers of one model, which run in turn, keep their inputs.

    On the CPU it does the same with plain copies, which saves nothing: for tests.
    """

    def __init__(self, device: torch.device, *, chunk: int = CHUNK, small: int = SMALL):
        self.chunks = Chunks(chunk, pinned=device.type == "cuda")
        self.stream = Stream(device)
        self.small = small
        self._last: weakref.ref[Parked] | None = None
        self._here: deque[weakref.ref[Parked]] = deque()  # those parked last, whose copy out may not be over

    def pack(self, tensor: Tensor) -> "Tensor | Parked":
        """Begin to copy the tensor out; small ones stay."""
        if tensor.nbytes < self.small or tensor.device != self.stream.device or not tensor.is_floating_point():
            return tensor
        kept = tensor.detach().contiguous()
        parked = Parked(kept, self.chunks.take(kept.nbytes), self)
        parked.before, self._last = self._last, weakref.ref(parked)
        self._here.append(self._last)
        if len(self._here) > 1:  # the one before has had a layer's time to get out
            earlier = self._here.popleft()()
            if earlier is not None and earlier.here is not None:
                earlier.leave()
        return parked

    def unpack(self, packed: "Tensor | Parked") -> Tensor:
        """The tensor again; and begin to copy the one back that is wanted next."""
        if isinstance(packed, Tensor):
            return packed
        packed.fetch()
        tensor = packed.leave()
        following = packed.before() if packed.before else None
        if following is not None:
            following.fetch()
        return tensor


@dataclass(frozen=True, slots=True, eq=False)
class Offloaded:
    """A checkpoint function, as transformers' GradientCheckpointingLayer calls it, whose inputs are kept by `place`."""

    checkpoint: Callable[..., Any]
    place: Offload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives."""
        with saved_tensors_hooks(self.place.pack, self.place.unpack):
            return self.checkpoint(*args, **kwargs)
