"""How benchmarks/long_context.py searches, with a made-up model of memory."""

import pytest

from benchmarks.long_context import CLOSE, STEP, OutOfTime, following, search


def memory(tokens: int) -> float:
    """6.5 GiB, and 100 KiB a token; 1.2 GiB more where tiles are computed, 150 KiB a token before that."""
    return 6.5 + tokens * 100 / 2**20 + min(1.2, tokens * 150 / 2**20)


@pytest.mark.parametrize("slack", [0.0, 0.3])  # what is reserved beyond what is used
def test_the_search_ends_within_three_per_cent_and_few_probes(slack: float) -> None:
    known: dict[int, float] = {}
    for limit, most in ((7.25, 12), (11.25, 9), (15.25, 4), (23.25, 4)):
        tried: list[int] = []

        def fits(tokens: int, limit: float = limit, tried: list[int] = tried) -> float | None:
            tried.append(tokens)
            return memory(tokens) if memory(tokens) + slack <= limit else None

        low, high = search(fits, 512, limit, known)
        assert memory(low) + slack <= limit < memory(high) + slack
        assert high <= CLOSE * low or high - low <= STEP
        assert len(tried) <= most and len(set(tried)) == len(tried), (limit, tried)


def test_nothing_fits_and_no_time() -> None:
    assert search(lambda tokens: None, 512, 7.0, {}) == (0, 64)

    def slow(tokens: int) -> float:
        if tokens > 1024:
            raise OutOfTime
        return tokens / 1000

    assert search(slow, 512, 100.0, {}) == (1024, 0)


def test_the_next_length_by_hand() -> None:
    assert following({}, 512, 0, 10.0) == 1024
    assert following({}, 0, 512, 10.0) == 256
    assert following({512: 1.0}, 512, 1024, 10.0) == 768
    assert following({1024: 2.0, 2048: 3.0}, 2048, 0, 10.0) == 9024  # 2048 + 1024 x 6.85, down to a multiple of 64
    assert following({1024: 2.0, 2048: 3.0}, 0, 9024, 10.0) == 8704
    assert following({1024: 2.0, 2048: 9.9}, 2048, 0, 10.0) == 2112  # no step back
