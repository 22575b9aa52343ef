"""What samples: the protocol that every rollout engine keeps (choice.py chooses one).

An engine takes prompts as token ids and gives completions as token ids, with the logprob of every sampled token under
the distribution it was really drawn from. The sampling law of training: softmax(logits / temperature) over the whole
vocabulary, as the trainer computes it. There is no field for top-p, top-k, min-p or penalties: what they hide stays
unseen, whatever is corrected afterwards. Left out: tools and several turns (a rollout function around `generate`, see
single_turn.py) and streaming token by token.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol

from reasoner.errors import ModelError
from reasoner.types import Completion, Prompt

if TYPE_CHECKING:
    from torch import Tensor

Decode = Callable[[Sequence[int]], str]  # ids -> text with special tokens kept
Finished = Callable[[int, int, Completion], None]  # which prompt, which of its completions, and that one


def unheard(prompt: int, number: int, completion: Completion) -> None:
    """Nobody waits for single completions."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample, whole: nothing is taken from a checkpoint's generation_config.json.

    >>> Sampling(temperature=1.0, max_tokens=512, num_completions=8, stop_ids=(151645, 151643), seed=0)
    """

    temperature: float  # 0: greedy
    max_tokens: int  # of a completion, the stop id included
    num_completions: int  # of each prompt
    stop_ids: tuple[int, ...]  # each ends a completion and belongs to it
    seed: int

    def __post_init__(self) -> None:
        assert self.temperature >= 0 and self.max_tokens > 0 and self.num_completions > 0, self


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine is and can do."""

    name: str
    own_weights: bool  # False: it samples from the policy's own tensors, so load_adapter copies nothing
    images: bool  # whether Prompt.images are read


class Engine(Protocol):
    """Samples completions of prompts. Nothing but its weights is carried from one call to the next."""

    @property
    def capabilities(self) -> Capabilities:
        """What this engine is and can do."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, policy_step: int, finished: Finished = unheard
    ) -> list[list[Completion]]:
        """`num_completions` completions of each prompt, in the prompts' order.

        `finished` is called in this thread with each of them, once, while others may still be sampled; in any order.
        `policy_step` names the weights sampled from, and varies the draws. The same prompts, sampling, weights and step
        give the same completions; the process's own random state is left alone. At temperature 0 the likeliest token
        is taken, with its logprob at temperature 1. Head rows beyond the tokenizer's last id are not banned, because
        the trainer's softmax counts them too. Raises ModelError, before any sampling, if a prompt and max_tokens
        together exceed the context.
        """
        ...

    def load_adapter(self, state: "Mapping[str, Tensor]", policy_step: int) -> None:
        """Sample from these trainable weights from now on (names and tensors of `Policy.trainable`)."""
        ...

    def sleep(self) -> None:
        """Free the memory that the trainer needs; only `wake` and `close` may follow."""
        ...

    def wake(self) -> None:
        """Be ready to sample again."""
        ...

    def close(self) -> None:
        """Give everything back; the engine is not used again."""
        ...


def completed(
    ids: Sequence[int], logprobs: Sequence[float], *, stopped: bool, decode: Decode, policy_step: int
) -> Completion:
    """The completion of these sampled ids and their logprobs; `stopped`: the last one is a stop id, else the limit cut
    it."""
    return Completion(
        token_ids=tuple(ids),
        sampled=(True,) * len(ids),
        sampling_logprobs=tuple(logprobs),
        text=decode(ids[:-1] if stopped else ids),
        finish_reason="stop" if stopped else "length",
        policy_step_min=policy_step,
        policy_step_max=policy_step,
    )


@contextmanager
def asleep(engine: Engine) -> Iterator[None]:
    """The engine's memory is the trainer's inside this block; afterwards it is awake.

    Also if the block raised, where there is room to wake in: what it raised says more than that there is none.
    """
    engine.sleep()
    try:
        yield
    except BaseException:
        with suppress(ModelError):
            engine.wake()
        raise
    engine.wake()


def prompt_seeds(prompts: Sequence[Prompt], sampling: Sampling, policy_step: int) -> list[int]:
    """A seed of 64 bits for each prompt: a hash of (seed, policy_step, the prompt's id, how often that id came before
    in this call)."""
    seen, seeds = Counter[str](), []
    for prompt in prompts:
        key = f"{sampling.seed} {policy_step} {seen[prompt.id]} {prompt.id}"
        seen[prompt.id] += 1
        seeds.append(int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big"))
    return seeds


def check_prompts(prompts: Sequence[Prompt], sampling: Sampling, max_context: int, engine: Capabilities) -> None:
    """Nothing, or ModelError if one of the prompts can't be sampled by this engine within `max_context` tokens."""
    for prompt in prompts:
        assert prompt.token_ids, f"prompt {prompt.id} has no tokens"
        if prompt.images and not engine.images:
            raise ModelError(
                f"prompt {prompt.id} has images, which the {engine.name} engine can't read: use text-only data"
            )
        if len(prompt.token_ids) + sampling.max_tokens > max_context:
            raise ModelError(
                f"prompt {prompt.id} has {len(prompt.token_ids)} tokens and its completion may have "
                f"{sampling.max_tokens}, together more than the model's context of {max_context}: lower "
                "data.max_prompt_tokens or max_completion_tokens"
            )
