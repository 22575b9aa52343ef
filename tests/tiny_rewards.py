"""Rewards for whole runs. A reward worker imports the module that a function is from, and each run starts two, so this
one imports nothing: in a test module they would wait for torch and transformers, 7 s each."""


def close_enough(completion: str, answer: str) -> float:
    """Graded, so that an untrained model's groups differ and GRPO has something to learn."""
    return 1.0 if completion == answer else 0.5 * (completion[:1] == answer[:1]) + 0.01 * len(completion)


def unsure(completion: str) -> float:
    return completion.count("?") / 8


def fails_on_samples(completion: str, num_tokens: int, answer: str) -> float:
    """Sound in the rehearsal, where a completion counts its words; broken on what the model samples."""
    if num_tokens > 2 and len(completion) < 20:
        raise ValueError("no such level")
    return float(completion == answer)


def half(completion: str, answer: str) -> float:
    """Signal in some groups only, whatever a bad model says."""
    return float(len(completion) % 3 == 0) if ord(answer[-1]) % 2 else 0.0
