"""Trainer and engine take turns with the card: who is awake when, through a whole run with an adapter. Row D12."""

import json
from pathlib import Path

import pytest
import torch

from reasoner import assembly, config, train
from reasoner.errors import GuardTripped
from reasoner.models.loading import load_tokenizer
from reasoner.rollout.hf import HfEngine
from tests.models.tiny_models import make_model
from tests.test_pipeline import SMALL
from tests.tiny_rewards import close_enough

CHARACTERS = "\n !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"


class Strict(HfEngine):
    """An engine with a cache that is away while it sleeps, and weights that are only as new as what it was handed."""

    def __init__(self, *args, **how) -> None:
        super().__init__(*args, **how)
        self.awake, self.closed, self.log = True, False, []
        self.handed = self._now()

    def _now(self) -> dict[str, list[float]]:
        return {name: weight.flatten()[:4].tolist() for name, weight in self.policy.trainable().items()}

    def generate(self, prompts, sampling, *, policy_step, **how):
        assert self.awake and not self.closed
        assert self.handed == self._now(), "it would sample from old weights"
        self.log.append("generate")
        return super().generate(prompts, sampling, policy_step=policy_step, **how)

    def load_adapter(self, state, policy_step):
        assert self.awake, "its memory is unmapped"
        self.handed = self._now()
        self.log.append("load")
        super().load_adapter(state, policy_step)

    def sleep(self):
        assert self.awake
        self.awake = False
        self.log.append("sleep")

    def wake(self):
        assert not self.awake
        self.awake = True
        self.log.append("wake")

    def close(self):
        self.closed = True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model with a tokenizer, as a user would have one."""
    letters = config.Model(name="letters", scratch=config.Scratch(characters=CHARACTERS))
    tokenizer = load_tokenizer(letters)
    make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_sft_and_updates_run_while_the_engine_sleeps_and_it_samples_only_from_what_it_was_handed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Strict] = []

    def make_engine(name, conf, policy, decode, *, max_context):
        made.append(Strict(policy, decode, max_context=max_context, max_sequences=64))
        return made[-1]

    monkeypatch.setattr(assembly, "make_engine", make_engine)
    overrides = [*(line for line in SMALL if "scratch" not in line), f"model.name={folder}", "model.scratch=null"]
    overrides += ["model.lora.r=4", "grpo.steps=2", "sft.steps=2", f"out={tmp_path / 'run'}"]
    result = train("tiny", overrides=overrides, reward=close_enough)
    (engine,) = made  # the exported adapter is scored with the engine that is there, not beside a second one
    assert engine.closed
    assert engine.log == [
        *("generate", "sleep", "wake", "load", "generate", "load"),  # base; SFT; its row; GRPO begins
        *("generate", "sleep", "wake", "load") * 2,
        *("load", "generate", "load", "generate"),  # its end and row; the artefact and its row
    ]
    assert [row["row"] for row in result.rows] == ["base", "sft", "grpo", "export"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "done"
    kinds = {key: value for key, value in result.rows[2].items() if key not in ("row", "stage_index", "artefact")}
    assert kinds == {k: v for k, v in result.rows[3].items() if k not in ("row", "stage_index", "artefact")}


@pytest.mark.parametrize("own_engine", [False, True])
def test_the_base_is_loaded_with_rows_for_the_engine_that_will_sample_from_it(
    own_engine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def load_model(*args, engine_rows, **how):
        asked.append(engine_rows)
        raise GuardTripped("that was all")

    monkeypatch.setattr(assembly, "load_model", load_model)
    for expected in (True, False):
        monkeypatch.setattr(assembly, "samples_from_base", lambda conf, so=expected: so)
        with pytest.raises(GuardTripped, match="that was all"):
            train(
                "tiny",
                overrides=[*SMALL, f"out={tmp_path / str(expected)}"],
                reward=close_enough,
                engine=Strict if own_engine else None,
            )
    assert asked == [not own_engine, False]


def test_a_card_that_fails_ends_in_one_line_with_its_checkpoint_kept_and_nothing_asked_of_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Strict] = []

    class Failing(Strict):
        def generate(self, prompts, sampling, *, policy_step, **how):
            if policy_step == 3:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")
            return super().generate(prompts, sampling, policy_step=policy_step, **how)

    def make_engine(name, conf, policy, decode, *, max_context):
        made.append(Failing(policy, decode, max_context=max_context, max_sequences=64))
        return made[-1]

    monkeypatch.setattr(assembly, "make_engine", make_engine)
    overrides = [*(line for line in SMALL if "scratch" not in line), f"model.name={folder}", "model.scratch=null"]
    overrides += ["model.lora.r=4", "sft.steps=2", "stages=[sft,grpo]", "checkpoint.every=1", f"out={tmp_path / 'run'}"]
    with pytest.raises(GuardTripped, match=r"the GPU failed: CUDA error: an illegal memory access.* resume=.*run"):
        train("tiny", overrides=overrides, reward=close_enough)
    assert not made[0].closed
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped by a guard"
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "01-grpo-000001"


def test_an_evaluation_asks_for_no_more_sequences_at_once_than_the_engine_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 problems, greedy and one sample, 4 sequences at once: 10 pieces of 4."""
    made: list[Strict] = []

    def make_engine(name, conf, policy, decode, *, max_context):
        made.append(Strict(policy, decode, max_context=max_context, max_sequences=4))
        return made[-1]

    monkeypatch.setattr(assembly, "make_engine", make_engine)
    given = [*SMALL, "evaluate.samples=1", "rollout.max_sequences=4", "stages=[evaluate]", f"out={tmp_path / 'run'}"]
    train("tiny", overrides=given, reward=close_enough)
    assert made[0].log.count("generate") == 20
