"""Prompts, completions and rewards for the tests of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reasoner.config import Reward, RewardPart
from reasoner.rewards.base import Rewards, load_rewards
from reasoner.types import Completion, Prompt, Score


@pytest.fixture
def make_prompt() -> Callable[..., Prompt]:
    """A prompt with this gold answer; keywords are its columns."""

    def make(answer: str, *, prefill: str = "", row: str = "train:1", **columns: object) -> Prompt:
        return Prompt(id=row, text="Q: ", answer=answer, columns=columns, token_ids=(1,), prefill=prefill)

    return make


@pytest.fixture
def make_completion() -> Callable[..., Completion]:
    """A finished completion of this text."""

    def make(text: str, num_tokens: int = 3) -> Completion:
        return Completion((0,) * num_tokens, (True,) * num_tokens, (0.0,) * num_tokens, text, "stop", 0, 0)

    return make


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., Rewards]]:
    """Rewards of these parts (a string stands for its `fn`); their workers end with the test."""
    loaded: list[Rewards] = []

    def make(parts: dict[str, Any], *, workers: int = 2, columns: set[str] = frozenset(), **functions: Any) -> Rewards:  # type: ignore[assignment]
        full = {name: RewardPart(fn=part) if isinstance(part, str) else part for name, part in parts.items()}
        loaded.append(
            load_rewards(Reward(full, workers=workers), functions=functions, base_dir=tmp_path, columns=set(columns))
        )
        return loaded[-1]

    yield make
    for rewards in loaded:
        rewards.close()


@pytest.fixture
def score(load, make_prompt, make_completion) -> Callable[..., list[Score]]:
    """Scores of these texts against one gold answer by one Python function, through worker processes."""

    def run(
        function: Callable[..., Any], texts: list[str], *, workers: int = 1, timeout_s: float = 10.0
    ) -> list[Score]:
        rewards = load({"part": RewardPart(fn="given", timeout_s=timeout_s)}, workers=workers, given=function)
        return rewards.score([make_prompt("18")] * len(texts), [make_completion(text) for text in texts])

    return run
