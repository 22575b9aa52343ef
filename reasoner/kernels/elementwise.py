"""What a layer does between its matmuls, in one pass over memory each: norms, rotary positions, gated activations.

Here are the formulas in torch, the truth that the kernels of elementwise_triton.py are held against, and the choice
whether a kernel takes a call. Where none does, the caller goes on with transformers' own code (models/fused.py does),
so nothing changes on a CPU. Left out: gradients of a norm's weight (a norm that is trained stays plain torch) and
second derivatives.
"""

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

# Whether cards that can take the kernels do, by operation.
PREFER_NORM = True
PREFER_ROTARY = True
PREFER_GATED = True


def fast(wanted: bool, *tensors: Tensor) -> ModuleType | None:
    """elementwise_triton, where an operation that is wanted there goes with these tensors; None: plain torch."""
    if not (wanted and supported(*tensors)):
        return None
    from reasoner.kernels import elementwise_triton

    return elementwise_triton


def supported(*tensors: Tensor) -> bool:
    """Whether the kernels take these: Triton and an NVIDIA card of compute capability 8.0 or newer, which is the
    current one; one floating dtype of at most 32 bits, and no empty tensor."""
    first = tensors[0]
    return (
        first.is_cuda
        and first.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(one.dtype == first.dtype and one.device == first.device and one.numel() > 0 for one in tensors)
        and first.device.index == torch.cuda.current_device()  # Triton launches there
        and _card_supported(first.device.index)
    )


def preferred() -> bool:
    """Whether any operation goes to a kernel where it can."""
    return PREFER_NORM or PREFER_ROTARY or PREFER_GATED


@cache  # asked for in every layer
def _card_supported(index: int) -> bool:
    capable = torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 0)
    return capable and find_spec("triton") is not None


def norm_torch(x: Tensor, weight: Tensor, eps: float, *, one_plus: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, arXiv:1910.07467; `one_plus`: * (1 + weight), as
    Gemma has it. [.., D], [D] -> [.., D]."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale * (1 + weight if one_plus else weight)


def rotate_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_i, x_{i + R/2}) of the first R numbers of a head turned by its token's i-th angle, arXiv:2104.09864
    in transformers' halves; the rest as it is. x [1, heads, N, d]; cos, sin [1, N, R], halves equal. -> like x."""
    width = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def gated_torch(gate: Tensor, up: Tensor, *, tanh: bool) -> Tensor:
    """silu(gate) * up, or gelu(gate) * up by gelu's tanh form: SwiGLU and GEGLU, arXiv:2002.05202. -> like gate."""
    return (gelu(gate, approximate="tanh") if tanh else silu(gate)) * up
