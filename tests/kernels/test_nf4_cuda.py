"""NF4 to bfloat16 on a card: the bits of bitsandbytes, in matrices, parts of buffers, CUDA graphs and products."""

from typing import Any

import pytest
import torch
from torch import Tensor

from reasoner.kernels import nf4 as kernel
from reasoner.models import nf4

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SHAPES = [(1, 64), (3, 64), (257, 896), (2048, 1536), (1536, 8960), (4608, 3584), (18_944, 3584), (3584, 18_944)]
RAGGED = [(1, 1), (1, 7), (3, 65), (63, 63), (1001, 1003), (1, 4096 + 2048)]


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("bitsandbytes")


def packed(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Any]:
    """Bytes of every value under scales from 1e-30 to 1e30, with blocks of zeros."""
    draws = torch.Generator("cuda").manual_seed(seed)
    num_bytes, num_blocks = -(-rows * columns // 2), -(-rows * columns // 64)
    data = torch.randint(0, 256, (num_bytes, 1), generator=draws, device="cuda", dtype=torch.uint8)
    absmax = 10 ** (60 * torch.rand(num_blocks, generator=draws, device="cuda") - 30)
    absmax[::7] = 0
    return data, nf4.make_state(absmax, rows, columns)


def by_bitsandbytes(data: Tensor, state: Any) -> Tensor:
    return torch.ops.bitsandbytes.dequantize_4bit.default(data, state.absmax, 64, "nf4", state.shape, torch.bfloat16)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Also of zeros, which have signs, and of what is no number."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, *RAGGED], ids=str)
def test_its_bits_are_bitsandbytes(rows, columns):
    data, state = packed(rows, columns)
    assert kernel.fast(data, state.absmax) is not None
    found = nf4.dequantize(data, state)
    assert found.shape == (rows, columns) and found.dtype == torch.bfloat16
    assert same_bits(found, by_bitsandbytes(data, state))
    exact = torch.empty_like(found)
    kernel.dequantize_torch(data, state.absmax, state.code, exact)
    assert same_bits(found, exact)


def test_a_layers_own_weight():
    data, state = packed(33, 192)
    found = nf4.dequantize(nf4.make_linear(data, state, None).weight, state)
    assert type(found) is Tensor and same_bits(found, by_bitsandbytes(data, state))


def test_scales_that_are_no_numbers():
    data, state = packed(4, 64)
    state.absmax.copy_(torch.tensor([torch.inf, -2.0, 3e38, 1e-36]))
    assert same_bits(nf4.dequantize(data, state), by_bitsandbytes(data, state))
    state.absmax.fill_(torch.nan)
    assert nf4.dequantize(data, state).isnan().all()


def test_below_the_normal_numbers_bitsandbytes_has_zeros():
    data, state = packed(64, 64)
    state.absmax.fill_(1e-38)
    exact = torch.empty(64, 64, dtype=torch.bfloat16, device="cuda")
    kernel.dequantize_torch(data, state.absmax, state.code, exact)
    found = nf4.dequantize(data, state)
    assert same_bits(found, exact) and (found != 0).any() and not by_bitsandbytes(data, state).any()


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (257, 896), (2048, 1536), (63, 72)], ids=str)
def test_it_fills_its_part_of_a_buffer_and_no_more(rows, columns):
    data, state = packed(rows, columns)
    buffer = torch.full((rows + 16, columns), 7.0, device="cuda", dtype=torch.bfloat16)
    assert kernel.fast(data, state.absmax, buffer[8:-8]) is not None
    nf4.dequantize_into(data, state, buffer[8:-8])
    assert same_bits(buffer[8:-8], by_bitsandbytes(data, state))
    assert (buffer[:8] == 7).all() and (buffer[-8:] == 7).all()


def test_a_part_of_fused_bytes_and_scales():
    """As a layer's own matrix lies in its group's buffers: the scales begin anywhere."""
    data, state = packed(33, 192)
    whole = nf4.dequantize(data, state)
    part = nf4.make_state(state.absmax[5 * 3 :], 28, 192)
    assert part.absmax.data_ptr() % 16 == 12
    assert same_bits(nf4.dequantize(data[5 * 96 :], part), whole[5:])


