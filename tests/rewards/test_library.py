"""The built-in rewards beside math, exact and think_format: gold, wrong and adversarial cases of each."""

import pytest

from reasoner.config import RewardPart
from reasoner.rewards.answers import final_answer
from reasoner.rewards.choice import choice
from reasoner.rewards.exact import numeric
from reasoner.rewards.format import answer_format, regex, tag_count, think_format
from reasoner.rewards.language import language, repetition
from reasoner.rewards.length import cosine_length, length
from reasoner.rewards.schema import json_schema
from reasoner.rewards.sources import BUILTINS

CHOSEN = [
    r"\boxed{B}",
    r"\boxed{\text{(B)}}",
    "#### b",
    "<answer>B</answer>",
    "B",
    "(B)",
    "b.",
    "B) Paris",
    "B. Paris is it",
]
CHOSEN += ["So the answer is B.", "The answer is (B).", "Answer: **B**", "answer is option B", "<think>A or C</think>B"]
CHOSEN += ["the answer is B. Yes, the answer is (b)", r"the answer is A, no: \boxed{B}", r"\boxed{A} no, \boxed{B}"]
NOT_CHOSEN = [
    "",
    "A",
    r"\boxed{A}",
    r"\boxed{A or B}",
    r"\boxed{AB}",
    "A B C D",
    "A, B",
    "A) B",
    "The answer is A or B",
]
NOT_CHOSEN += ["the answer is B or A", "The answer is B, A", "the answer is A. The answer is B.", "The answer is Bob"]
NOT_CHOSEN += [
    "the answer is a bit of B",
    "<think>the answer is B",
    r"<think>\boxed{B}</think>",
    "answer is (A) or (B)",
]
NOT_CHOSEN += ["I think B", "the answer is b and c", r"\boxed{B}" + "\nUser: next?", "The answer is B/C"]


@pytest.mark.parametrize("text", CHOSEN)
def test_choice_takes_one_letter(text):
    assert choice(text, "B") == choice(text, "(b)") == 1.0


@pytest.mark.parametrize("text", NOT_CHOSEN)
def test_choice_takes_nothing_else(text):
    assert choice(text, "B") == 0.0


def test_choice_refuses_a_gold_of_two_letters_and_a_number():
    for gold in ("AB", "", "4"):
        with pytest.raises(ValueError, match="no single letter"):
            choice("B", gold)
    assert choice("the answer is a number", "A") == 0.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<answer>18</answer>", "18"),
        ("<think>17</think>\n<answer> 18 </answer>", "18"),
        ("<answer>17</answer> no <answer>18</answer>", "18"),
        (r"<answer>so \boxed{18}</answer>", "18"),
        ("#### 17\n<answer>18</answer>", "18"),
        (r"<answer>17</answer> \boxed{18}", "18"),
        ("<answer>18", None),
        ("18</answer>", None),
        ("<think><answer>18</answer>", None),
        ("<answer>18</answer>\nUser: and 2+2?\n<answer>4</answer>", None),
        ("</answer><answer>18</answer>", "18"),
    ],
)
def test_an_answer_tag_marks_the_answer_too(text, said):
    assert final_answer(text) == said


def test_numeric_with_a_relative_tolerance():
    assert [numeric(text, "200", 0.0, 0.01) for text in ("198", "202", "197.9", "-200")] == [1.0, 1.0, 0.0, 0.0]
    assert numeric("0.1", "0", 0.0, 0.5) == 0.0
    assert numeric("199", "200", 2, 0.001) == 1.0
    with pytest.raises(ValueError, match="relative=-1"):
        numeric("1", "1", 0.0, -1)


