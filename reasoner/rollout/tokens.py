"""A completion cut into its tokens' texts, each with the logprob under which it was sampled."""

from collections.abc import Callable, Iterable

from reasoner.types import Completion

Decode = Callable[[Iterable[int]], str]

MAX_JOINED = 8  # tokens that may make one character together: no byte fallback needs more


def token_logprobs(completion: Completion, decode: Decode) -> list[tuple[str, float]] | None:
    """(text, logprob in nats) of each token; the texts joined are the completion's own.

    >>> token_logprobs(completion, decode)  # of "4" and a stop id
    [('4', -0.2)]

    Tokens that make a character only together are one piece with the sum of their logprobs; the stop id has no text
    and is left out. None where the tokens' own texts don't add up to the completion's.
    """
    pieces: list[tuple[str, float]] = []
    at, start, ids = 0, 0, completion.token_ids
    while start < len(ids) and at < len(completion.text):
        for end in range(start + 1, min(start + MAX_JOINED, len(ids)) + 1):
            text = decode(ids[start:end])
            # A decoder may leave out the space that a piece begins with, where it is the first.
            found = next((form for form in (text, " " + text) if form and completion.text.startswith(form, at)), None)
            if found is not None:
                break
        else:
            return None
        pieces.append((found, round(sum(completion.sampling_logprobs[start:end]), 3)))
        at, start = at + len(found), end
    return pieces if at == len(completion.text) else None
