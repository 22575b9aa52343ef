"""Is the final answer right? The accuracy reward `math`: 1.0 or 0.0, judged by what kind of answer the data says it
has.

Left out on purpose: partial credit, and the reading of free prose (a completion marks its answer). LaTeX is judged by
math-verify, in latex.py, which only workers import.
"""

from reasoner.rewards.answers import final_answer, same_choice, same_number, same_text


def accuracy(completion: str, answer: str, answer_kind: str = "number") -> float:
    """1.0 if the final answer is the gold one, else 0.0; a completion without a final answer gets 0.0.

    The final answer stands after the first `####`, in the last `\\boxed{}` or in the last `<answer>` tag, whichever
    begins last, after `</think>`.
    `answer_kind` is number (one literal number), latex (an equivalent expression), choice (a letter) or text. Raises
    ValueError if the gold is not of that kind, and TimeoutError where math-verify finds no verdict: both are failures,
    not zeros.
    """
    said = final_answer(completion)
    if said is None:
        return 0.0
    if answer_kind == "number":
        return float(same_number(answer, said))
    if answer_kind == "latex":
        from reasoner.rewards.latex import same_latex

        return float(same_latex(answer, said))
    if answer_kind == "choice":
        return float(same_choice(answer, said))
    if answer_kind == "text":
        return float(same_text(answer, said))
    raise ValueError(f"answer_kind={answer_kind!r}: there are number, latex, choice, text")
