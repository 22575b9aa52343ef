"""The records every stage passes on: plain frozen Python, no torch. A stage takes a record and makes a new one; no
field waits to be filled later.

One index rule holds everywhere: index t speaks of token t, so `sampling_logprobs[t]` is log p(token t | the tokens
before t).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Message = Mapping[str, str]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, as the model will read it.

    >>> Prompt(id="train:17", text="2+2=", answer="4", columns={"level": "easy"}, token_ids=(5, 3, 5, 9))

    `messages` holds the chat turns where the prompt went through a chat template, and is empty for a plain one;
    `text` is the rendered
    prompt in both cases. `columns` has every column of the row by its own name. `prefill` is what the template wrote
    of the answer's
    beginning (`<think>\\n`): rewards see prefill + completion.
    """

    id: str
    text: str
    answer: str
    columns: Mapping[str, object]
    token_ids: tuple[int, ...]
    messages: tuple[Message, ...] = ()
    prefill: str = ""
    images: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A worked example for SFT: prompt ids and completion ids made apart; the completion ends in the stop id.

    >>> Example(prompt=prompt, completion_ids=(6, 1))
    """

    prompt: Prompt
    completion_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine sampled after a prompt; the engine's ids are the only truth, text is for rewards.

    >>> Completion(token_ids=(6, 1), sampled=(True, True), sampling_logprobs=(-0.2, -0.01), text="4",
    finish_reason="stop",
    ...            policy_step_min=3, policy_step_max=3)

    `sampled` is False on tokens that a tool or environment wrote; `sampling_logprobs` is 0.0 there and elsewhere the
    logprob under the
    distribution really sampled from. `text` decodes the ids with special tokens kept and the final stop id left out.
    """

    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    sampling_logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_step_min: int
    policy_step_max: int


@dataclass(frozen=True, slots=True)
class Score:
    """What the rewards said of one completion. A part that does not apply is absent; a part that failed is in
    `failures`, never a 0.

    >>> Score(total=1.1, parts={"accuracy": 1.0, "format": 0.5})            # total = sum of weight x part
    >>> Score(total=0.0, parts={}, failures={"accuracy": "timed out after 5 s"})
    """

    total: float
    parts: Mapping[str, float]
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """True if any part failed: the completion then leaves its group's mean and std."""
        return bool(self.failures)


@dataclass(frozen=True, slots=True)
class Group:
    """The completions of one prompt with their scores, in the same order.

    >>> Group(prompt=prompt, completions=(right, wrong), scores=(Score(1.0, {"accuracy": 1.0}), Score(0.0,
    {"accuracy": 0.0})))
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]
