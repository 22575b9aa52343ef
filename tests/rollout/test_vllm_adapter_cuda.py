"""The kernels that add an adapter in the engine, on a card in bfloat16: sums to the bit, and the gated product."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from reasoner.rollout.vllm_adapter import AdapterPart

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
INPUTS = 8
# Bounds of the parts, outputs, rank: q, k, v and a down projection of 1.5B, parts that no tile fits, gaps between.
JOINED = [
    (((0, 1536), (1536, 1792), (1792, 2048)), 2048, 32),
    (((0, 1536),), 1536, 32),
    (((0, 70), (70, 133), (133, 1001)), 1001, 5),
    (((30, 70), (96, 128)), 200, 300),
]
# And the activation: both of 1.5B and of sizes that no tile fits, gate alone, up alone, one adapter over both.
GATED = [
    (((0, 8960), (8960, 17_920)), 17_920, 32, "silu"),
    (((0, 1001), (1001, 2002)), 2002, 5, "gelu_tanh"),
    (((0, 512),), 1024, 300, "silu"),
    (((512, 1024),), 1024, 32, "gelu_tanh"),
    (((0, 1024),), 1024, 16, "silu"),
]


def drawn(*size: int, most: int, unit: float = 1.0) -> Tensor:
    """Multiples of `unit`, `most` of them at most: sums in float32 are exact in any order."""
    draws = torch.Generator("cuda").manual_seed(sum(size))
    whole = torch.randint(-most, most + 1, size, generator=draws, device="cuda")
    return (whole * unit).bfloat16()


def part_of(bounds: Sequence[tuple[int, int]], outputs: int, rank: int, activation) -> AdapterPart:
    a, b = drawn(len(bounds) * rank, INPUTS, most=1), torch.zeros(outputs, rank, device="cuda", dtype=torch.bfloat16)
    for begin, end in bounds:
        b[begin:end] = drawn(end - begin, rank, most=2, unit=1 / 64)
    return AdapterPart(a, b, tuple(bounds), 0.5, None, activation)


def truth(part: AdapterPart, base: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's output, before it is gated."""
    total = base.double() if bias is None else base.double() + bias.double()
    rank = part.b.shape[1]
    for i, (begin, end) in enumerate(part.bounds):
        low = x.double() @ part.a[i * rank : (i + 1) * rank].double().T
        total[:, begin:end] += part.scaling * low @ part.b[begin:end].double().T
    return total.bfloat16()


def ways(part: AdapterPart, base: Tensor, x: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the layer gives apart from the matrix and below it, and what `truth` says."""
    both = torch.cat([base, x @ part.a.T, torch.full_like(base[:, :3], torch.nan)], 1)
    kept = both.clone()
    found = [
        (part.add_to(base.clone(), x), truth(part, base, x, None)),
        (part.joined(both, None), truth(part, base, x, None)),
        (part.joined(both, bias), truth(part, base, x, bias)),
    ]
    assert torch.equal(both.view(torch.int16), kept.view(torch.int16))
    return found


@pytest.mark.parametrize("num_rows", [1, 5, 16, 64, 100, 256, 300])
@pytest.mark.parametrize(("bounds", "outputs", "rank"), JOINED, ids=str)
def test_an_adapter_is_added_to_the_bit(bounds, outputs, rank, num_rows):
    part = part_of(bounds, outputs, rank, None)
    base, x = drawn(num_rows, outputs, most=127, unit=1 / 16), drawn(num_rows, INPUTS, most=1)
    for found, true in ways(part, base, x, drawn(outputs, most=127, unit=1 / 16)):
        assert torch.equal(found, true)


@pytest.mark.parametrize("num_rows", [1, 5, 16, 64, 100, 256, 300])
@pytest.mark.parametrize(("bounds", "outputs", "rank", "activation"), GATED, ids=str)
def test_gate_and_up_come_out_as_the_product_of_what_was_rounded(bounds, outputs, rank, activation, num_rows):
    part = part_of(bounds, outputs, rank, activation)
    base, x = drawn(num_rows, outputs, most=127, unit=1 / 16), drawn(num_rows, INPUTS, most=1)
    for found, true in ways(part, base, x, drawn(outputs, most=127, unit=1 / 16)):
        gate, up = true.double().chunk(2, 1)
        z = gate if activation == "silu" else 8**0.5 / math.pi**0.5 * (gate + 0.044715 * gate**3)
        product = (gate * z.sigmoid() * up).bfloat16()
        assert found.shape == product.shape and found.is_contiguous()
        torch.testing.assert_close(found, product, rtol=2**-7, atol=1e-30)
        differ = (found != product) & (product.abs() > 1e-30)
        assert differ.float().mean() < 0.01  # float32's last bits may tip a rounding
