"""Rewards for the shape of a completion. Left out: credit a tag, which is farmed by repeating tags."""


def think_format(completion: str) -> float:
    """1.0 if the completion is exactly one think block and then an answer, neither of them empty; else 0.0.

    `completion` begins with what the template wrote of it, so a template that opens `<think>` itself is allowed for.
    Weigh it below the accuracy part, so that no well-formed wrong answer beats a right one. As in DeepSeek-R1,
    arXiv:2501.12948 section 2.2.2.
    """
    text = completion.strip()
    if text.count("<think>") != 1 or text.count("</think>") != 1 or not text.startswith("<think>"):
        return 0.0
    reasoning, _, answer = text.removeprefix("<think>").partition("</think>")
    return float(bool(reasoning.strip()) and bool(answer.strip()))
