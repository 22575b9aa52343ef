"""Ranks: the only file that knows of other processes. Alone every call is a no-op; more GPUs are torchrun's part."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def _distributed() -> Any:
    distributed = sys.modules.get("torch.distributed")  # not imported: nobody joined, torch need not load
    if not distributed or not distributed.is_available() or not distributed.is_initialized():
        return None
    # A group of one is no company: vLLM makes such a group for itself.
    return distributed if distributed.get_world_size() > 1 else None


def rank() -> int:
    """This process's number, 0 to size() - 1."""
    distributed = _distributed()
    return distributed.get_rank() if distributed else 0


def size() -> int:
    """How many processes train together."""
    distributed = _distributed()
    return distributed.get_world_size() if distributed else 1


def is_main() -> bool:
    """True on the one rank that writes files and speaks."""
    return rank() == 0


def start() -> None:
    """Join the other processes if torchrun started us (it sets WORLD_SIZE); alone, do nothing."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch
        import torch.distributed as distributed

        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Leave the others; the counterpart of start()."""
    distributed = _distributed()
    if distributed:
        distributed.destroy_process_group()


def sum_over_ranks(tensor: "Tensor") -> "Tensor":
    """The tensor summed over all ranks, in place; counts are passed as float64 so that no sum is rounded."""
    distributed = _distributed()
    if distributed:
        distributed.all_reduce(tensor)
    return tensor


def gather_over_ranks(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank."""
    distributed = _distributed()
    if not distributed:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    distributed = _distributed()
    if distributed:
        distributed.barrier()
