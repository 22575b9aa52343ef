"""What models/nf4.py asks of bitsandbytes beyond its public names, and who dequantizes where there is no card."""

import re
from importlib.util import find_spec
from pathlib import Path

import torch

from reasoner.kernels import nf4 as kernel
from reasoner.models import nf4


def test_the_rule_for_products_has_the_names_that_we_ask_for():
    """Without them all products are its own, which is right, and slower. Read, because only a card can import it."""
    spec = find_spec("bitsandbytes")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "backends/cuda/ops.py").read_text(encoding="utf-8")
    for name in nf4.RULE:
        assert re.search(rf"^    {name} = ", source, re.MULTILINE), name
    assert re.search(r"_use_custom_fn\(A\.device\.index, A\.dtype, M, N, K\)", source)
    assert re.search(r"if M > _gemm_4bit_custom_max_m:\s+use_custom = False", source)


def test_on_a_cpu_bitsandbytes_dequantizes():
    data, absmax = torch.zeros(128, 1, dtype=torch.uint8), torch.ones(4)
    state = nf4.make_state(absmax, 4, 64)
    assert kernel.fast(data, absmax) is None
    found, exact = nf4.dequantize(data, state), torch.empty(4, 64, dtype=torch.bfloat16)
    kernel.dequantize_torch(data, absmax, state.code, exact)
    assert torch.equal(found, exact) and (found == -1).all()
