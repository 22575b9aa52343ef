"""NF4 to bfloat16 as a Triton kernel: reads each byte once, writes 16 bytes at once; nf4.py has the formula.

It is bound by memory, 0.5625 bytes read and 2 written a number, so an instruction a number counts. A thread takes words
of eight numbers, one after its neighbour's, so that a warp reads 128 bytes in one piece and writes 512: 16 bytes of
codes a thread in four loads, where one load of 16 bytes would need an exchange between threads before the store. A
number costs a shift, a mask, a look into the table of 16, which `tl.gather` keeps in shared memory (its 16 banks never
conflict), a product and half a rounding. A chain of selects would be fifteen instructions, a table in the first-level
cache two more for its address.

The product keeps what lies below 2^-126, where bitsandbytes on a card, compiled with fast math, has zeros.

Left out: numbers in another dtype, and blocks of another size.
"""

# Kernels are Python to a type checker, whose loops and constants are none; a launch is a call to it.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportInvalidTypeForm=false

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasoner.kernels.tiles import ceil_div


class Cut(NamedTuple):
    """A program's work: `words` of eight numbers, by `warps` of 32 threads."""

    words: int
    warps: int


CUT = Cut(words=512, warps=4)  # 16 bytes of codes a thread


def dequantize(data: Tensor, absmax: Tensor, code: Tensor, out: Tensor, *, cut: Cut = CUT) -> None:
    """`dequantize_torch`, of what `supported` says: data uint8 of ceil(n / 2), absmax float32 of ceil(n / 64), code
    float32 [16], written to `out` of n numbers."""
    count = out.numel()
    if count:
        grid = (ceil_div(count, 8 * cut.words), 1, 1)
        _compiled(out.device.index, cut)[grid](data, absmax, code, out, count, cut.words)


@cache
def _compiled(index: int | None, cut: Cut) -> Any:
    """The kernel as card `index` runs it. Triton's own call looks at every argument each time, hundreds of times a
    pass; what it would find is known here: `out` begins at a multiple of 16 bytes."""
    if not isinstance(dequantize_kernel, triton.JITFunction):
        return dequantize_kernel  # Triton's interpreter
    arguments = torch.uint8, torch.float32, torch.float32, torch.bfloat16, 0
    return dequantize_kernel.warmup(*arguments, WORDS=cut.words, num_warps=cut.warps, grid=(1,))


@triton.jit
def _whole_words(data, absmax, code, out, WORDS: tl.constexpr):
    """WORDS words of eight numbers from where these point.

    The words' alignment is not told on purpose: their loads would be of 16 bytes, and words that lie side by side in
    one thread would change threads through shared memory before they are stored.
    """
    word = tl.arange(0, WORDS)
    eighth = tl.arange(0, 8)
    packed = tl.load(data.to(tl.pointer_type(tl.uint32)) + word)
    scale = tl.load(absmax + word // 8)
    bits = (packed[:, None] >> (4 * (eighth ^ 1))[None, :]) & 15  # of a byte's two, the high one first
    table = tl.load(code + tl.arange(0, 16))
    number = tl.gather(table, bits.to(tl.int32).reshape(WORDS * 8), 0).reshape(WORDS, 8)
    tl.store(out + word[:, None] * 8 + eighth[None, :], (number * scale[:, None]).to(out.dtype.element_ty))


@triton.jit
def _single_numbers(data, absmax, code, out, count, WORDS: tl.constexpr):
    """The first `count` of 8 WORDS numbers from where these point, each by itself; no byte behind them is read.

    In a loop, so that this, which is rare, does not decide how many registers the other way has; over a range of
    another size than the other way's, which Triton would share, and lay out for both.
    """
    for begin in range(0, 8 * WORDS, 2 * WORDS):
        at = begin + tl.arange(0, 2 * WORDS)
        inside = at < count
        byte = tl.load(data + at // 2, mask=inside, other=0).to(tl.int32)
        number = tl.load(code + ((byte >> (4 - at % 2 * 4)) & 15))
        scale = tl.load(absmax + at // 64, mask=inside, other=0.0)
        tl.store(out + at, (number * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["data", "absmax", "code"])
def dequantize_kernel(data, absmax, code, out, count: tl.int64, WORDS: tl.constexpr):
    """8 WORDS of the `count` numbers a program, or what is left of them."""
    first = tl.program_id(0).to(tl.int64) * (8 * WORDS)
    data, absmax, out = data + first // 2, absmax + first // 64, out + first
    if first + 8 * WORDS <= count:
        _whole_words(data, absmax, code, out, WORDS)
    else:
        _single_numbers(data, absmax, code, out, count - first, WORDS)
