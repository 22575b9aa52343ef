"""From four bits to numbers: code[four bits] * the scale of their block of 64, NF4 (arXiv:2305.14314) as bitsandbytes
packs it.

Here are the formula in torch, the truth that the kernel of nf4_triton.py is held against, and whether it takes a call.
Where it does not, models/nf4.py goes on with bitsandbytes. Left out: quantizing, which happens once a run.
"""

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

BLOCK = 64  # numbers that share a scale
PREFER_TRITON = True  # whether cards that can take the kernel do


def fast(data: Tensor, absmax: Tensor, out: Tensor | None = None) -> ModuleType | None:
    """nf4_triton, where it goes with these; None: bitsandbytes."""
    return _module(data.device.index) if PREFER_TRITON and supported(data, absmax, out) else None


def supported(data: Tensor, absmax: Tensor, out: Tensor | None = None) -> bool:
    """Whether the kernel takes these: Triton and an NVIDIA card of compute capability 8.0 or newer, which is the
    current one; bytes that begin at a multiple of 4 and float32 scales, each in one piece; an `out` of bfloat16 in one
    piece that begins at a multiple of 16 bytes, as memory that torch hands out does."""
    return (
        data.is_cuda
        and data.dtype == torch.uint8
        and absmax.dtype == torch.float32
        and data.data_ptr() % 4 == 0
        and data.is_contiguous()
        and absmax.is_contiguous()
        and (out is None or (out.dtype == torch.bfloat16 and out.data_ptr() % 16 == 0 and out.is_contiguous()))
        and data.device.index == torch.cuda.current_device()  # Triton launches there
        and _module(data.device.index) is not None
    )


@cache  # asked for at every matrix
def _module(index: int) -> ModuleType | None:
    capable = torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 0)
    if not capable or find_spec("triton") is None:
        return None
    from reasoner.kernels import nf4_triton

    return nf4_triton


def dequantize_torch(data: Tensor, absmax: Tensor, code: Tensor, out: Tensor) -> None:
    """out[i] = code[bits[i]] * absmax[i // 64] of contiguous `out`, multiplied in float32 and rounded once to the dtype
    of `out`. Byte i of `data` has number 2 i in its high four bits and number 2 i + 1 in its low ones.

    data uint8 of ceil(n / 2), absmax float32 of ceil(n / 64), code float32 [16], out of n numbers in any shape.
    """
    byte = data.flatten().int()
    bits = torch.stack([byte >> 4, byte & 15], 1).flatten()[: out.numel()]
    scale = absmax.repeat_interleave(BLOCK)[: out.numel()]
    out.view(-1).copy_(code[bits] * scale)