def test_under_a_cuda_graph_it_reads_anew():
    data, state = packed(2048, 1536)
    nf4.dequantize(data, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = nf4.dequantize(data, state)
    for seed in (1, 2):
        other, its_state = packed(2048, 1536, seed)
        data.copy_(other)
        state.absmax.copy_(its_state.absmax)
        found.fill_(7.0)
        graph.replay()
        assert same_bits(found, by_bitsandbytes(other, its_state))


def test_on_another_stream_it_waits_for_what_that_stream_does():
    data, state = packed(2048, 1536)
    expected, stream = by_bitsandbytes(data, state), torch.cuda.Stream()
    late = torch.zeros_like(data)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(data)
        found = nf4.dequantize(late, state)
    stream.synchronize()
    assert same_bits(found, expected)


def test_h1_offsets_past_2_to_the_31():
    columns, rows = 4096, (1 << 19) + 64
    data, state = packed(rows, columns)
    found = nf4.dequantize(data, state)
    for begin in (0, (1 << 18) - 32, (1 << 19) - 32, rows - 64):
        part = nf4.make_state(state.absmax[begin * 64 : (begin + 64) * 64].clone(), 64, columns)
        its_bytes = data[begin * 2048 : (begin + 64) * 2048].clone()
        assert same_bits(found[begin : begin + 64], by_bitsandbytes(its_bytes, part))


@pytest.mark.parametrize("num_rows", [1, 4, 5, 8, 17, 33, 64, 65, 128, 256, 512, 1537])
@pytest.mark.parametrize(("rows", "columns"), [(2048, 1536), (17_920, 1536), (3584, 18_944), (512, 3584)], ids=str)
def test_products_are_bitsandbytes(rows, columns, num_rows):
    """Where it makes the matrix first, so do we, and nowhere else: its own product has other bits."""
    weight = torch.randn(rows, columns, device="cuda") / columns**0.5
    data = torch.empty(rows * columns // 2, 1, device="cuda", dtype=torch.uint8)
    state = nf4.make_state(torch.empty(rows * columns // 64, device="cuda"), rows, columns)
    nf4.quantize(weight, data, state.absmax)
    x = torch.randn(num_rows, columns, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(rows, device="cuda", dtype=torch.bfloat16)
    import bitsandbytes

    for added in (None, bias):
        theirs, found = (
            bitsandbytes.matmul_4bit(x, data, quant_state=state, bias=added),
            nf4.matmul(x, data, state, added),
        )
        torch.testing.assert_close(found, theirs, rtol=0.02, atol=0.02)
        assert same_bits(found, theirs) or not nf4._dequantizes(x, state)


def test_both_kinds_of_product_are_chosen():
    """Else the test above compares bitsandbytes with itself."""
    state = packed(17_920, 1536)[1]
    assert nf4._rule() is not None
    few, many = (torch.empty(n, 1536, device="cuda", dtype=torch.bfloat16) for n in (4, 2000))
    assert not nf4._dequantizes(few, state) and nf4._dequantizes(many, state)
    assert not nf4._dequantizes(many.half(), state)


def test_what_is_supported(monkeypatch):
    data, state = packed(4, 64)
    absmax, out = state.absmax, torch.empty(6, 64, device="cuda", dtype=torch.bfloat16)
    assert kernel.supported(data, absmax) and kernel.supported(data, absmax, out[1:5])
    assert not kernel.supported(data, absmax, out.float())
    assert not kernel.supported(data, absmax, out.view(-1)[1:257])
    assert not kernel.supported(data, absmax, out[:, :32])
    assert not kernel.supported(data[1:], absmax)
    assert not kernel.supported(data.view(torch.int8), absmax)
    assert not kernel.supported(data, absmax.double())
    assert not kernel.supported(data.cpu(), absmax.cpu())
    monkeypatch.setattr(kernel, "PREFER_TRITON", False)
    assert kernel.fast(data, absmax) is None and same_bits(nf4.dequantize(data, state), by_bitsandbytes(data, state))
