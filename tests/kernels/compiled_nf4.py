"""NF4 to bfloat16 compiled on a CPU for every card, as a run has it.

test_without_a_card.py runs this file in a process of its own; compiled.py says how.
"""

import re

import pytest
import torch
from triton.runtime import driver

from reasoner.kernels import nf4_triton as fast
from tests.kernels.compiled import CARDS, Card

INSTRUCTION = re.compile(r"^\s*(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
NUMBERS = 8 * fast.CUT.words // (32 * fast.CUT.warps)  # a thread


@pytest.mark.parametrize("card", CARDS)
def test_few_instructions_a_number_on_every_card(card):
    driver.set_active(Card(card))
    built = fast._compiled(card, fast.CUT)
    ptx = built.asm["ptx"]
    assert built.metadata.shared == 4 * 16, "more than the table is in shared memory: words change threads"
    assert ptx.count("bar.sync") == 1 and "shfl" not in ptx
    assert len(re.findall(r"st\.global\.[\w.]*v4\.b32", ptx)) == NUMBERS // 8
    assert ptx.count("cvt.rn.bf16x2.f32") == NUMBERS // 2
    (way,) = [part for part in built.asm["sass"].split("EXIT") if "STG.E.128" in part]
    names = INSTRUCTION.findall(re.sub(r"/\*.*?\*/|^[-\w:.]+\s", "", way, flags=re.MULTILINE))
    assert 5 * NUMBERS < len(names) < 8 * NUMBERS
    memory = [name[:3] for name in names if name.startswith(("LDG", "STG"))]
    assert memory == ["LDG"] * (2 * NUMBERS // 8 + 1) + ["STG"] * (NUMBERS // 8), "all is asked for before a write"


def test_a_launch_hands_over_what_was_compiled():
    """As Triton's own call would: every argument of the signature, in its order."""
    driver.set_active(Card(90))
    built, launches = fast._compiled(None, fast.CUT), []
    built.module, built._run = object(), lambda *given: launches.append(given)  # in place of what a card loads
    count = 3 * 8 * fast.CUT.words + 1
    data, absmax, code = torch.zeros(count // 2 + 1, dtype=torch.uint8), torch.zeros(count // 64 + 1), torch.zeros(16)
    out = torch.zeros(count, dtype=torch.bfloat16)
    fast.dequantize(data, absmax, code, out)
    (given,) = launches
    arguments = given[-len(built.src.signature) :]
    assert given[:3] == (4, 1, 1) and len(given) == 9 + len(arguments)
    assert all(one is other for one, other in zip(arguments, (data, absmax, code, out), strict=False))
    assert arguments[4:] == (count, fast.CUT.words) and built.src.signature["count"] == "i64"
    assert built.src.attrs[(3,)] == [["tt.divisibility", 16]] and not any(built.src.attrs[(i,)] for i in range(3))
