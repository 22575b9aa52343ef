"""Which text of a completion is its answer, and when two answers are the same (PITFALLS E5-E7, E9, F1)."""

from fractions import Fraction

import pytest

from reasoner.rewards.answers import after_thinking, final_answer, number, same_choice, same_number, same_text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 1,450", "1,450"),  # F1
        ("####4\nand that is it", "4"),
        ("#### 17\n#### 18", "17"),  # E10: a second guess is not taken
        (r"\boxed{19} wait \boxed{18}", "18"),  # E5
        (r"\boxed{19}" + " so" * 40 + r" \boxed{18}", "18"),  # E5
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\boxed{18}}", "18"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"the set {1 \boxed{18}", "18"),
        (r"\boxed {18}", "18"),
        (r"\boxed{17} #### 18", "18"),  # the later of mark and box
        (r"#### 18 or \boxed{17}", "17"),
        (r"\boxed{18", None),  # E7, decided: an unclosed box is no box
        (r"\boxed{17} and \boxed{18", "17"),
        ("the answer is 18", None),
        ("", None),
        (r"<think>\boxed{18}", None),  # E6
        (r"<think>\boxed{17}</think>\boxed{18}", "18"),
        (r"<think>\boxed{18}</think>", None),
        (r"\boxed{18}</think>", None),
        (r"a</think>\boxed{18}<think>\boxed{18}", None),
    ],
)
def test_e5_e6_the_answer_is_the_last_box_or_the_first_mark_after_thinking(text: str, answer: str | None):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "turn", ["\nUser: And 3*6?\nAssistant: ", "\n\n### Question: 3*6?\n", "<|im_end|>\n<|im_start|>user\n3*6?\n"]
)
@pytest.mark.parametrize("first", [r"\boxed{18}", r"\boxed{7}", "#### 18", "#### 7"])
@pytest.mark.parametrize("second", [r"\boxed{18}", r"\boxed{7}", "#### 18", ""])
def test_e6_an_answer_followed_by_an_invented_turn_is_none(first: str, turn: str, second: str):
    assert final_answer(first + turn + second) is None


def test_e6_a_closing_control_token_is_no_turn():
    assert final_answer(r"\boxed{18}<|end_of_solution|>") == "18"
    assert final_answer("Question: how many?\n#### 18") == "18"


def test_thinking_ends_at_its_last_tag():
    assert after_thinking("<think>a</think>b") == "b"
    assert after_thinking("no thinking") == "no thinking"
    assert after_thinking("<think>a") is None
    assert after_thinking("<think>a</think>b<think>c") is None


RIGHT_18 = [
    *(
        "18",
        " 18 ",
        "18.",
        "18.0",
        "18.00",
        "+18",
        "$18",
        r"\$18",
        "18%",
        r"18\%",
        "$18$",
        r"\(18\)",
        "**18**",
        "*18*.",
    ),
    *(
        "18 eggs per day",
        "18 eggs",
        r"18\text{ eggs}",
        r"18 \text{ cm}^2",
        "18 cm²",
        "18km",
        "18 km/h",
        r"18^\circ",
        "18°",
    ),  # E7
    *("\uff11\uff18", r"\text{18}", "1.8e1", "$18.00 per hour.", "18 dollars"),  # E7: full-width digits
]
WRONG_18 = [
    *("17=18", "16 17 18", "18!/17!", "18,0", "18!", "9*2", "36/2", r"\frac{36}{2}", "17 + 1", "x=18"),  # E6
    *(
        "1 8",
        "18 19",
        "18 or 19",
        "18 or seventeen",
        "18 thousand",
        "18k",
        "18 hundred",
        "not 18",
        "18 to 19",
        "18 and a half",
    ),
    *(
        "-18",
        "181",
        "1.8",
        "18.5",
        "18.001",
        "018,000",
        "9:30",
        "",
        "eighteen",
        "+-18",
        "18e999999999",
        "1" * 200,
        "1,8",
    ),
]


@pytest.mark.parametrize("said", RIGHT_18)
def test_e7_dress_around_a_number_is_passed_over(said: str):
    assert same_number("18", said)


@pytest.mark.parametrize("said", WRONG_18)
def test_e6_only_one_literal_number_counts(said: str):
    assert not same_number("18", said)


@pytest.mark.parametrize(
    ("gold", "said", "same"),
    [
        ("1,450", "1450", True),  # F1
        ("1450", "1,450", True),
        ("10,\\!080", "10080", True),
        ("10{,}080", "10,080", True),
        ("-5", "\u22125", True),
        ("-5", "- 5", True),
        ("-5", "-$5", True),
        ("-5", "$-5", True),
        ("-5", "5", False),
        ("1/3", "0.3333", True),  # E7
        ("1/3", "0.333", False),
        ("1/3", r"\frac{2}{6}", True),
        ("0.75", r"\frac34", True),
        ("0.75", "3/4", True),
        ("0.75", "3/0", False),
        (".5", "0.5", True),
        ("50%", "50", True),
        ("50%", "0.5", False),
        ("14500", "14501", False),  # a relative tolerance would take it: whole golds are exact
        ("1000000", "1000001", False),
        ("12345678901234567891", "12345678901234567890", False),  # equal as floats
    ],
)
def test_number_pairs(gold: str, said: str, same: bool):
    assert same_number(gold, said) is same


def test_number_is_exact():
    assert number("0.1") == Fraction(1, 10)
    assert number("1e3") == 1000
    assert number("1/3") is None
    assert number("1/3", fractions=True) == Fraction(1, 3)


@pytest.mark.parametrize("gold", ["", "Yes", "x=5", r"\sqrt{2}", "16 17"])
def test_a_gold_that_is_no_number_is_an_error_not_a_zero(gold: str):
    with pytest.raises(ValueError, match="answer_kind"):
        same_number(gold, "18")


@pytest.mark.parametrize(
    "said", ["A", "a", "(A)", "A.", "A)", "[A]", r"\text{A}", r"\text{(A)}", "**A**", "**(A)**", "\uff21"]
)
def test_e7_a_choice_is_one_letter(said: str):
    assert same_choice("A", said)
    assert same_choice("(A)", said)
    assert not same_choice("B", said)


@pytest.mark.parametrize("said", ["AB", "A or B", "A, B", "", "A) 12 cm", "1"])
def test_e7_more_than_a_letter_is_no_choice(said: str):
    assert not same_choice("A", said)


@pytest.mark.parametrize(
    ("gold", "said", "same"),
    [
        ("Yes", "yes.", True),
        ("Yes", "No", False),
        ("9:30", "9:30", True),  # E7: not 3/10
        ("9:30", "0.3", False),
        ("New  York", r"\text{new york}", True),
        ("Yes", "Yes and no", False),
        ("Yes", "", False),
        ("abc", "“abc”", True),
    ],
)
def test_e7_text_pairs(gold: str, said: str, same: bool):
    assert same_text(gold, said) is same


def test_golds_of_the_wrong_kind_name_the_key():
    with pytest.raises(ValueError, match="answer_kind"):
        same_choice("17", "A")
    with pytest.raises(ValueError, match="empty"):
        same_text(" . ", "")
