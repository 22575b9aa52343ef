"""The accuracy reward, and math-verify behind it (PITFALLS E2-E7)."""

import threading

import pytest

from reasoner.rewards.latex import same_latex
from reasoner.rewards.math import accuracy


@pytest.mark.parametrize(
    ("completion", "answer", "kind", "score"),
    [
        ("#### 18", "18", "number", 1.0),
        (r"\boxed{17=18}", "18", "number", 0.0),
        ("<think>so</think>#### 18", "18", "number", 1.0),
        ("<think>#### 18", "18", "number", 0.0),
        ("18", "18", "number", 0.0),
        (r"\boxed{\frac{14}{3}}", r"\frac{14}{3}", "latex", 1.0),
        (r"\boxed{\frac{28}{6}}", r"\frac{14}{3}", "latex", 1.0),
        (r"\boxed{\frac{14}{5}}", r"\frac{14}{3}", "latex", 0.0),
        (r"<think>\boxed{1}</think>\boxed{2}", "1", "latex", 0.0),
        (r"\boxed{\text{(A)}}", "A", "choice", 1.0),
        ("#### Yes", "yes", "text", 1.0),
    ],
)
def test_accuracy_by_kind(completion: str, answer: str, kind: str, score: float):
    assert accuracy(completion, answer, kind) == score


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="number, latex, choice, text"):
        accuracy("#### 1", "1", "integer")


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        ("x=5", "5"),
        ("5", "x=5"),
        ("y = 2x + 3", "2x+3"),
        ("2x+3", "y=3+2x"),
        ("1,-2", "-2,1"),
        (r"(1,2)", "1<x<2"),
        ("1<x<2", "(1,2)"),
        (r"x \in [-2,7]", "[-2,7]"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"90^\circ", "90"),
        (r"11\sqrt2", r"\sqrt{242}"),
        (r"50\%", "50"),  # E7
        ("50", r"50\%"),
        ("50%", "50"),
        (r"\$18.90", "18.90"),
        ("18", "$18$"),
        ("18", "$18"),
        (r"1\frac{4}{5}", "9/5"),
        (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    ],
)
def test_equivalent_latex(gold: str, said: str):
    assert same_latex(gold, said)


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        ("42", "six times seven = 42"),  # E4, one way
        ("six times seven = 42", "42"),  # E4, the other
        ("18", "17=18"),  # E6
        ("5", "x=4=5"),
        ("18", "18,0"),
        ("18", "16 17 18"),
        ("18", "17, 18"),
        ("18", r"\{18, 19\}"),
        ("18", "18$ or $19"),
        ("18", ""),
        ("18", r"\text{the answer is 18}"),
        (r"50\%", "0.5"),
        ("0.5", r"50\%"),
        ("(1,2)", "(2,1)"),
        ("x=5", "y=5"),
        (r"\frac{1}{3}", "0.3333"),
        ("A", "B"),
    ],
)
def test_e4_e6_latex_that_only_looks_right(gold: str, said: str):
    assert not same_latex(gold, said)


@pytest.mark.parametrize(
    "said",
    [
        r"9^{9^9}",
        r"9^{9^{9^9}}",
        r"2^{1000000}",
        "1000000!",
        "(" * 3000 + "1" + ")" * 3000,
        "{" * 30 + "1" + "}" * 30,
        "1" * 5000,
        "x+" * 300 + "x",
        r"10^{-40000}",
    ],
)
def test_e2_what_is_too_large_is_wrong_without_being_computed(said: str, monkeypatch: pytest.MonkeyPatch):
    assert same_latex("18", "18")
    monkeypatch.setattr("reasoner.rewards.latex.parse", lambda *_, **__: pytest.fail("it was parsed"))
    assert not same_latex("18", said)


def test_e2_a_slow_input_within_the_caps_is_a_failure_not_a_zero():
    with pytest.raises(TimeoutError, match="no verdict"):
        same_latex("18", r"\binom{10^7}{5 \cdot 10^6}")


def test_e3_a_gold_that_does_not_parse_is_an_error():
    with pytest.raises(ValueError, match="answer_kind"):
        same_latex("", "18")
    with pytest.raises(ValueError, match="too large"):
        same_latex("9^{9^9}", "18")


def test_e1_math_verify_in_a_thread_is_an_error_not_a_zero():
    caught: list[BaseException] = []

    def run():
        try:
            accuracy(r"\boxed{\frac{1}{77}}", r"\frac{1}{77}", "latex")
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "thread" in str(caught[0])
