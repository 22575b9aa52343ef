"""NF4 matrices by bitsandbytes, arXiv:2305.14314: 4 bits a weight, and a float32 scale (`absmax`) for each 64 of them.

The only file that knows bitsandbytes, and that chooses between it and our own kernel for making numbers of four bits
again (kernels/nf4.py), which gives the same bits. A matrix is quantized by itself, with its own scales and without
double quantization, so that siblings side by side in one buffer dequantize to the same bits as each alone: blocks never
cross a row, because rows are a multiple of 64 long. Left out: FP4, 8 bits, other block sizes and double quantization,
whose scales of scales do cross (it would save 0.06 GiB of 1.12 at 1.5B).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from reasoner.errors import MissingExtra, ModelError
from reasoner.kernels import nf4 as kernel

BLOCK = kernel.BLOCK  # weights that share a scale
RULE = ("_gemm_4bit_custom_max_m", "_gemm_4bit_use_custom_fn")  # bitsandbytes' names, 0.50
STATE_KEY = ".quant_state.bitsandbytes__"  # follows a weight's name in a checkpoint that bitsandbytes quantized


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A matrix [rows, columns] as a checkpoint that was quantized before holds it."""

    data: Tensor  # uint8 [rows * columns / 2, 1]
    absmax: Tensor  # float32 [rows * columns / 64]
    shape: torch.Size


def check_installed(purpose: str) -> None:
    """Raises MissingExtra where bitsandbytes isn't there."""
    if find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "gpu", purpose)


def fits(columns: int) -> bool:
    """Whether rows of this length can be quantized. Others stay 16-bit: their blocks would cross rows, and
    bitsandbytes' fast kernels do not take them."""
    return columns % BLOCK == 0


def make_state(absmax: Tensor, rows: int, columns: int) -> Any:
    """bitsandbytes' description of the matrix [rows, columns] with these scales, computed in bfloat16."""
    from bitsandbytes.functional import QuantState, get_4bit_type

    return QuantState(
        absmax=absmax,
        shape=torch.Size((rows, columns)),
        code=get_4bit_type("nf4", device=absmax.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )


def quantize(weight: Tensor, data: Tensor, absmax: Tensor) -> None:
    """Write the matrix into `data` and `absmax`, which may be slices of larger buffers."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    data.copy_(packed)
    absmax.copy_(state.absmax)


def dequantize(data: Tensor, state: Any) -> Tensor:
    """The matrix in bfloat16: [rows, columns]."""
    with torch._C.DisableTorchFunctionSubclass():  # a Params4bit says in Python what a tensor is asked
        fast = kernel.fast(data, state.absmax)
        if fast is None:
            # Not through bitsandbytes.functional, whose checks take as long as the launch.
            return torch.ops.bitsandbytes.dequantize_4bit.default(
                data, state.absmax, BLOCK, state.quant_type, state.shape, state.dtype
            )
        out = torch.empty(state.shape, dtype=state.dtype, device=data.device)
        fast.dequantize(data, state.absmax, state.code, out)
        return out


def dequantize_into(data: Tensor, state: Any, out: Tensor) -> None:
    """The matrix in bfloat16, written to `out` [rows, columns]."""
    fast = kernel.fast(data, state.absmax, out)
    if fast is not None:
        fast.dequantize(data, state.absmax, state.code, out)
        return
    torch.ops.bitsandbytes.dequantize_4bit.out(
        data, state.absmax, BLOCK, state.quant_type, state.shape, state.dtype, out=out
    )


def matmul(x: Tensor, data: Tensor, state: Any, bias: Tensor | None) -> Tensor:
    """x [..., columns] @ matrix.T + bias, in bfloat16, also for few rows of x: [..., rows]."""
    if kernel.fast(data, state.absmax) is not None and _dequantizes(x, state):
        return linear(x, dequantize(data, state), bias)
    import bitsandbytes

    library: Any = bitsandbytes  # it does not list what it exports
    return library.matmul_4bit(x, data, quant_state=state, bias=bias)


def _dequantizes(x: Tensor, state: Any) -> bool:
    """Whether bitsandbytes would make the matrix and have cuBLAS multiply, not multiply from four bits itself."""
    rule = _rule()
    if rule is None or x.dtype != state.dtype:
        return False
    num_rows = x.numel() // x.shape[-1]
    return num_rows > rule[0] or not rule[1](x.device.index, x.dtype, num_rows, *state.shape)


@cache
def _rule() -> tuple[int, Callable[..., bool]] | None:
    """The most rows that bitsandbytes multiplies from four bits itself, and whether it does on a card, for a dtype, so
    many rows and a matrix [O, K]. Neither has a public name: of a version that has others all is left to it."""
    from bitsandbytes.backends.cuda import ops

    most, own = (getattr(ops, name, None) for name in RULE)
    return None if most is None or own is None else (most, own)


def make_linear(data: Tensor, state: Any, bias: Tensor | None) -> torch.nn.Module:
    """A frozen linear layer whose weight is `data` itself; peft puts its 4-bit adapter layer around it.

    It computes in bfloat16 from the first call: left to itself the layer would take the dtype of its first input.
    """
    import bitsandbytes.nn

    layers: Any = bitsandbytes.nn  # its annotations are not those of its code
    rows, columns = state.shape
    linear = layers.Linear4bit(
        columns, rows, bias=False, device="meta", compute_dtype=torch.bfloat16, compress_statistics=False,
        quant_type="nf4",
    )  # fmt: skip
    linear.weight = layers.Params4bit(
        data, requires_grad=False, quant_state=state, blocksize=BLOCK, quant_type="nf4", compress_statistics=False,
        module=linear, bnb_quantized=True,
    )  # fmt: skip
    linear.quant_state = state
    linear.support_avx512bf16_for_cpu = False  # it would repack the weight in place, away from its buffer
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    return linear


def shape_of(weight: Tensor) -> torch.Size:
    """The matrix's shape, whether it is packed or not."""
    state = getattr(weight, "quant_state", None)
    return weight.shape if state is None else state.shape


def read_packed(name: str, weight: Tensor, companions: Mapping[str, Tensor]) -> Packed:
    """The weight `name` of a checkpoint that bitsandbytes quantized. `companions`: the tensors whose names begin with
    its own, by what follows there (`absmax`, `quant_map`, `quant_state.bitsandbytes__nf4` ...).

    Doubly quantized scales become plain ones. Raises ModelError if it is not NF4 in blocks of 64.
    """
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    state: Any = QuantState.from_dict(dict(companions), device=weight.device)
    if state.quant_type != "nf4" or state.blocksize != BLOCK or weight.dtype != torch.uint8:
        raise ModelError(
            f"{name} is quantized as {state.quant_type} in blocks of {state.blocksize}, stored as {weight.dtype}; "
            f"known is nf4 in blocks of {BLOCK}, stored as torch.uint8. Use the model as it was before it was "
            "quantized, with model.quantize=nf4"
        )
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    return Packed(weight, absmax.float(), torch.Size(state.shape))
