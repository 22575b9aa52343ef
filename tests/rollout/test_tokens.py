"""A completion's tokens: their texts joined are its text, whatever the tokenizer does to spaces and bytes."""

from collections.abc import Iterable

import pytest

from reasoner.rollout.tokens import token_logprobs
from reasoner.types import Completion

BYTES = {0: b"a", 1: b" b", 2: "漢".encode()[:1], 3: "漢".encode()[1:], 4: b""}


def decode(ids: Iterable[int]) -> str:
    return b"".join(BYTES[i] for i in ids).decode(errors="replace")


def stripping(ids: Iterable[int]) -> str:
    return decode(ids).lstrip(" ")


def completion(*ids: int, text: str | None = None) -> Completion:
    logprobs = tuple(-0.5 * (i + 1) for i in range(len(ids)))
    return Completion(ids, (True,) * len(ids), logprobs, decode(ids) if text is None else text, "stop", 0, 0)


@pytest.mark.parametrize("decoder", [decode, stripping])
def test_texts_join_to_the_completion(decoder) -> None:
    found = token_logprobs(completion(0, 1, 2, 3, 0, 4), decoder)
    assert found == [("a", -0.5), (" b", -1.0), ("漢", -3.5), ("a", -2.5)]


def test_nothing_is_claimed_of_tokens_that_do_not_add_up() -> None:
    assert token_logprobs(completion(0, 1, text="a c"), decode) is None
    assert token_logprobs(completion(0, text="ab"), decode) is None
    assert token_logprobs(completion(4, text=""), decode) == []
