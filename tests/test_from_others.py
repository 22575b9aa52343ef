"""docs/from_others.md: our keys and values on the page compose, TRL's and peft's are fields of theirs, the examples are
what they say."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from reasoner.compose import compose_conf, leaves, list_confs, packaged_confs
from reasoner.config import Config, Data, validate

PAGE = (Path(__file__).parents[1] / "docs/from_others.md").read_text(encoding="utf-8")
HERE = "gsm8k_base"
OF_OURS = re.compile(r"(model|sft|grpo|rollout|evaluate|checkpoint|reward|loss|tracking|optim@\w+)\b[.=@]\S+")


def tables() -> Iterator[tuple[str, list[str]]]:
    """(the head's first word, the cells of a row) of each row of the page's tables."""
    head = ""
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            head = ""
        elif not head:
            head = cells[0]
        elif not set(cells[0]) <= {"-"}:
            assert len(cells) == 3, line
            yield head, cells


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


ROWS = list(tables())
OURS = sorted(
    {word for _, (_, ours, _) in ROWS for word in quoted(ours)}
    | {word for _, (_, _, told) in ROWS for word in quoted(told) if OF_OURS.fullmatch(word)}
)


def config(*overrides: str) -> Config:
    return validate(compose_conf(HERE, ["card=24", *overrides]).values)


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every key there is, with NAME for the names that a conf chooses."""
    found = {f"data.{field.name}" for field in fields(Data)} | {"evaluate.sets.NAME"}
    for path in (packaged_confs() / "loss").glob("*.yaml"):
        found |= {key for key, _ in leaves(asdict(config(f"loss={path.stem}")))}
    return {re.sub(r"^(reward\.parts)\.\w+", r"\1.NAME", key) for key in found}


def test_the_page_speaks_of_many_keys():
    assert len(ROWS) > 90 and len(OURS) > 70


def test_our_keys_on_the_page_are_keys(known: set[str]):
    assert [word for word in OURS if "=" not in word and word not in known] == []


@pytest.mark.parametrize("override", [word for word in OURS if "=" in word])
def test_our_values_on_the_page_compose(override: str):
    assert config(override)


def test_their_keys_are_fields_of_their_classes():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig
        from trl import GRPOConfig, SFTConfig
    sections = [row for row in ROWS if row[0] in ("TRL", "peft")]
    first_of_sft = next(place for place, (_, cells) in enumerate(sections) if "`max_length`" in cells[0])
    kinds = [LoraConfig if head == "peft" else GRPOConfig for head, _ in sections]
    kinds[first_of_sft:] = [kind if kind is LoraConfig else SFTConfig for kind in kinds[first_of_sft:]]
    assert {kind.__name__ for kind in kinds} == {"GRPOConfig", "SFTConfig", "LoraConfig"}
    wrong = [
        (kind.__name__, word)
        for kind, (_, (theirs, _, _)) in zip(kinds, sections, strict=True)
        for word in quoted(theirs)
        if word not in {field.name for field in fields(kind)}
    ]
    assert wrong == []
    ((script,),) = (re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL),)
    calls = {ast.unparse(n.func): n for n in ast.walk(ast.parse(script)) if isinstance(n, ast.Call)}
    for kind in (GRPOConfig, LoraConfig):
        assert {word.arg for word in calls[kind.__name__].keywords} <= {field.name for field in fields(kind)}


def test_defaults_that_the_page_gives_for_trl_are_trls():
    from trl import GRPOConfig, SFTConfig

    theirs = {field.name: field.default for field in fields(GRPOConfig)}
    said = {"num_generations": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "beta": 0.0}
    said |= {"max_completion_length": 512, "num_iterations": 1, "loss_type": "dapo", "scale_rewards": "group"}
    said |= {"epsilon": 0.2, "epsilon_high": None, "learning_rate": 1e-6, "max_grad_norm": 1.0, "adam_beta2": 0.999}
    said |= {"vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 3.0, "seed": 42}
    said |= {"mask_truncated_completions": False, "use_bias_correction_kl": True, "lr_scheduler_type": "linear"}
    said |= {"use_vllm": False, "temperature": 1.0, "num_train_epochs": 3.0, "save_steps": 500, "entropy_coef": 0.0}
    assert {name: theirs[name] for name in said} == said
    sft = {field.name: field.default for field in fields(SFTConfig)}
    assert (sft["max_length"], sft["learning_rate"]) == (1024, 2e-5)


def test_the_conf_on_the_page_is_the_script_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ((conf,),) = (re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL),)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/mine.yaml").write_text(conf)
    (tmp_path / "train.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    assert "mine" in dict(list_confs())
    made = validate(compose_conf("mine", ["card=24"]).values)
    assert yaml.safe_load(conf)["grpo"]["prompts_per_step"] == made.grpo.prompts_per_step == 8 * 16 // 8
    assert made.grpo.loss["_target_"] == "reasoner.grpo.losses.DrGrpo" and made.grpo.advantage_scale == "none"
    assert (made.grpo.kl_coef, made.grpo.mask_cut, made.grpo.max_completion_tokens) == (0.04, True, 768)
    assert made.model.lora is not None and (made.model.lora.r, made.model.lora.alpha) == (16, 32)
    assert {part.fn for part in made.reward.parts.values()} == {"rewards.py:correct", "rewards.py:short"}
    assert made.data.path == str(tmp_path / "train.jsonl")
    assert made.data.prompt == Data().prompt, "so that rows of TRL's shapes are recognised"


@pytest.mark.parametrize("command", re.findall(r"^python -m reasoner (.*)$", PAGE, re.MULTILINE))
def test_a_command_of_the_page_composes(command: str):
    conf, *overrides = shlex.split(command)
    made = validate(compose_conf(conf.removeprefix("conf="), ["card=24", *overrides]).values)
    (part,) = made.reward.parts.values()
    assert part.fn.endswith((":correctness_reward_func", ":compute_score"))
    if "train.parquet" in command:
        assert made.data.prompt == Data().prompt and made.grpo.kl_estimator == "k3"
