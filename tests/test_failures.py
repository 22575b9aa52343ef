"""docs/failures.md quotes what the sources say."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/failures.md").read_text(encoding="utf-8")
VARIES = "…"


def text_of(node: ast.expr) -> str:
    """A string expression as it is printed, with VARIES for what is put in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr():
            return "".join(text_of(value) for value in node.values)
        case ast.BinOp(op=ast.Add()):
            return text_of(node.left) + text_of(node.right)
    return VARIES


def said() -> Iterator[str]:
    """Every text of the sources, whole as it is printed; no docstrings, which nobody prints."""
    for path in (ROOT / "reasoner").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        unsaid = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and node not in unsaid:
                yield text_of(node)
    yield (ROOT / "bin/check_machine.sh").read_text(encoding="utf-8")


TEXTS = sorted({text for text in said() if text.strip(VARIES + " ")}, key=len)
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE.partition("## Symptoms")[0], re.MULTILINE)


def is_said(message: str) -> bool:
    """Whether one text holds the message's pieces in order, with something that varies, or nothing, between them."""
    pattern = re.compile(".*?".join(re.escape(piece) for piece in message.split(VARIES)))
    return any(pattern.search(text) for text in TEXTS)


def test_texts_over_several_lines_are_joined():
    source = 'raise E(f"the key {key} is" + " gone: " f"give {x}" + (f", {y}" if y else ""))'
    texts = [text_of(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.expr)]
    assert "the key … is gone: give ……" in texts
    assert not is_said("the key … is gone: give")


def test_the_page_has_messages_that_can_be_looked_for():
    assert len(MESSAGES) > 80 and len(set(MESSAGES)) == len(MESSAGES)
    assert all(max(map(len, message.split(VARIES))) >= 8 for message in MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_page_is_in_the_sources(message: str):
    assert is_said(message)
