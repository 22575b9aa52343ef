"""The checks of kernels/elementwise_triton.py that its interpreted and its real tests share: each operation, forward
and backward, is held against float64 and may err by little more than transformers' own code does in that dtype.

Rows reach from 1e-3, where a norm's eps counts, to 1e2, and half of them are peaked.
"""

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from reasoner.kernels import elementwise_triton
from reasoner.kernels.elementwise import gated_torch, norm_torch, rotate_torch

EPS = 1e-6
# What a float32 sum in another order may add to the error.
SLACK = {torch.float32: 5e-7, torch.float16: 1e-5, torch.bfloat16: 1e-5}

FEW = 1000


class Draws:
    """Random tensors of a device and dtype, in the same order each time."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=self.generator)).to(self.device, self.dtype)

    def rows(self, num_rows: int, width: int) -> Tensor:
        """Rows of all sizes, every second with one number 100 times the others."""
        found = torch.randn(num_rows, width, generator=self.generator)
        found[::2, width // 3] *= 100
        scale = torch.logspace(-3, 2, num_rows)[torch.randperm(num_rows, generator=self.generator)]
        return (found * scale[:, None]).to(self.device, self.dtype)


def run(function, inputs, upstream) -> list[Tensor]:
    """The function's outputs, and the gradients of its inputs for these gradients of the outputs."""
    inputs = [one.detach().requires_grad_() for one in inputs]
    found = function(*inputs)
    outputs = (found,) if isinstance(found, Tensor) else found
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    return [one.detach() for one in (*outputs, *gradients)]