SHAPED = "<think>a</think><answer>4</answer>"
SHAPES = [
    # text, strict, soft, share of the four tags
    (SHAPED, 1.0, 1.0, 1.0),
    ("\n<think>\na\n</think>\n\n<answer>\n4\n</answer>\n", 1.0, 1.0, 1.0),
    (f"Well. {SHAPED}", 0.0, 1.0, 1.0),
    (f"{SHAPED} So it is.", 0.0, 1.0, 1.0),
    ("<think>a</think>so<answer>4</answer>", 0.0, 1.0, 1.0),
    ("<think></think><answer>4</answer>", 0.0, 0.0, 0.75),
    ("<think>a</think><answer> </answer>", 0.0, 0.0, 0.75),
    ("<think>a</think>4", 0.0, 0.0, 0.5),
    ("<think>a<answer>4</answer></think>", 0.0, 0.0, 0.5),
    ("<answer>4</answer><think>a</think>", 0.0, 0.0, 0.5),
    ("<think>a", 0.0, 0.0, 0.25),
    ("a</think><answer>4</answer>", 0.0, 0.0, 0.5),
    (SHAPED * 2, 0.0, 0.0, 0.0),
    ("<think></think>" * 50, 0.0, 0.0, 0.0),
    ("<think>" * 50 + "a</think><answer>4</answer>", 0.0, 0.0, 0.5),
    ("<think><think>a</think></think><answer>4</answer>", 0.0, 0.0, 0.5),
    ("4", 0.0, 0.0, 0.0),
    ("", 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("text", "strict", "soft", "tags"), SHAPES)
def test_think_and_answer_blocks(text, strict, soft, tags):
    assert (answer_format(text), answer_format(text, strict=False), tag_count(text)) == (strict, soft, tags)


def test_what_the_template_wrote_is_allowed_for(load, make_prompt, make_completion):
    """A template that opens the block, and one that writes an empty one to switch thinking off (PITFALLS A5)."""
    parts = {"think": "think_format", "both": "answer_format", "tags": "tag_count"}
    rewards = load(parts, workers=1)
    opened, empty = make_prompt("4", prefill="<think>\n"), make_prompt("4", prefill="<think>\n\n</think>\n\n")
    texts = ["a</think><answer>4</answer>", "<answer>4</answer>"]
    found = rewards.score([opened, empty, make_prompt("4")], [make_completion(t) for t in (*texts, texts[1])])
    assert [score.parts for score in found] == [
        {"think": 1.0, "both": 1.0, "tags": 1.0},
        {"think": 1.0, "both": 1.0, "tags": 1.0},
        {"think": 0.0, "both": 0.0, "tags": 0.5},
    ]
    assert think_format("<think></think>4") == 0.0


def test_tag_count_takes_tags_of_ones_own():
    assert tag_count("<plan>a</plan>", tags=["plan"]) == 1.0
    for tags in ([], ["<plan>"]):
        with pytest.raises(ValueError, match="give names"):
            tag_count("x", tags=tags)


def test_regex():
    assert [regex(text, r"\d{4}-\d\d", whole=True) for text in ("2024-05", " 2024-05\n", "on 2024-05")] == [1, 1, 0]
    assert regex("<think>2024-05</think>none", r"\d{4}") == 0.0
    assert regex("<think>2024-05</think>none", r"\d{4}", thinking=True) == 1.0
    assert regex("<think>2024-05", r"\d{4}") == 0.0
    assert regex("a\nb", "a.b", whole=True) == 1.0
    with pytest.raises(ValueError, match="no regular expression"):
        regex("x", "(")


def test_a_slow_pattern_costs_its_own_limit(load, make_prompt, make_completion):
    slow = RewardPart(fn="regex", timeout_s=0.5, options={"pattern": "(a+)+$", "whole": True})
    rewards = load({"p": slow}, workers=1)
    found = rewards.score([make_prompt("")] * 2, [make_completion("a" * 40 + "b"), make_completion("aa")])
    assert [score.parts for score in found] == [{}, {"p": 1.0}]
    assert found[0].failures == {"p": "timed out after 0.5 s"}


def test_cosine_length_by_hand():
    def score(text, n):
        return cosine_length(text, "4", n, 100)

    assert [score("#### 4", n) for n in (0, 50, 100, 900)] == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert [score("#### 5", n) for n in (0, 50, 100, 900)] == pytest.approx([-1.0, -0.75, -0.5, -0.5])
    assert cosine_length(r"\boxed{\frac{28}{6}}", r"\frac{14}{3}", 0, 100, "latex") == 1.0
    with pytest.raises(ValueError, match="every right one must earn more"):
        cosine_length("", "4", 1, 100, wrong_long=0.5)
    with pytest.raises(ValueError, match="max_tokens=0"):
        cosine_length("", "4", 1, 0)


def test_length_takes_a_share_as_its_buffer():
    assert [length(n, 100, 0.2) for n in (80, 90, 100)] == pytest.approx([0, -0.5, -1])


ENGLISH = "We have 12 eggs, so the number of eggs that are left is 12 - 3 = 9, which is what it was."
GERMAN = "Wir haben 12 Eier, und die Zahl der Eier ist also 12 - 3 = 9, das ist nicht mehr als mit den anderen."
FRENCH = "Nous avons 12 oeufs, donc il est dans les 9 que nous avons pour le reste, et ce sont des oeufs."
TEXTS = {
    "en": ENGLISH,
    "de": GERMAN,
    "fr": FRENCH,
    "ru": "Ответ девять яиц.",
    "zh": "答案是九个鸡蛋",
    "ja": "こたえは九です",
}
TEXTS |= {"ko": "답은 아홉입니다", "el": "απάντηση είναι εννέα", "ar": "الجواب تسعة", "th": "คำตอบคือเก้า"}
TEXTS |= {"es": "Entonces las 12 y los huevos que hay son 9 para cada una, no es más.", "hi": "उत्तर नौ है"}


@pytest.mark.parametrize("wanted", TEXTS)
def test_language_knows_its_own_and_no_other(wanted):
    found = {code: language(text, wanted) for code, text in TEXTS.items()}
    assert found[wanted] > 0.85
    shared = {"zh", "ja", "ko"}  # Chinese characters are written in all three
    others = [score for code, score in found.items() if code != wanted and not {code, wanted} <= shared]
    assert max(others) <= 0.1


def test_language_of_a_mixture_of_formulas_and_of_nothing():
    assert language("x = 4", "en") == language(r"\frac{x}{2} = 4", "en") == 1.0
    assert language("12 - 3 = 9", "en") is None
    assert language("", "en") is None
    assert 0.5 < language(ENGLISH + " 答案是九个鸡蛋", "en") < 1.0
    with pytest.raises(ValueError, match="there are en, de, fr"):
        language("x", "tlh")


def test_repetition_by_hand():
    assert repetition("a b c d", 4) == 0.0
    assert repetition("a b a b a", 2) == pytest.approx(2 / 4 - 1)
    assert repetition("A b a B", 2) == pytest.approx(2 / 3 - 1)
    assert repetition("", 4) == repetition("a b c", 4) == 0.0
    assert repetition("答案答案答案", 2) == pytest.approx(2 / 5 - 1)
    assert repetition("wait, no. " * 200, 4) < -0.97
    assert repetition(ENGLISH, 4) == 0.0
    with pytest.raises(ValueError, match="n=0"):
        repetition("a", 0)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "pattern": "^[a-z]+$"},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 1]}, "uniqueItems": True, "maxItems": 2},
        "pet": {"anyOf": [{"type": "null"}, {"const": "cat"}]},
    },
    "required": ["name"],
    "additionalProperties": False,
}
JSON = [
    ('{"name": "ann"}', 1.0),
    ('{"name": "ann", "age": 3.0, "tags": ["a", 1], "pet": null}', 1.0),
    ('<think>{}</think>\n```json\n{"name": "ann", "pet": "cat"}\n```', 1.0),
    ('```\n{"name": "ann"}\n```', 1.0),
    ("", 0.0),
    ("{}", 0.0),
    ("[]", 0.0),
    ('"name"', 0.0),
    ('{"name": ""}', 0.0),
    ('{"name": "Ann"}', 0.0),
    ('{"name": 3}', 0.0),
    ('{"name": "ann", "age": true}', 0.0),
    ('{"name": "ann", "age": 3.5}', 0.0),
    ('{"name": "ann", "age": -1}', 0.0),
    ('{"name": "ann", "age": 150}', 0.0),
    ('{"name": "ann", "age": 1e999}', 0.0),
    ('{"name": "ann", "age": NaN}', 0.0),
    ('{"name": "ann", "tags": ["a", "a"]}', 0.0),
    ('{"name": "ann", "tags": [true]}', 0.0),
    ('{"name": "ann", "tags": ["a", "b", 1]}', 0.0),
    ('{"name": "ann", "pet": "dog"}', 0.0),
    ('{"name": "ann", "more": 1}', 0.0),
    ('{"name": "ann", "name": "bob"}', 0.0),
    ('{"name": "ann"} and so', 0.0),
    ('Here: {"name": "ann"}', 0.0),
    ('{"name": "ann"}{"name": "ann"}', 0.0),
    ("{'name': 'ann'}", 0.0),
    ('<think>{"name": "ann"}', 0.0),
    ("[" * 100_000, 0.0),
    ("9" * 10_000, 0.0),
]


