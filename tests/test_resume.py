"""What a resumed run may change (G6)."""

import copy
from typing import Any

import pytest

from reasoner.checkpoint import Progress
from reasoner.errors import ConfigError
from reasoner.resume import check_resume

OLD: dict[str, Any] = {
    "name": "tiny",
    "out": "outputs/a",
    "seed": 0,
    "stages": ["evaluate", "sft", "evaluate", "grpo", "evaluate"],
    "model": {"name": "m", "lora": None, "gradient_checkpointing": False},
    "data": {"path": "rows.jsonl"},
    "reward": {"parts": {"accuracy": {"fn": "math", "options": {}}}},
    "sft": {"steps": 600, "examples_per_step": 64, "optim": {"lr": 1e-3}, "data": {}},
    "grpo": {
        "steps": 250,
        "prompts_per_step": 32,
        "show_every": 10,
        "optim": {"lr": 1e-5},
        "data": {},
        "eval_every": 50,
    },
    "checkpoint": {"every": 50, "keep": 2},
    "resume": {"dir": None, "allow": []},
    "tracking": [],
}
AT = Progress(3, "grpo", 100, 100, 3200)


def changed(**values: Any) -> dict[str, Any]:
    config = copy.deepcopy(OLD)
    for key, value in values.items():
        *path, name = key.split("__")
        section = config
        for part in path:
            section = section[part]
        section[name] = value
    return config


def test_g6_what_is_free_is_said() -> None:
    new = changed(
        out="outputs/b",
        grpo__steps=500,
        grpo__show_every=5,
        grpo__eval_every=25,
        model__gradient_checkpointing="offload",  # update.py's remedy where one sequence is too much
        checkpoint__every=10,
        checkpoint__keep=1,
        tracking=("wandb",),
        resume__dir="outputs/a",
    )
    assert check_resume(OLD, new, [], AT) == [
        "out was outputs/a, now outputs/b",
        "model.gradient_checkpointing was False, now offload",
        "grpo.steps was 250, now 500",
        "grpo.show_every was 10, now 5",
        "grpo.eval_every was 50, now 25",
        "checkpoint.every was 50, now 10",
        "checkpoint.keep was 2, now 1",
        "tracking was [], now ['wandb']",
    ]


def test_g6_same_config_says_nothing_tuples_or_lists() -> None:
    assert check_resume(OLD, changed(stages=tuple(OLD["stages"])), [], AT) == []


def test_g6_anything_else_wants_resume_allow() -> None:
    new = changed(grpo__optim={"lr": 2e-5}, sft__optim={"lr": 2e-3})
    said = r"sft\.optim\.lr was 0\.001, now 0\.002; grpo\.optim\.lr was 1e-05, now 2e-05: "
    said += r".* resume\.allow=\[sft\.optim\.lr,grpo\.optim\.lr\]"
    with pytest.raises(ConfigError, match=said):
        check_resume(OLD, new, [], AT)
    with pytest.raises(ConfigError, match=r"resume\.allow=\[grpo\.optim\.lr,sft\.optim\.lr\]"):
        check_resume(OLD, new, ["grpo.optim.lr"], AT)
    assert check_resume(OLD, new, ["grpo.optim.lr", "sft.optim"], AT) == [
        "sft.optim.lr was 0.001, now 0.002",
        "grpo.optim.lr was 1e-05, now 2e-05",
    ]


def test_g6_a_key_that_came_or_went_is_a_change() -> None:
    new = changed(reward__parts={"accuracy": {"fn": "math", "options": {"strict": True}}})
    with pytest.raises(ConfigError, match=r"options\.strict was \(not set\), now True"):
        check_resume(OLD, new, [], AT)
    with pytest.raises(ConfigError, match=r"options\.strict was True, now \(not set\)"):
        check_resume(new, OLD, [], AT)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"stages": ["sft"]},
        {"model__name": "other"},
        {"model__lora": {"r": 8}},
        {"data__path": "others.jsonl"},
        {"sft__data": {"path": "x"}},
        {"grpo__data": {"limit": 5}},
        {"grpo__prompts_per_step": 16},
        {"sft__examples_per_step": 32},
    ],
)
def test_g6_data_order_and_model_are_fixed_whatever_is_allowed(change: dict[str, Any]) -> None:
    key = next(iter(change)).replace("__", ".")
    with pytest.raises(ConfigError, match=rf"{key}.* was .*, now .*data's order or the model"):
        check_resume(OLD, changed(**change), [key, f"{key}.r", f"{key}.path", f"{key}.limit"], AT)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_g6_a_key_inside_a_stage_s_own_data_is_fixed(stage: str) -> None:
    old, new = changed(**{f"{stage}__data": {"limit": 5}}), changed(**{f"{stage}__data": {"limit": 6}})
    with pytest.raises(ConfigError, match=rf"{stage}\.data\.limit was 5, now 6: it would change the data's order"):
        check_resume(old, new, [f"{stage}.data.limit"], AT)


def test_g6_fewer_steps_than_done() -> None:
    assert check_resume(OLD, changed(grpo__steps=100), [], AT) == ["grpo.steps was 250, now 100"]
    with pytest.raises(ConfigError, match=r"grpo\.steps=99, but 100 steps are done: give at least grpo\.steps=100"):
        check_resume(OLD, changed(grpo__steps=99), [], AT)


def test_g6_steps_of_a_stage_that_is_over_cannot_change() -> None:
    with pytest.raises(ConfigError, match=r"sft\.steps was 600, now 700: that stage is done"):
        check_resume(OLD, changed(sft__steps=700), [], AT)
    in_sft = Progress(1, "sft", 600, 0, 0)
    assert check_resume(OLD, changed(sft__steps=700), [], in_sft) == ["sft.steps was 600, now 700"]


def test_g8_a_secret_that_was_redacted_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-12345678")
    old = changed(reward__judge="<redacted>")
    assert check_resume(old, changed(reward__judge="sk-12345678"), [], AT) == []
