"""The operations that elementwise.py times: their inputs, formulas, and ways to compute them. Left out: the timing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm, silu
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from reasoner.kernels.elementwise import gated_torch, norm_torch, rotate_torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # Triton's interpreter is wrong for bfloat16
EPS = 1e-6
Op = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """Of one model: Qwen2.5-1.5B's, or a toy's."""

    tokens: int = 16_384
    width: int = 1536
    inner: int = 8960
    heads: int = 12
    kv_heads: int = 2
    head: int = 128


@dataclass(frozen=True, eq=False)
class Case:
    """One operation: its inputs by number of tokens, its formula, ways to compute it by name, and numbers moved."""

    name: str
    inputs: Callable[[int], list[Tensor]]
    exact: Op
    ways: dict[str, Callable[[], Op]]
    forward_numbers: int  # that are read or written, a token
    backward_numbers: int
    constants: list[Tensor] = field(default_factory=list)  # handed to `exact` in float64, after the inputs


def draw(*size: int) -> Tensor:
    return torch.randn(*size, device=DEVICE).to(DTYPE)


def kernels() -> Any:
    """Triton's side."""
    from reasoner.kernels import elementwise_triton

    return elementwise_triton


def norm_module(kind: Any, weight: Tensor) -> Any:
    """transformers' own, frozen."""
    made = kind(len(weight), EPS).to(DEVICE, DTYPE).requires_grad_(False)
    made.weight.copy_(weight)
    return made


def liger_norm(weight: Tensor, offset: float, casting: str) -> Op:
    """Which computes the weight's gradient too."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x: LigerRMSNormFunction.apply(x, weight, EPS, offset, casting, False)


def summed(norm: Op) -> Op:
    """The norm of a sum, and the sum."""

    def run(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return total, norm(total)

    return run


def norm_cases(sizes: Sizes) -> list[Case]:
    """A layer's norm, alone and of a sum."""
    width, weight = sizes.width, draw(sizes.width)

    def rows(tokens: int) -> list[Tensor]:
        return [draw(1, tokens, width)]

    llama = norm_module(LlamaRMSNorm, weight)
    return [
        Case(
            "RMSNorm",
            rows,
            lambda x, w: norm_torch(x, w, EPS),
            {
                "transformers": lambda: llama,
                "torch": lambda: lambda x: rms_norm(x, (width,), weight, EPS),
                "Liger": lambda: liger_norm(weight, 0.0, "llama"),
                "kernels": lambda: lambda x: kernels().norm(x, weight, EPS),
            },
            2 * width,
            3 * width,
            [weight],
        ),
        Case(
            "residual + RMSNorm",
            lambda tokens: [*rows(tokens), *rows(tokens)],
            lambda x, residual, w: (residual + x, norm_torch(residual + x, w, EPS)),
            {
                "transformers": lambda: summed(llama),
                "torch": lambda: summed(lambda x: rms_norm(x, (width,), weight, EPS)),
                "kernels": lambda: lambda x, residual: kernels().add_norm(x, residual, weight, EPS),
            },
            4 * width,
            4 * width,
            [weight],
        ),
    ]


def other_norm_cases(sizes: Sizes) -> list[Case]:
    """As Gemma has it, and of heads."""
    width, weight, head_weight = sizes.width, draw(sizes.width), draw(sizes.head)
    return [
        Case(
            "RMSNorm, 1 + weight",
            lambda tokens: [draw(1, tokens, width)],
            lambda x, w: norm_torch(x, w, EPS, one_plus=True),
            {
                "transformers": lambda: norm_module(Gemma2RMSNorm, weight),
                "Liger": lambda: liger_norm(weight, 1.0, "gemma"),
                "kernels": lambda: lambda x: kernels().norm(x, weight, EPS, one_plus=True),
            },
            2 * width,
            3 * width,
            [weight],
        ),
        Case(
            "RMSNorm of query heads",
            lambda tokens: [draw(1, tokens, sizes.heads, sizes.head)],
            lambda x, w: norm_torch(x, w, EPS),
            {
                "transformers": lambda: norm_module(LlamaRMSNorm, head_weight),
                "torch": lambda: lambda x: rms_norm(x, (sizes.head,), head_weight, EPS),
                "kernels": lambda: lambda x: kernels().norm(x, head_weight, EPS),
            },
            2 * sizes.heads * sizes.head,
            3 * sizes.heads * sizes.head,
            [head_weight],
        ),
    ]


def rotary_case(sizes: Sizes) -> Case:
    """Query and key turned together."""
    position = torch.arange(sizes.tokens, device=DEVICE) % 1024
    frequencies = 10_000.0 ** -(torch.arange(0, sizes.head, 2, device=DEVICE) / sizes.head)
    turns = torch.outer(position.float(), frequencies)
    both = torch.cat([turns, turns], -1)[None]
    cos, sin = both.cos().to(DTYPE), both.sin().to(DTYPE)

    def angles(query: Tensor) -> tuple[Tensor, Tensor]:
        return cos[:, : query.shape[2]], sin[:, : query.shape[2]]

    def liger() -> Op:
        from liger_kernel.ops.rope import LigerRopeFunction

        return lambda query, key: LigerRopeFunction.apply(query, key, *angles(query))

    def inputs(tokens: int) -> list[Tensor]:
        return [draw(1, tokens, heads, sizes.head).transpose(1, 2) for heads in (sizes.heads, sizes.kv_heads)]

    moved = 2 * (sizes.heads + sizes.kv_heads) * sizes.head + 2 * sizes.head
    return Case(
        "rotary positions",
        inputs,
        lambda query, key, cos, sin: tuple(rotate_torch(x, cos, sin) for x in (query, key)),
        {
            "transformers": lambda: lambda query, key: apply_rotary_pos_emb(query, key, *angles(query)),
            "Liger": liger,
            "kernels": lambda: lambda query, key: kernels().rotate(query, key, *angles(query)),
        },
        moved,
        moved,
        [cos, sin],
    )


def gated_cases(sizes: Sizes) -> list[Case]:
    """SwiGLU, GEGLU, and SwiGLU of one projection's halves."""
    inner = sizes.inner

    def two(tokens: int) -> list[Tensor]:
        return [draw(1, tokens, inner), draw(1, tokens, inner)]

    def liger(tanh: bool) -> Op:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return (LigerGELUMulFunction if tanh else LigerSiLUMulFunction).apply

    def halves(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return up * silu(gate)

    def ours(tanh: bool, overwrite: bool) -> Callable[[], Op]:
        return lambda: lambda *given: kernels().gated(*given, tanh=tanh, overwrite=overwrite)

    def case(name: str, tanh: bool) -> Case:
        plain: Op = (lambda gate, up: gelu(gate, approximate="tanh") * up) if tanh else (lambda g, u: silu(g) * u)
        ways: dict[str, Callable[[], Op]] = {"transformers": lambda: plain, "Liger": lambda: liger(tanh)}
        ways |= {
            "kernels": ours(tanh, False),
            "kernels, gradients over gate and up": ours(tanh, True),
        }
        return Case(name, two, lambda gate, up: gated_torch(gate, up, tanh=tanh), ways, 3 * inner, 5 * inner)

    return [
        case("SwiGLU", False),
        case("GEGLU", True),
        Case(
            "SwiGLU of halves",
            lambda tokens: [draw(1, tokens, 2 * inner)],
            lambda whole: gated_torch(*whole.chunk(2, -1), tanh=False),
            {
                "transformers": lambda: halves,
                "kernels": ours(False, False),
                "kernels, gradients over gate and up": ours(False, True),
            },
            3 * inner,
            5 * inner,
        ),
    ]
