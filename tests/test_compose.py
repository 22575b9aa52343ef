"""Confs: where they are found, what an override becomes, and what a wrong one says."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from reasoner.compose import annotated_yaml, compose_conf, list_confs, packaged_confs, rewrite, source_of
from reasoner.config import build, validate
from reasoner.errors import ConfigError, MissingExtra

CONFS = [path.stem for path in sorted(packaged_confs().glob("*.yaml")) if path.stem != "base"]


@pytest.mark.parametrize("name", CONFS)
def test_every_conf_composes_validates_and_its_targets_resolve(name: str):
    config = validate(compose_conf(name).values)
    assert config.name == name
    build(config.grpo.loss)
    if config.sft.optim.optimizer["_target_"].startswith("torch."):
        build(config.sft.optim.optimizer, params=[__import__("torch").zeros(1, requires_grad=True)], lr=1e-3)


@pytest.mark.parametrize("path", sorted((packaged_confs() / "loss").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_loss_composes_and_builds(path: Path):
    config = validate(compose_conf("tiny", [f"loss={path.stem}"]).values)
    assert callable(build(config.grpo.loss))


def test_every_choice_of_every_group_composes():
    for group in ("model", "card", "data", "reward", "rollout"):
        for path in (packaged_confs() / group).glob("*.yaml"):
            conf = "gsm8k" if group == "card" else "tiny"
            validate(compose_conf(conf, [f"{group}={path.stem}"]).values)


def test_sections_take_what_the_command_line_says_without_a_plus():
    config = validate(compose_conf("tiny", ["grpo.mask_cut=true", "seed=3", "grpo.optim.lr=1e-4", "loss=gspo"]).values)
    assert (config.grpo.mask_cut, config.seed, config.grpo.optim.lr) == (True, 3, 1e-4)
    assert config.grpo.loss["_target_"].endswith("Gspo")


def test_a_reward_on_the_command_line_takes_the_place_of_the_confs_own():
    config = validate(compose_conf("tiny", ["reward=my_reward.py:score"]).values)
    assert {name: part.fn for name, part in config.reward.parts.items()} == {"score": "my_reward.py:score"}


def test_g9_what_was_typed_keeps_its_type():
    values = compose_conf("tiny", ["data.system='Think, then answer'", "data.revision=007"]).values
    assert (values["data"]["system"], values["data"]["revision"]) == ("Think, then answer", "007")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["grpo.stepz=3"], "unknown key 'grpo.stepz': did you mean 'steps'"),
        (["gpro.steps=3"], "unknown key 'gpro': did you mean 'grpo'"),
        (["loss=dappo"], "loss=dappo: there is no such choice: did you mean 'dapo'"),
        (["grpo.steps=many"], "grpo.steps='many'"),
        (["grpo.steps=0"], "grpo.steps=0"),
        (["rollout.top_p=0.9"], "rollout.top_p=0.9 is refused"),
        (["data.system=Think, then answer"], "needs quotes"),
        (["data.system=<|im_end|>"], "in quotes"),
        (["steps"], "write key=value"),
        (["evaluate.accuracy=acuracy"], "did you mean 'accuracy'"),
        (["model.quantize=int8"], "'none' or 'nf4'"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_right_one(overrides: list[str], said: str):
    with pytest.raises(ConfigError) as caught:
        validate(compose_conf("tiny", overrides).values)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_conf_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        compose_conf("tinny")
    with pytest.raises(ConfigError, match="no such file"):
        compose_conf("nowhere/mine.yaml")


def test_the_users_folder_is_searched_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "tiny.yaml").write_text("# Mine\ndefaults: [gsm8k, override loss: dapo, _self_]\nseed: 9\n")
    (tmp_path / "conf" / "loss" / "dapo.yaml").write_text(
        "# @package grpo.loss\n_target_: reasoner.grpo.losses.Dapo\nclip_low: 0.1\n"
    )
    monkeypatch.chdir(tmp_path)
    composed = compose_conf("tiny", [])
    assert composed.values["seed"] == 9 and composed.values["grpo"]["loss"]["clip_low"] == 0.1
    assert composed.values["model"]["name"].startswith("Qwen")
    assert ("tiny", "Mine") in list_confs()
    (tmp_path / "elsewhere.yaml").write_text("defaults: [gsm8k, _self_]\ngrpo: {steps: 7}\n")
    assert compose_conf("elsewhere.yaml").values["grpo"]["steps"] == 7


def test_broken_yaml_names_file_and_line(tmp_path: Path):
    (tmp_path / "broken.yaml").write_text("a: 1\nb: [1, 2\nc: 3\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml:\d"):
        compose_conf(str(tmp_path / "broken.yaml"))


def test_the_listing_is_yaml_and_names_each_values_source(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("reasoner.compose.card_gib", lambda: 15.99)
    composed = compose_conf("gsm8k", ["grpo.steps=5"])
    config = validate(composed.values)
    text = annotated_yaml(asdict(config), composed.sources)
    assert "steps: 5  # command line" in text
    assert "max_completion_tokens: 768  # conf/card/auto.yaml" in text
    assert "subset: main  # conf/data/gsm8k.yaml" in text
    assert "mask_cut: false  # default" in text
    assert yaml.safe_load(text)["model"]["lora"]["r"] == 32


def test_a_choice_on_the_command_line_is_named_by_its_file_and_by_what_comes_after_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("reasoner.compose.card_gib", lambda: None)
    composed = compose_conf("gsm8k", ["model=smol", "optim@grpo.optim=adamw"])
    told = {
        key: source_of(key, composed.sources) for key in ("model.name", "model.lora.r", "grpo.optim.optimizer._target_")
    }
    assert told["model.name"] == "conf/model/smol.yaml"
    assert told["model.lora.r"] == "conf/card/auto.yaml" and composed.values["model"]["lora"]["r"] == 16
    assert told["grpo.optim.optimizer._target_"] == "conf/optim/adamw.yaml"


def test_relative_files_are_found_by_the_working_directory_and_by_the_confs_folder(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "judge.py").write_text("")
    (tmp_path / "mine.yaml").write_text(
        "defaults: [tiny, _self_]\ndata: {path: rows.jsonl}\nreward: {parts: {accuracy: {fn: 'judge.py:score'}}}\n"
    )
    values = compose_conf(str(tmp_path / "mine.yaml")).values
    assert values["data"]["path"] == str(tmp_path / "rows.jsonl")
    assert values["reward"]["parts"]["accuracy"]["fn"] == f"{tmp_path / 'judge.py'}:score"


def test_a_conf_takes_away_the_sets_of_the_one_it_builds_on(tmp_path: Path):
    """As in the README: null is the only word for it, since sections merge."""
    (tmp_path / "mine.yaml").write_text("defaults: [gsm8k, _self_]\nevaluate: {sets: null}\n")
    assert validate(compose_conf(str(tmp_path / "mine.yaml")).values).evaluate.sets == {}
    assert list(validate(compose_conf("gsm8k").values).evaluate.sets) == ["gsm8k_test"]


def test_rewrite_leaves_hydras_own_grammar_alone():
    groups = {"loss", "optim", "reward"}
    assert rewrite("optim@grpo.optim=adamw", groups) == ["optim@grpo.optim=adamw"]
    assert rewrite("+a.b=1", groups) == ["+a.b=1"] and rewrite("~a.b", groups) == ["~a.b"]
    assert rewrite("card=8", {"card"}) == ["card='8'"]
    assert rewrite("reward=math", groups) == ["reward=math"]
    assert rewrite("resume=out/x", groups) == ["++resume.dir='out/x'"]


def test_a_target_that_is_missing_or_refuses_its_values_is_the_users_error():
    with pytest.raises(ConfigError, match="can't be found"):
        build({"_target_": "reasoner.grpo.losses.Nothing"})
    with pytest.raises(ConfigError, match="no _target_"):
        build({"lr": 1})
    with pytest.raises(ConfigError, match="refuses its values"):
        build({"_target_": "reasoner.grpo.losses.Dapo", "clip_down": 1})
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[gpu\]'"):
        build({"_target_": "vllm.LLM"})


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reasoner", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "120"})


def test_the_command_line(tmp_path: Path):
    listed = run(cwd=tmp_path)
    assert listed.returncode == 2 and "tiny" in listed.stderr and "gsm8k_base" in listed.stderr
    shown = run("conf=tiny", "--cfg", "job", cwd=tmp_path)
    assert shown.returncode == 0 and "# conf/tiny.yaml" in shown.stdout
    wrong = run("conf=tiny", "grpo.stepz=1", cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: unknown key") and "Traceback" not in wrong.stderr
    assert run("trian", "conf=tiny", cwd=tmp_path).stderr.startswith("error: unknown command 'trian': did you mean")
    assert run("resume=nowhere", cwd=tmp_path).stderr.startswith("error: resume=nowhere: there is no run")
    assert run("--help", cwd=tmp_path).returncode == 0
    assert run("conf=tiny", "--info", "defaults", cwd=tmp_path).returncode == 0
    assert not list(tmp_path.iterdir())
