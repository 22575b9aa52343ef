"""Duplicates, the held-out split and overlap: F5, F7, F8."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from reasoner.config import Data
from reasoner.data.problems import Problems, make_problems
from reasoner.data.rows import read_rows
from reasoner.data.split import (
    COMMON,
    drop_duplicates,
    exact_key,
    take_heldout,
    without_heldout,
    without_overlap,
    without_shared_ngrams,
)
from reasoner.data.wordings import Wordings, with_signs, words, words_and_numbers
from reasoner.errors import ConfigError, DataError


def problems_of(*wordings: str, completions: tuple[str, ...] = ()) -> Problems:
    worked = completions or ("-",) * len(wordings)
    rows = [{"q": q, "a": "1", "c": c} for q, c in zip(wordings, worked, strict=True)]
    data = Data(prompt="{q}", answer="{a}", completion="{c}")
    return make_problems(read_rows(Data(), rows), data, str, worked=bool(completions), masked=True)[0]


def of_file(path: Path, **settings: Any) -> Problems:
    data = Data(path=str(path), **settings)
    return make_problems(read_rows(data), data, str, worked=False, masked=True)[0]


def of_texts(problems: Problems) -> list[str]:
    return [problem.wording for problem in problems]


@pytest.mark.parametrize(
    ("key", "one", "other", "same"),
    [
        (words_and_numbers, "Find $x_1 = 2$.", "find  x_{1}=2", True),
        (words_and_numbers, "Find x = 2", "Find x = 3", False),
        (words_and_numbers, "中文 \uff12", "中文 2", True),
        (words_and_numbers, "中文", "日本", False),
        (with_signs, "2 + 2 =", "2+2=", True),
        (with_signs, "2 + 2", "2 - 2", False),
        (with_signs, "a _ b", "a b", False),
        (with_signs, 'Sam said: "Go!"', "Sam said Go", True),
        (words, "Tom has 3 apples.", "Tom has 1,450 apples", True),
        (words, "Tom has 3 apples.", "Tim has 3 apples.", False),
        (words, "2 + 2", "2 + 3", False),  # without words there is nothing to mask by
    ],
)
def test_what_counts_as_the_same(key: Callable[[str], str], one: str, other: str, same: bool) -> None:
    assert (key(one) == key(other)) is same


def test_signs_count_where_they_tell_problems_apart() -> None:
    sums = [f"State the answer: {a} {sign} {b} =" for a in range(9) for b in range(9) for sign in "+-"]
    assert exact_key([problems_of(*sums)]) == "with_signs"
    mazes = ["".join(random.Random(i).choices("+#", k=50)) for i in range(20)]
    assert exact_key([problems_of(*mazes)]) == "with_signs"
    written = [f"Tom has {i} apples" for i in range(200)] + ["x > 0", "x < 0"]
    assert exact_key([problems_of(*written)]) == "words_and_numbers"
    assert exact_key([problems_of(*sums[::2]), problems_of(*sums[1::2])]) == "with_signs"  # over both sides


def test_duplicates_go_and_the_first_stays() -> None:
    kept, dropped = drop_duplicates(problems_of("What is x?", "Other", "what  is X", "Other."))
    assert ([problem.number for problem in kept], dropped) == ([1, 2], 2)


def test_for_sft_one_question_may_have_several_worked_answers() -> None:
    kept, dropped = drop_duplicates(problems_of("a", "a", "a", completions=("1+1=2", "2", "1 + 1 = 2")))
    assert ([problem.number for problem in kept], dropped) == ([1, 2], 1)


def test_f5_math_has_8_duplicates_and_one_problem_of_math500(shared: Path) -> None:
    train = of_file(shared / "math/train.jsonl", prompt="{problem}", answer="{solution}", answer_pattern="boxed")
    test = of_file(shared / "math/math500.jsonl", prompt="{problem}", answer_kind="latex")
    assert len(train) == 7498  # two have an empty box
    assert drop_duplicates(train)[1] == 8
    kept, removed = without_overlap(train, [test], exact_key([train, test]))
    assert removed == 1
    (gone,) = {problem.wording for problem in train} - {problem.wording for problem in kept}
    assert "roots of $z^4 - z^2 + 1 = 0$" in gone
    # F8: words alone remove far more, which is what `masked` is for in written word problems only
    assert without_overlap(test, [train], "words")[1] == 46


def test_shared_runs_of_words_tell_a_quoted_row_and_boilerplate_does_not() -> None:
    story = "On Monday Ann buys 3 boxes of 12 pens each and gives 4 of them to Bob"  # 16 words
    train = problems_of(
        f"{story}. How many has she now?",
        f"Note: {story.lower()}!",
        "on Monday Ann buys 3 boxes of 12 pens each and gives 5 of them to Bob",  # 12 words in a row are shared
        "Monday Ann buys 3 boxes of 12 pens each and gives 5 of them",
        "short text",
    )
    kept, removed = without_shared_ngrams(train, problems_of(f"{story}. What is left?", "Short, text"))
    assert ([problem.number for problem in kept], removed) == ([3, 4], 3)
    everywhere = [f"{story} {i}" for i in range(COMMON + 1)]
    assert without_shared_ngrams(train, problems_of(*everywhere))[1] == 0, "what every row begins with tells nothing"
    assert without_shared_ngrams(train, problems_of(*everywhere[1:]))[1] == 2


def test_f5_gsm8k_shares_nothing_but_four_near_copies(shared: Path) -> None:
    train, test = (of_file(shared / f"gsm8k/{name}.jsonl", answer_pattern=r"####\s*(.+)") for name in ("train", "test"))
    assert drop_duplicates(train)[1] == 0
    assert without_overlap(train, [test], exact_key([train, test]))[1] == 0
    kept, removed = without_shared_ngrams(train, test)
    gone = [problem.wording for problem in train if problem.number not in set(kept.numbers.tolist())]
    assert removed == 4 and any(text.startswith("A train travels 270 miles in 3 hours.") for text in gone)


def test_masked_overlap_of_the_word_problems(shared: Path) -> None:
    """The counts of ../shared/rivals/README.md: what is really held out from GSM8K and MAWPS + ASDiv training."""
    folder, maps = shared / "word_problems", "reasoner.data.word_problems"
    train = [of_file(shared / "gsm8k/train.jsonl", answer_pattern=r"####\s*(.+)")]
    train.append(of_file(folder / "mawps_asdiv-a_train.csv", map=f"{maps}:fill_numbers"))

    def left(path: Path, **settings: Any) -> Problems:
        return without_overlap(of_file(path, **settings), train, "words")[0]

    assert len(left(shared / "gsm8k/test.jsonl", answer_pattern=r"####\s*(.+)")) == 1319
    assert len(left(folder / "svamp_test.jsonl", map=f"{maps}:svamp")) == 999
    assert len(left(folder / "mawps_test.jsonl", map=f"{maps}:mawps")) == 230
    asdiv = left(folder / "asdiv_test.jsonl", prompt="{body} {question}", answer_kind="text")
    assert len([problem for problem in asdiv if any(map(str.isdigit, problem.answer))]) == 1296
    # Of those, 75 are times, dates and ratios, of which a number alone is no right answer.
    assert len(left(folder / "asdiv_test.jsonl", map=f"{maps}:asdiv")) == 1221


@pytest.mark.parametrize(("heldout", "count"), [(3, 3), (0.25, 5), (0.01, 1), (19, 19), (1.0, 1)])
def test_heldout_rows_or_share(heldout: float, count: int) -> None:
    problems = problems_of(*(f"q{i}" for i in range(20)))
    held = take_heldout(problems, heldout, seed=0)
    assert len({problem.number for problem in held}) == len(held) == count
    kept, gone = without_heldout(problems, held, same_source=True)
    assert (len(kept), gone) == (20 - count, count)
    assert not {problem.number for problem in kept} & {problem.number for problem in held}


def test_heldout_is_drawn_by_the_seed() -> None:
    problems = problems_of(*(f"q{i}" for i in range(50)))
    drawn = [list(take_heldout(problems, 10, seed=seed).numbers) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != list(range(1, 11))


@pytest.mark.parametrize(
    ("heldout", "error"), [(0, ConfigError), (2.5, ConfigError), (4, DataError), (20, DataError), (0.99, DataError)]
)
def test_heldout_that_can_not_be(heldout: float, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"data\.heldout={heldout:g}"):
        take_heldout(problems_of("a", "b", "c", "d", "a."), heldout, seed=0)


def test_f7_a_heldout_problem_leaves_training_with_all_its_copies() -> None:
    wordings = [f"q{i % 10}" for i in range(100)]
    problems = problems_of(*wordings, completions=tuple(f"answer {i}" for i in range(100)))
    held = take_heldout(problems_of(*wordings), 4, seed=0)
    assert len(set(of_texts(held))) == 4
    kept, gone = without_heldout(problems, held, same_source=True)
    assert gone == 40 and not set(of_texts(kept)) & set(of_texts(held))
    other, removed = without_heldout(problems, held, same_source=False)
    assert (list(other.numbers), removed) == (list(kept.numbers), gone)


def test_heldout_rows_leave_their_source_though_another_prompt_reads_other_columns() -> None:
    held = problems_of("a", "b")[:1]
    others = problems_of("same row, other words", "second row")
    assert [problem.number for problem in without_heldout(others, held, same_source=True)[0]] == [2]
    assert without_heldout(others, held, same_source=False)[1] == 0


def generated(seed: int, size: int = 400, task: str = "chain_sum") -> Problems:
    options = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1} if task == "chain_sum" else {}
    data = Data(name=f"reasoning_gym/{task}", size=size, seed=seed, options=options)
    return make_problems(read_rows(data), data, str, worked=False, masked=True)[0]


@pytest.mark.parametrize("task", ["chain_sum", "basic_arithmetic", "leg_counting"])
def test_f7_neighbouring_seeds_share_no_row_through_our_loader(task: str) -> None:
    first, second = generated(1, task=task), generated(2, task=task)
    assert [problem.wording for problem in first[1:]] == [problem.wording for problem in second[:-1]]  # the trap
    kept, removed = without_overlap(first, [second], exact_key([first, second]))
    assert removed >= 399
    assert not set(of_texts(kept)) & set(of_texts(second))


def test_f7_one_set_deduplicated_then_split_shares_nothing() -> None:
    problems = generated(1, size=1500)
    held = take_heldout(problems, 200, seed=0)
    kept, _ = drop_duplicates(without_heldout(problems, held, same_source=True)[0])
    texts = of_texts(kept) + of_texts(held)
    assert len(set(texts)) == len(texts) == len(set(of_texts(problems)))  # every different problem is on one side


def test_f8_masking_numbers_leaves_nothing_of_generated_sums() -> None:
    problems = generated(1)
    assert not len(without_overlap(problems[200:], [problems[:200]], "words")[0])
    assert len(without_overlap(problems[200:], [problems[:200]], exact_key([problems]))[0]) > 100


def test_maze_rows_are_not_all_one() -> None:
    made = reasoning_gym.create_dataset("maze", size=60, seed=0)
    problems = problems_of(*(made[i]["question"] for i in range(60)))
    assert drop_duplicates(problems)[1] == 0


ODD = [
    "2 + 2 =",
    "a _ b.c",
    "x\x1fy\x00z",
    "Tom has 1,450 apples!",
    "Stra\u00dfe \uff12",
    "\u00b2 STRASSE 2",
    "{`~",
    "",
    "-",
]


@pytest.mark.parametrize("make", [words_and_numbers, with_signs, words])
def test_hashes_are_equal_where_the_forms_are(make: Callable[[str], str]) -> None:
    """The short way of ASCII texts gives the same as the regular expressions."""
    texts = [*ODD, *(text.upper() for text in ODD), *(f"{chr(code)} a{chr(code)}B" for code in range(256))]
    wordings = Wordings(words=True)
    for text in texts:
        wordings.add(text)
    hashes, forms = list(wordings.hashes(make.__name__)), [make(text) for text in texts]
    assert [hashes.index(one) for one in hashes] == [forms.index(one) for one in forms]