@pytest.mark.parametrize(("text", "score"), JSON)
def test_json_schema(text, score):
    assert json_schema(text, SCHEMA) == score


def test_json_schema_knows_the_rest_of_its_keywords_and_refuses_others():
    assert json_schema("3", {"oneOf": [{"type": "integer"}, {"minimum": 5}]}) == 1.0
    assert json_schema("7", {"oneOf": [{"type": "integer"}, {"minimum": 5}]}) == 0.0
    assert json_schema("3", {"allOf": [{"type": ["integer", "null"]}, {"not": {"const": 4}}]}) == 1.0
    assert json_schema("[1]", {"minItems": 2}) == json_schema('"abc"', {"maxLength": 2}) == 0.0
    assert json_schema('{"a": 1}', {"additionalProperties": {"type": "string"}}) == 0.0
    assert json_schema("3", {"exclusiveMinimum": 3}) == json_schema("3", {"maximum": 2}) == 0.0
    for schema, reason in (
        ({"properties": {"a": {"$ref": "#/x"}}}, "'\\$ref' isn't checked"),
        ({"type": "int"}, "no type 'int'"),
        ({"items": 3}, "no JSON schema"),
    ):
        with pytest.raises(ValueError, match=reason):
            json_schema("{}", schema)


def test_every_built_in_is_there(load):
    options = {
        "regex": {"pattern": "a"},
        "json_schema": {"schema": True},
        "length": {"max_tokens": 9, "buffer_tokens": 3},
        "cosine_length": {"max_tokens": 9},
    }
    parts = {name: RewardPart(fn=name, options=options.get(name, {})) for name in BUILTINS}
    assert load(parts, columns={"task", "metadata"}).part_names == tuple(BUILTINS)
