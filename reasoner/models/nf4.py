"""NF4 matrices by bitsandbytes, arXiv:2305.14314: 4 bits a weight, and a float32 scale (`absmax`) for each 64 of them.

The only file that knows bitsandbytes. A matrix is quantized by itself, with its own scales and without double
quantization, so that siblings side by side in one buffer dequantize to the same bits as each alone: blocks never cross
a row, because rows are a multiple of 64 long. Left out: FP4, 8 bits, other block sizes and double quantization, whose
scales of scales do cross (it would save 0.06 GiB of 1.12 at 1.5B).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from reasoner.errors import MissingExtra, ModelError

BLOCK = 64  # weights that share a scale
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
    # Not through bitsandbytes.functional, whose checks take as long as the launch: this runs hundreds of times a pass.
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        data, state.absmax, BLOCK, state.quant_type, state.shape, state.dtype
    )


def dequantize_into(data: Tensor, state: Any, out: Tensor) -> None:
    """The matrix in bfloat16, written to `out` [rows, columns]."""
    torch.ops.bitsandbytes.dequantize_4bit.out(
        data, state.absmax, BLOCK, state.quant_type, state.shape, state.dtype, out=out
    )


def matmul(x: Tensor, data: Tensor, state: Any, bias: Tensor | None) -> Tensor:
    """x [..., columns] @ matrix.T + bias, in bfloat16, also for few rows of x: [..., rows]."""
    import bitsandbytes

    library: Any = bitsandbytes  # it does not list what it exports
    return library.matmul_4bit(x, data, quant_state=state, bias=bias)


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