def errors(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative to the truth's norm: over all, and of the worst row."""
    found, truth = (one.double().reshape(-1, one.shape[-1]) for one in (found, truth))
    miss, size = (found - truth).norm(dim=1), truth.norm(dim=1)
    return float(miss.norm() / size.norm()), float((miss / size.clamp(min=1e-30)).max())


def assert_as_good(mine: list[Tensor], plain: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    """Shapes and dtypes are the plain ones; errors at most 1.25 times theirs, or of few numbers what one rounding may
    be off by: two roundings can be luckier than one."""
    assert len(mine) == len(plain) == len(truth)
    for place, (one, other, exact) in enumerate(zip(mine, plain, truth, strict=True)):
        assert one.shape == other.shape and one.dtype == other.dtype == dtype
        once = torch.finfo(dtype).eps / 2 if one.numel() < FEW else 0.0
        for what, ours, theirs in zip(("all", "worst row"), errors(one, exact), errors(other, exact), strict=True):
            assert ours <= max(1.25 * theirs, once) + SLACK[dtype], f"{what} of {place}: {ours:.2e}, plain {theirs:.2e}"


def double(*tensors: Tensor) -> list[Tensor]:
    return [one.double() for one in tensors]


def check_norm(device: str, dtype: torch.dtype, num_rows: int, width: int, *, added: bool, one_plus: bool) -> None:
    draws = Draws(device, dtype)
    x = draws.rows(num_rows, width)[None]
    residual = [draws.rows(num_rows, width)[None]] if added else []
    weight = draws.normal(width, scale=0.5) + (not one_plus)
    upstream = [draws.normal(1, num_rows, width), draws.normal(1, num_rows, width)]
    module = (Gemma2RMSNorm if one_plus else LlamaRMSNorm)(width, EPS).to(device, dtype).requires_grad_(False)
    module.weight.copy_(weight)

    def ours(x, residual=None):
        return elementwise_triton.add_norm(x, residual, weight, EPS, one_plus=one_plus)

    def theirs(x, residual=None):
        total = x.clone() if residual is None else residual + x
        return total, module(total)

    def exact(x, residual=None):
        total = x.clone() if residual is None else residual + x
        return total, norm_torch(total, weight.double(), EPS, one_plus=one_plus)

    mine, plain = run(ours, [x, *residual], upstream), run(theirs, [x, *residual], upstream)
    assert_as_good(mine, plain, run(exact, double(x, *residual), double(*upstream)), dtype)


def check_norm_of_heads(device: str, dtype: torch.dtype) -> None:
    """[1, heads, N, d] as Gemma 3 hands its query: tokens before heads in memory; the gradient the other way round."""
    draws = Draws(device, dtype)
    x, weight = draws.rows(21, 40).view(1, 7, 3, 40).transpose(1, 2), draws.normal(40)
    upstream = [draws.normal(1, 3, 7, 40)]
    mine = run(lambda x: elementwise_triton.norm(x, weight, EPS, one_plus=True), [x], upstream)
    module = Gemma2RMSNorm(40, EPS).to(device, dtype).requires_grad_(False)
    module.weight.copy_(weight)
    exact = run(lambda x: norm_torch(x, weight.double(), EPS, one_plus=True), double(x), double(*upstream))
    assert_as_good(mine, run(module, [x], upstream), exact, dtype)


def angles(draws: Draws, tokens: int, width: int) -> list[Tensor]:
    """cos and sin [1, N, R] as transformers makes them, of positions that begin again."""
    position = (torch.arange(tokens) * 37 % 4096).float()
    turns = torch.outer(position, 10_000.0 ** -(torch.arange(0, width, 2) / width))
    both = torch.cat([turns, turns], -1)[None]
    return [one.to(draws.device, draws.dtype) for one in (both.cos(), both.sin())]


def check_rotate(
    device: str, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, width: int, *, turned: int, joined: bool
) -> None:
    """`turned` of a head's numbers are rotated; `joined`: query and key are parts of one tensor, as Phi-3 has them."""
    draws = Draws(device, dtype)
    whole = draws.rows(tokens * (heads + kv_heads), width).view(1, tokens, heads + kv_heads, width)
    parts = [part.transpose(1, 2) for part in whole.split([heads, kv_heads], 2)]
    if not joined:
        parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    upstream = [draws.normal(1, heads, tokens, width), draws.normal(1, tokens, kv_heads, width).transpose(1, 2)]
    cos, sin = angles(draws, tokens, turned)
    mine = run(lambda q, k: elementwise_triton.rotate(q, k, cos, sin), parts, upstream)
    plain = run(lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), parts, upstream)

    def exact(query, key):
        return [rotate_torch(x, cos.double(), sin.double()) for x in (query, key)]

    assert_as_good(mine, plain, run(exact, double(*parts), double(*upstream)), dtype)


def check_gated(
    device: str, dtype: torch.dtype, num_rows: int, width: int, *, tanh: bool, halves: bool, overwrite: bool
) -> None:
    draws = Draws(device, dtype)
    gate, up = draws.normal(1, num_rows, width, scale=3), draws.rows(num_rows, width)[None]
    gate[:, ::2, :3] = torch.tensor([60.0, -60.0, -9.0])
    upstream = [draws.normal(1, num_rows, width)]
    inputs = [torch.cat([gate, up], -1)] if halves else [gate, up]

    def ours(*given):
        given = [one.clone() for one in given]  # which may be overwritten
        return elementwise_triton.gated(*given, tanh=tanh, overwrite=overwrite)

    def of(function):
        return lambda *given: function(*(given[0].chunk(2, -1) if halves else given))

    def plain(gate, up):
        return (gelu(gate, approximate="tanh") if tanh else silu(gate)) * up

    truth = run(of(lambda gate, up: gated_torch(gate, up, tanh=tanh)), double(*inputs), double(*upstream))
    assert_as_good(run(ours, inputs, upstream), run(of(plain), inputs, upstream), truth, dtype)


def check_gated_backward(
    device: str, dtype: torch.dtype, num_rows: int, width: int, *, tanh: bool, halves: bool
) -> None:
    """What is written over gate, up and the product's gradient is, to the bit, what autograd gives and what the forward
    pass gave."""
    draws = Draws(device, dtype)
    gate, up = draws.normal(1, num_rows, width, scale=3), draws.rows(num_rows, width)[None]
    given = [torch.cat([gate, up], -1)] if halves else [gate, up]
    upstream = draws.normal(1, num_rows, width)
    product, *gradients = run(lambda *each: elementwise_triton.gated(*each, tanh=tanh), given, [upstream])
    over, other = given[0], None if halves else given[1]
    assert torch.equal(elementwise_triton.gated_product(over, other, tanh=tanh), product)
    elementwise_triton.gated_backward(over, other, upstream, tanh=tanh)
    assert torch.equal(upstream, product)
    assert all(torch.equal(one, true) for one, true in zip(given, gradients, strict=True))


def check_everything_small(device: str, dtype: torch.dtype) -> None:
    """One odd case of each branch, for mutants."""
    check_norm(device, dtype, 7, 40, added=True, one_plus=False)
    check_norm(device, dtype, 7, 40, added=False, one_plus=True)
    check_rotate(device, dtype, 9, 3, 1, 24, turned=12, joined=True)
    for tanh in (False, True):
        check_gated(device, dtype, 5, 1100, tanh=tanh, halves=tanh, overwrite=tanh)
        check_gated_backward(device, dtype, 5, 1100, tanh=tanh, halves=tanh)
