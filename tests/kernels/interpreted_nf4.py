"""NF4 to numbers in Triton's interpreter, on a CPU: the formula bit for bit, and bitsandbytes.

test_without_a_card.py runs this file in a process of its own, with TRITON_INTERPRET=1. Left out: bfloat16, which the
interpreter cuts off instead of rounding; compiled_nf4.py looks for the rounding, test_nf4_cuda.py has the bits.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from triton import knobs

from reasoner.kernels import nf4 as kernel
from reasoner.kernels import nf4_triton
from reasoner.kernels.nf4_triton import CUT, Cut
from reasoner.models import nf4
from tests.kernels.mutants import mutated

assert knobs.runtime.interpret, "set TRITON_INTERPRET=1 before this process starts"
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning")  # 0 * inf
DTYPES = [torch.float32, torch.float16]
SMALL = Cut(words=16, warps=1)  # two blocks of 64 a program
# Numbers: one, a part of a byte, of a word, of a block; whole programs; programs and what is left.
COUNTS = [1, 7, 64, 71, 128, 129, 3 * 128 + 64, 5 * 128, 7 * 128 + 101]
CODE = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def drawn(count: int) -> tuple[Tensor, Tensor]:
    """Bytes, in which each of the 256 comes where there is room, and scales from 1e-4 to 1e4."""
    draws = torch.Generator().manual_seed(count)
    num_bytes, num_blocks = -(-count // 2), -(-count // 64)
    data = (torch.arange(num_bytes) % 256)[torch.randperm(num_bytes, generator=draws)].to(torch.uint8)
    return data, 10 ** (8 * torch.rand(num_blocks, generator=draws) - 4)


def truth(data: Tensor, absmax: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The product of two float32 has its digits in float64: rounded to float32 here and nowhere before."""
    bits = [byte >> 4 if high else byte & 15 for byte in data.tolist() for high in (True, False)]
    exact = [CODE.double()[one] * absmax.double()[i // 64] for i, one in enumerate(bits[:count])]
    return torch.stack(exact).float().to(dtype)


def written(data: Tensor, absmax: Tensor, count: int, dtype: torch.dtype, cut: Cut) -> Tensor:
    """What the kernel writes into the middle of a buffer, of which nothing else may change."""
    buffer = torch.full((count + 4096,), 7.0, dtype=dtype)
    nf4_triton.dequantize(data, absmax, CODE, buffer[1024 : 1024 + count], cut=cut)
    assert (buffer[:1024] == 7).all() and (buffer[1024 + count :] == 7).all()
    return buffer[1024 : 1024 + count]


def check(count: int, dtype: torch.dtype, cut: Cut) -> None:
    data, absmax = drawn(count)
    assert torch.equal(written(data, absmax, count, dtype, cut), truth(data, absmax, count, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_every_number_is_the_rounded_product(count, dtype):
    check(count, dtype, SMALL)


@pytest.mark.parametrize("count", [4096, 4095, 2 * 4096 + 1728])
def test_it_is_so_as_a_card_cuts_it(count):
    check(count, torch.float32, CUT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_torch_formula_is_the_same(dtype):
    for count in COUNTS:
        data, absmax = drawn(count)
        out = torch.empty(count, dtype=dtype)
        kernel.dequantize_torch(data, absmax, CODE, out)
        assert torch.equal(out, truth(data, absmax, count, dtype))


def test_nothing_is_written_of_no_numbers():
    data, absmax = torch.empty(0, 1, dtype=torch.uint8), torch.empty(0)
    nf4_triton.dequantize(data, absmax, CODE, torch.empty(0, 64))


def test_scales_that_are_zero_or_no_numbers():
    """A block of zeros has the scale 0, and its zeros have signs."""
    data, _ = drawn(5 * 64)
    absmax = torch.tensor([0.0, torch.inf, torch.nan, -2.0, 1.0])
    found = written(data, absmax, 5 * 64, torch.float32, SMALL)
    exact = truth(data, absmax, 5 * 64, torch.float32)
    assert torch.equal(found.signbit()[:64], exact.signbit()[:64]) and found.signbit()[:64].any()
    torch.testing.assert_close(found, exact, rtol=0, atol=0, equal_nan=True)


def quantized(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """A matrix of bitsandbytes' making."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    data, found = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    state = nf4.make_state(found.absmax, rows, columns)
    state.dtype = dtype
    return data, state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (5, 192), (33, 128)])
def test_it_is_bitsandbytes_and_models_ask_it(rows, columns, dtype, monkeypatch):
    data, state = quantized(rows, columns, dtype)
    assert torch.equal(state.code, CODE)
    theirs, x = nf4.dequantize(data, state), torch.randn(3, columns).to(dtype)
    product, bias = linear(x, theirs), torch.ones(rows, dtype=dtype)
    layer = nf4.make_linear(data, state, None)
    monkeypatch.setattr(kernel, "fast", lambda *tensors: nf4_triton)
    monkeypatch.delattr("torch.ops.bitsandbytes")  # from here on nothing of it answers
    for one in (data, layer.weight):
        found = nf4.dequantize(one, state)
        assert type(found) is Tensor and torch.equal(found, theirs)
    buffer = torch.full((rows + 2, columns), 7.0, dtype=dtype)
    nf4.dequantize_into(data, state, buffer[1:-1])
    assert torch.equal(buffer[1:-1], theirs) and (buffer[[0, -1]] == 7).all()
    asked = []
    monkeypatch.setattr(nf4, "_rule", lambda: (8, lambda *what: asked.append(what)))
    assert torch.equal(nf4.matmul(x, data, state, None), product)
    assert torch.equal(nf4.matmul(x, data, state, bias), linear(x, theirs, bias))
    assert asked == [(None, dtype, 3, rows, columns)] * 2
    nf4.matmul(x.repeat(3, 1), data, state, None)
    assert len(asked) == 2, "above the most rows nobody is asked"


@pytest.mark.parametrize("rule", [None, (8, lambda *what: True)], ids=["none known", "its own product"])
def test_products_from_four_bits_stay_bitsandbytes(rule, monkeypatch):
    data, state = quantized(33, 128, torch.float16)
    x = torch.randn(3, 128).half()
    theirs = nf4.matmul(x, data, state, None)
    monkeypatch.setattr(kernel, "fast", lambda *tensors: nf4_triton)
    monkeypatch.setattr(nf4, "_rule", lambda: rule)
    monkeypatch.setattr(nf4_triton, "dequantize", None)
    assert torch.equal(nf4.matmul(x, data, state, None), theirs)


MUTANTS = {
    "the low bits first": ("(4 * (eighth ^ 1))", "(4 * eighth)"),
    "words of another order": ("4 * (eighth ^ 1)", "4 * (7 - eighth)"),
    "blocks of 128": ("word // 8)", "word // 16)"),
    "the first program's bytes": ("data + first // 2,", "data + 0 * first,"),
    "the first program's scales": ("absmax + first // 64,", "absmax + 0 * first,"),
    "the first program's place": ("out + first\n", "out + 0 * first\n"),
    "the low bits first, single": ("(4 - at % 2 * 4)", "(at % 2 * 4)"),
    "blocks of 128, single": ("at // 64", "at // 128"),
    "too many": ("count - first", "count"),
    "one too few": ("inside = at < count", "inside = at < count - 1"),
    "a whole program too many": ("first + 8 * WORDS <= count", "first + 4 * WORDS <= count"),
    "the same numbers again": ("at = begin +", "at = 0 * begin +"),
    "rounded twice": ("(number * scale[:, None])", "(number * scale[:, None]).to(tl.float16)"),
    "rounded twice, single": ("(number * scale)", "(number * scale).to(tl.float16)"),
}


def check_everything_small() -> None:
    for count in (3 * 128 + 64, 2 * 128 + 101):
        check(count, torch.float32, SMALL)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutated_formula_is_seen(mutant, monkeypatch, tmp_path):
    module = mutated(nf4_triton, *MUTANTS[mutant], tmp_path)
    monkeypatch.setattr(nf4_triton, "dequantize", module.dequantize)
    with pytest.raises(AssertionError):
        check_everything_small()


def test_the_case_of_the_mutants_passes_without_one():
    check_everything_small()
