"""What every engine is asked, and sleep around training."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from reasoner import config
from reasoner.errors import ModelError, OutOfMemory
from reasoner.rollout.engine import Sampling, asleep, unheard
from reasoner.rollout.single_turn import rollout
from reasoner.types import Prompt

CONFS = Path(__file__).parents[2] / "conf" / "rollout"


@pytest.mark.parametrize("path", sorted(CONFS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_group_file_is_a_legal_choice_of_its_own_name(path):
    node = yaml.safe_load(path.read_text())
    assert config.Rollout(**node).engine == path.stem


class Sleeper:
    """An engine of which only sleeping matters."""

    def __init__(self):
        self.calls: list[str] = []

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")


def test_asleep_wakes_the_engine_also_when_training_raised():
    engine = Sleeper()
    with pytest.raises(RuntimeError), asleep(engine):  # type: ignore[arg-type]
        engine.calls.append("train")
        raise RuntimeError
    assert engine.calls == ["sleep", "train", "wake"]


class Cramped(Sleeper):
    """One that finds no room to wake."""

    def wake(self) -> None:
        super().wake()
        raise ModelError("no room to wake the cache")


def test_what_training_raised_is_not_hidden_by_an_engine_that_can_not_wake():
    engine = Cramped()
    with pytest.raises(OutOfMemory, match="lower grpo"), asleep(engine):  # type: ignore[arg-type]
        raise OutOfMemory("out of memory with a single sequence: lower grpo.max_completion_tokens")
    with pytest.raises(ModelError, match="no room"), asleep(engine):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"max_tokens": 0}, {"num_completions": 0}], ids=lambda wrong: next(iter(wrong))
)
def test_sampling_settings_out_of_range_are_our_own_mistake(wrong):
    right = {"temperature": 1.0, "max_tokens": 1, "num_completions": 1, "stop_ids": (), "seed": 0}
    with pytest.raises(AssertionError):
        Sampling(**{**right, **wrong})


def test_c3_sampling_has_no_field_that_hides_tokens():
    assert set(Sampling.__dataclass_fields__) == {"temperature", "max_tokens", "num_completions", "stop_ids", "seed"}


def test_single_turn_asks_once():
    prompts = [Prompt(id=str(i), text="", answer="", columns={}, token_ids=(i,)) for i in range(3)]
    asked = []

    def generate(some, finished):
        assert finished is unheard
        asked.append(some)
        return [[] for _ in some]

    assert rollout(prompts, generate) == [[], [], []]
    assert asked == [prompts]


def test_the_protocol_loads_no_torch():
    code = "import sys, reasoner.rollout.engine; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
