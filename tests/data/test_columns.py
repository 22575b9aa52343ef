"""Templates over columns: what they fill in, and what they say when they can't."""

import pytest

from reasoner.data.columns import ColumnTemplate, cell_text
from reasoner.data.values import doubtful
from reasoner.errors import ConfigError, DataError

ROW = {
    "question": "2+2?",
    "options": ["3", "4"],
    "metadata": {"expression": "2 + 2", "terms": [2, 2]},
    "prompt": [{"role": "user", "content": "Hi"}],
    "a [b]": "odd name",
    "n": 4.0,
}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{question}\n{options}", '2+2?\n["3", "4"]'),
        ("\\boxed{{}} {{x}} {question}", "\\boxed{} {x} 2+2?"),
        ("{metadata[expression]}=", "2 + 2="),
        ("{metadata[terms][1]}{n}", "24.0"),
        ("{prompt[0][content]}", "Hi"),
        ("{a [b]}", "odd name"),
        ("no column", "no column"),
        ("", ""),
    ],
)
def test_fill(text: str, filled: str) -> None:
    assert ColumnTemplate(text, "data.prompt").fill(ROW) == filled


def test_values_pass_through_each_and_literals_do_not() -> None:
    template = ColumnTemplate("a {question} a", "data.prompt")
    assert template.fill({"question": "a"}, str.upper) == "a A a"
    assert template.values({"question": "a"}) == ["a"]


@pytest.mark.parametrize("name", ["Question", "metadata[nothing]", "metadata[terms][2]", "question[0]", "options[x]"])
def test_a_missing_column_lists_those_there(name: str) -> None:
    with pytest.raises(DataError) as caught:
        ColumnTemplate(f"{{{name}}}", "data.prompt").fill(ROW)
    assert f"no column '{name}', which data.prompt=" in str(caught.value)
    there = "expression, terms" if name == "metadata[nothing]" else "question, options, metadata, prompt, a [b], n"
    assert str(caught.value).endswith(f"there are: {there}")


@pytest.mark.parametrize("text", ["\\boxed{} {question}", "{question", "question}", "{}"])
def test_lone_braces_are_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.prompt=.*braces that are text are doubled, \{\{ and \}\}"):
        ColumnTemplate(text, "data.prompt")


def test_names_of_used_columns() -> None:
    assert ColumnTemplate("{question} {metadata[expression]} {a [b]}", "k").names(ROW) == {
        "question",
        "metadata",
        "a [b]",
    }


def test_f4_nothing_becomes_the_word_nan() -> None:
    assert [cell_text(cell) for cell in (None, float("nan"), "", 0, False, 0.1, 1e22)] == [
        "",
        "",
        "",
        "0",
        "False",
        "0.1",
        "1e+22",
    ]


@pytest.mark.parametrize(
    ("row", "filled"),
    [
        ({"q": "a", "hint": "b", "by": "c"}, "a\n(b, c)!"),
        ({"q": "a", "hint": "b", "by": " "}, "a!"),
        ({"q": "a", "hint": None, "by": "c"}, "a!"),
        ({"q": "a", "hint": "b"}, "a!"),
    ],
)
def test_an_optional_part_is_left_out_where_a_column_of_it_is_empty(row: dict[str, str | None], filled: str) -> None:
    template = ColumnTemplate("{q}[[\n({hint}, {by})]]!", "data.prompt")
    assert template.fill(row) == filled
    assert template.wording(row, template.values(row)) == ("a b c" if "(" in filled else "a")
    assert [column.name for column in template.columns] == ["q"]
    assert [column.name for column in template.optional] == ["hint", "by"]
    assert template.fill(row, str.upper) == filled.upper()


def test_double_brackets_without_a_column_are_text() -> None:
    assert ColumnTemplate("[[1,2],[3,4]] {q} [[{{x}}]]", "data.prompt").fill({"q": "a"}) == "[[1,2],[3,4]] a [[{x}]]"
    assert ColumnTemplate("[[{m[a]}]]", "data.prompt").fill({"m": {"a": "b"}}) == "b"
    with pytest.raises(ConfigError, match="can't hold another"):
        ColumnTemplate("[[{a} [[{b}]]]]", "data.prompt")


def test_cells_without_a_sure_text_are_refused() -> None:
    with pytest.raises(DataError, match="sheet 'a', cell B2"):
        cell_text(doubtful("3.14", "sheet 'a', cell B2: why"))
    with pytest.raises(DataError, match="holds bytes"):
        cell_text(b"3")


def test_chat_messages_are_no_text() -> None:
    with pytest.raises(DataError, match=r"chat messages, not text: take one of them with \{COLUMN\[0\]\[content\]\}"):
        ColumnTemplate("{prompt}", "data.prompt").fill(ROW)
