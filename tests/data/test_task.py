"""The data of a whole run: what each stage gets, what is kept apart, counted and refused. A12, B4, F5, F6, F7."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasoner.config import Config
from reasoner.data.task import Task, load_task
from reasoner.errors import ConfigError, DataError, ModelError

Conf = Callable[..., Config]


def rows_of(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(start, start + count)]


def written(folder: Path, name: str, rows: list[dict[str, str]]) -> str:
    path = folder / name
    path.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in rows))
    return str(path)


def questions(prompts: Any) -> set[str]:
    return {prompt.columns["question"] for prompt in prompts}


def sides(task: Task) -> tuple[set[str], set[str], set[str]]:
    held = [prompt for prompts in task.sets.values() for prompt in prompts]
    return questions(example.prompt for example in task.examples), questions(task.prompts), questions(held)


def test_heldout_by_default_from_data_itself(conf: Conf, tokenizer: Any) -> None:
    task = load_task(conf({}), tokenizer, rows_of(50))
    sft, grpo, held = sides(task)
    assert list(task.sets) == ["heldout"] and len(held) == 5
    assert sft == grpo and not sft & held and len(sft | held) == 50
    assert task.report == {
        "sft": {"rows": 50, "kept": 45, "heldout": 5, **dict.fromkeys(others("heldout"), 0)},
        "grpo": {"rows": 50, "kept": 45, "heldout": 5, **dict.fromkeys(others("heldout"), 0)},
        "heldout": {"rows": 50, "kept": 5, "overlap_removed_from_training": 0, **dict.fromkeys(others(), 0)},
    }
    assert task.overlap_removed == {"heldout": 0}


def others(*but: str) -> list[str]:
    names = ["dropped_by_map", "several_turns", "empty", "heldout", "duplicates", "overlap_removed", "long_prompts"]
    names.append("long_completions")
    return [name for name in names if name not in but]


@pytest.mark.parametrize(
    ("stages", "trained", "measured"),
    [
        (("sft",), {"sft"}, False),
        (("grpo",), {"grpo"}, False),
        (("evaluate",), set(), True),
        (("evaluate", "grpo", "evaluate"), {"grpo"}, True),
        (("sft", "export"), {"sft"}, True),
    ],
)
def test_only_what_the_stages_need_and_always_the_same_split(
    conf: Conf, tokenizer: Any, stages: tuple[str, ...], trained: set[str], measured: bool
) -> None:
    whole = load_task(conf({}), tokenizer, rows_of(50))
    task = load_task(conf({}, stages), tokenizer, rows_of(50))
    assert task.examples == (whole.examples if "sft" in trained else ())
    assert task.prompts == (whole.prompts if "grpo" in trained else ())
    assert task.sets == (whole.sets if measured else {})
    assert set(task.report) == trained | ({"heldout"} if measured else set())


def test_prompt_ids_are_stable_names(conf: Conf, tokenizer: Any) -> None:
    task = load_task(conf({"heldout": 2}), tokenizer, rows_of(6))
    prompts = [*task.prompts, *task.sets["heldout"], *(example.prompt for example in task.examples)]
    for prompt in prompts:
        section, _, number = prompt.id.partition(":")
        assert section in ("sft", "grpo", "heldout")
        assert prompt.columns["question"] == f"What is {int(number) - 1} + {int(number) - 1}?"
    assert load_task(conf({"heldout": 2}), tokenizer, rows_of(6)).prompts == task.prompts


def test_named_sets_leave_data_whole_and_cost_training_what_they_share(
    conf: Conf, tokenizer: Any, tmp_path: Path
) -> None:
    train = written(tmp_path, "train.csv", rows_of(20))
    test = written(tmp_path, "test.csv", rows_of(10, start=15))
    task = load_task(conf({"path": train}, evaluate={"sets": {"own": {"path": test}}}), tokenizer)
    sft, grpo, held = sides(task)
    assert len(held) == 10 and sft == grpo == {row["question"] for row in rows_of(15)}
    assert task.report["sft"]["overlap_removed"] == task.report["grpo"]["overlap_removed"] == 5
    assert task.report["sft"]["heldout"] == 0
    assert task.overlap_removed == {"own": 10}  # five rows from each of two stages
    assert task.lines()[:3] == [
        "sft: 15 examples of 20 rows (5 removed for overlap)",
        "grpo: 15 prompts of 20 rows (5 removed for overlap)",
        "own: 10 problems of 10 rows",
    ]


def test_a_shared_run_of_words_costs_training(conf: Conf, tokenizer: Any, tmp_path: Path) -> None:
    story = "On Monday Ann buys 3 boxes of 12 pens each and gives 4 of them to Bob."
    train = written(tmp_path, "train.csv", [*rows_of(20), {"question": f"{story} How many?", "answer": "32"}])
    test = written(tmp_path, "test.csv", [{"question": f"{story} What is left?", "answer": "32"}])
    sets = {"own": {"path": test, "overlap": "ngrams"}}
    task = load_task(conf({"path": train}, ("grpo", "evaluate"), evaluate={"sets": sets}), tokenizer)
    assert len(task.prompts) == 20 and task.report["grpo"]["overlap_removed"] == 1
    assert task.overlap_removed == {"own": 1} and len(task.sets["own"]) == 1


def test_masked_overlap_costs_the_set_and_off_costs_nothing(conf: Conf, tokenizer: Any, tmp_path: Path) -> None:
    train = written(tmp_path, "train.csv", rows_of(20))
    held = [*rows_of(3, start=90), {"question": "Who won?", "answer": "1"}]
    test = written(tmp_path, "test.csv", held)
    sets = {"masked": {"path": test, "overlap": "masked"}, "off": {"path": test, "overlap": "off"}}
    task = load_task(conf({"path": train}, ("grpo", "evaluate"), evaluate={"sets": sets}), tokenizer)
    assert questions(task.sets["masked"]) == {"Who won?"} and len(task.sets["off"]) == 4
    assert task.overlap_removed == {"masked": 3, "off": 0}
    assert len(task.prompts) == 20


def test_overlap_is_seen_though_the_prompts_are_worded_otherwise(conf: Conf, tokenizer: Any, tmp_path: Path) -> None:
    path = written(tmp_path, "other.csv", rows_of(8))
    grpo = {"data": {"path": path, "prompt": "Think step by step.\n{question}"}}
    task = load_task(conf({"heldout": 3}, ("grpo", "evaluate"), grpo=grpo), tokenizer, rows_of(8))
    assert not sides(task)[1] & sides(task)[2]
    assert task.report["grpo"]["heldout"] == 3


def test_heldout_rows_stay_out_of_every_section_that_reads_them(conf: Conf, tokenizer: Any, tmp_path: Path) -> None:
    path = written(tmp_path, "train.csv", rows_of(20))
    sections = {"sft": {"data": {"limit": 12}}, "grpo": {"data": {"prompt": "{answer}", "overlap": "off"}}}
    task = load_task(conf({"path": path, "overlap": "off", "heldout": 6}, **sections), tokenizer)
    sft, grpo, held = sides(task)
    assert not (sft | grpo) & held
    assert len(grpo) == 14 and sft == {row["question"] for row in rows_of(12)} - held


def test_f7_two_neighbouring_seeds_share_no_row(conf: Conf, tokenizer: Any) -> None:
    options = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    data = {"name": "reasoning_gym/chain_sum", "size": 400, "seed": 1, "options": options}
    sets = {"other": {"seed": 2, "size": 100}}
    task = load_task(conf(data, ("grpo", "evaluate"), evaluate={"sets": sets}), tokenizer)
    _, grpo, held = sides(task)
    assert len(grpo) > 100 and len(held) > 50 and not grpo & held
    assert task.overlap_removed["other"] >= 90


def test_f7_seeds_far_apart_keep_what_they_do_not_share(conf: Conf, tokenizer: Any) -> None:
    options = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    data = {"name": "reasoning_gym/chain_sum", "size": 300, "seed": 1, "options": options}
    task = load_task(conf(data, ("grpo", "evaluate"), evaluate={"sets": {"other": {"seed": 200}}}), tokenizer)
    _, grpo, held = sides(task)
    assert not grpo & held and len(grpo) > 100 and task.overlap_removed["other"] >= 101


@pytest.mark.parametrize("section", ["sft", "grpo"])
def test_a_set_that_reads_training_rows_is_refused(conf: Conf, tokenizer: Any, tmp_path: Path, section: str) -> None:
    path = written(tmp_path, "train.csv", rows_of(8))
    settings = conf({"path": path}, (section, "evaluate"), evaluate={"sets": {"own": {"limit": 2}}})
    with pytest.raises(DataError) as caught:
        load_task(settings, tokenizer)
    assert f"evaluate.sets.own reads the rows that {section}.data trains on" in str(caught.value)
    assert "give evaluate.sets.own.split or evaluate.sets.own.path" in str(caught.value)


def test_a_folder_gives_each_section_the_file_of_its_split(conf: Conf, tokenizer: Any, tmp_path: Path) -> None:
    written(tmp_path, "train.csv", rows_of(20))
    written(tmp_path, "test.csv", rows_of(10, start=50))
    data = {"path": str(tmp_path), "split": "train"}
    task = load_task(conf(data, ("grpo", "evaluate"), evaluate={"sets": {"own": {"split": "test"}}}), tokenizer)
    assert (len(task.prompts), len(task.sets["own"])) == (20, 10)


def test_rows_from_python_stand_in_for_data_but_not_for_a_section_of_its_own(
    conf: Conf, tokenizer: Any, tmp_path: Path
) -> None:
    test = written(tmp_path, "test.csv", rows_of(4, start=50))
    settings = conf({"path": "nowhere.jsonl"}, ("grpo", "evaluate"), evaluate={"sets": {"own": {"path": test}}})
    task = load_task(settings, tokenizer, iter(rows_of(10)))
    assert (len(task.prompts), len(task.sets["own"])) == (10, 4)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"sft": {"data": {"map": "reasoner.data.word_problems:svamp"}}}, "train.csv:2: sft.data.map=reasoner"),
        ({"grpo": {"data": {"completion": "{worked}", "prompt": "{problem}"}}}, "which grpo.data.prompt='{problem}'"),
        ({"evaluate": {"sets": {"own": {"path": "nowhere.csv"}}}}, "evaluate.sets.own.path=nowhere.csv: there is no"),
        ({"evaluate": {"sets": {"own": {"name": "nowhere.csv"}}}}, "file: say evaluate.sets.own.path=nowhere.csv"),
    ],
)
def test_an_error_names_a_setting_where_the_conf_has_it(
    conf: Conf, tokenizer: Any, tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    path = written(tmp_path, "train.csv", rows_of(20))
    with pytest.raises((ConfigError, DataError)) as caught:
        load_task(conf({"path": path}, ("sft", "grpo", "evaluate"), **sections), tokenizer)
    assert said in str(caught.value)


def test_an_error_of_data_itself_is_named_so_in_every_section(conf: Conf, tokenizer: Any, tmp_path: Path) -> None:
    path = written(tmp_path, "train.csv", rows_of(20))
    with pytest.raises(DataError, match=r"which data\.prompt='\{problem\}' asks for"):
        load_task(conf({"path": path, "prompt": "{problem}"}, sft={"data": {"limit": 12}}), tokenizer)


def test_every_way_a_row_can_go_is_counted(conf: Conf, tokenizer: Any) -> None:
    rows = [
        *({"question": f"q{i}", "answer": "1"} for i in range(5)),
        {"question": "", "answer": "1"},
        {"question": "q1.", "answer": "1"},
        {"question": "long" * 20, "answer": "1"},
        {"question": "wordy", "answer": "1" * 30},
    ]
    settings = conf({"heldout": 2, "max_prompt_tokens": 50, "seed": 3}, sft={"max_completion_tokens": 10})
    task = load_task(settings, tokenizer, rows)
    sft = task.report["sft"]
    assert sft["rows"] == 9 == sum(sft[name] for name in others()) + sft["kept"]
    assert sft["empty"] == 1 and sft["long_prompts"] + task.report["heldout"]["long_prompts"] == 1
    assert len(task.examples) == sft["kept"]


def test_nothing_left_says_where_the_rows_went(conf: Conf, tokenizer: Any) -> None:
    with pytest.raises(DataError) as caught:
        load_task(conf({"max_prompt_tokens": 3}, ("grpo",)), tokenizer, rows_of(20))
    assert str(caught.value).startswith("grpo: 0 prompts of 20 rows (2 held out, 18 prompts too long): nothing is left")


def test_a12_characters_that_the_tokenizer_loses_stop_the_run(conf: Conf, real: Any) -> None:
    tokenizer = real("models/TinyStories-656K")
    rows = [{"question": f"How many is {i}?", "answer": "four"} for i in range(10)]
    load_task(conf({"heldout": 0}, ("grpo",)), tokenizer, rows)
    rows[7]["answer"] = "12/4 = 3"
    with pytest.raises(
        ModelError, match=r"row 8: the model's tokenizer loses the characters / =: choose another model"
    ):
        load_task(conf({"heldout": 0}, ("grpo",)), tokenizer, rows)
    with pytest.raises(ModelError, match=r"row 3: .* loses the characters #"):
        rows[2]["question"] = "#"
        load_task(conf({"heldout": 0}, ("sft",)), tokenizer, rows)


def test_one_run_reads_one_template(conf: Conf, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"sft\.data has template=chatml, grpo\.data template=plain: a run has one"):
        load_task(conf({}, sft={"data": {"template": "chatml"}}), tokenizer, rows_of(20))


def test_sets_may_not_take_a_stages_name(conf: Conf, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.sets\.grpo: the name is taken"):
        load_task(conf({}, evaluate={"sets": {"grpo": {"path": "x.csv"}}}), tokenizer, rows_of(20))


def test_evaluation_without_heldout_rows_or_sets_is_refused(conf: Conf, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.heldout=0: the stage `evaluate` wants"):
        load_task(conf({"heldout": 0}), tokenizer, rows_of(20))
    assert len(load_task(conf({"heldout": 0}, ("sft",)), tokenizer, rows_of(20)).examples) == 20


def test_the_first_prompt_is_shown(conf: Conf, tokenizer: Any) -> None:
    task = load_task(conf({"template": "chatml"}, ("grpo",)), tokenizer, rows_of(20))
    assert task.lines()[-1].startswith("the first prompt, ")
    assert "'<|im_start|>user\\nWhat is 0 + 0?<|im_end|>\\n<|im_start|>assistant\\n'" in task.lines()[-1]


def test_smol_data_without_a_hub(conf: Conf, real: Any, shared: Path) -> None:
    """GSM8K for SFT, word problems for GRPO, four sets: as conf=smol reads them, from local files."""
    maps, none = "reasoner.data.word_problems", {"answer_pattern": None}
    words = shared / "word_problems"
    data = {"path": str(shared / "gsm8k"), "split": "train", "completion": "{answer}", "limit": 300}
    data |= {"answer_pattern": r"####\s*(.+)", "template": "chatml", "overlap": "masked"}
    sets: dict[str, Any] = {"gsm8k": {"split": "test"}, "svamp": {"path": str(words / "svamp_test.jsonl")}}
    sets["svamp"] |= {"map": f"{maps}:svamp", **none}
    grpo = {"path": str(words / "mawps_asdiv-a_train.csv"), "map": f"{maps}:fill_numbers", **none}
    settings = conf(data, grpo={"data": grpo}, evaluate={"sets": sets})
    tokenizer = copy.deepcopy(real("tokenizers/smollm2-135m-instruct"))
    tokenizer.eos_token = "<|im_end|>"
    task = load_task(settings, tokenizer)
    assert {name: counts["kept"] for name, counts in task.report.items()} == {
        "sft": 300,
        "grpo": 293,
        "gsm8k": 300,
        "svamp": 300,
    }
    example = task.examples[0]
    assert (
        example.prompt.text
        == f"<|im_start|>user\n{example.prompt.columns['question']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert task.template.decode(example.completion_ids).endswith("\n#### 72<|im_end|>")
    assert task.prompts[0].answer == "504"
