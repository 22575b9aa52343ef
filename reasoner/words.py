"""Counts in words."""


def plural(number: int, word: str) -> str:
    """The count with its noun.

    >>> plural(1, "token"), plural(1319, "problem")
    ('1 token', '1,319 problems')
    """
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"
