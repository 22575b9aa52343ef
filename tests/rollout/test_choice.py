"""Which engine samples, and what is said where vLLM can't be had. The machine is faked: what it lacks is the matter."""

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reasoner import config
from reasoner.errors import ConfigError
from reasoner.rollout import choice
from tests.models.tiny_models import lora_of, make_policy

LORA = config.Lora()


def conf(engine: str = "auto", *, share_base: bool = True, **model: Any) -> Any:
    rollout = config.Rollout(engine=engine, share_base=share_base)  # type: ignore[arg-type]
    return SimpleNamespace(rollout=rollout, model=config.Model(**{"name": "m", "lora": LORA, **model}))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that has all vLLM needs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(choice, "version", lambda package: choice.VLLM)
    return monkeypatch


def policy(shared: bool = True) -> Any:
    found = make_policy("llama", lora=lora_of("llama"))
    found.weights = object() if shared else None  # type: ignore[assignment]
    return found


def test_auto_takes_vllm_where_it_can_be_had_and_says_so(gpu: pytest.MonkeyPatch) -> None:
    assert choice.obstacle(conf()) is None
    name, said = choice.choose(conf(), policy())
    assert name == "vllm" and "auto chose vllm" in said and "the trainer's own weights" in said
    assert choice.choose(conf("vllm"), policy())[1].startswith("rollout.engine: vllm;")


def test_auto_takes_hf_elsewhere_and_says_why(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    name, said = choice.choose(conf(), policy())
    assert name == "hf" and "auto chose hf" in said and "no CUDA GPU" in said


def test_who_loads_the_base_knows_whether_vllm_will_sample_from_it(gpu: pytest.MonkeyPatch) -> None:
    assert choice.samples_from_base(conf()) and choice.samples_from_base(conf("vllm"))
    others = conf("hf"), conf("vllm", share_base=False), conf(lora=None), conf(dtype="float32")
    assert not any(map(choice.samples_from_base, others))
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert not choice.samples_from_base(conf())


def missing(package: str) -> str:
    raise PackageNotFoundError(package)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            lambda m: m.setattr(torch.cuda, "is_available", lambda: False),
            r"no CUDA GPU\. rollout=hf samples without it",
        ),
        (lambda m: m.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False), "Tesla T4 has no bf"),
        (lambda m: m.setattr(choice, "version", missing), r"needs the package 'vllm': pip install -e '.\[gpu\]'"),
        (
            lambda m: m.setattr(choice, "version", lambda package: "0.25.1"),
            r"vllm 0\.25\.1 is installed and 0\.24\.0 is",
        ),
        (lambda m: m.setattr(choice.world, "size", lambda: 2), "on one GPU"),
    ],
    ids=["card", "bf16", "package", "version", "ranks"],
)
def test_a_named_engine_that_can_not_be_had_is_an_error_of_one_line(gpu: pytest.MonkeyPatch, fault, said: str) -> None:
    fault(gpu)
    with pytest.raises(ConfigError, match=rf"rollout\.engine=vllm can't be had: .*{said}"):
        choice.choose(conf("vllm"), policy())
    assert choice.choose(conf("hf"), policy())[0] == "hf"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora": None}, r"needs an adapter to hand over: set model\.lora\.r=32"),
        ({"dtype": "float32"}, r"set model\.dtype=auto"),
        ({"share_base": False, "quantize": "nf4"}, "set share_base=true"),
    ],
)
def test_settings_that_it_does_not_go_with_are_named(gpu: pytest.MonkeyPatch, settings, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choice.choose(conf("vllm", **settings), policy())


def test_a_family_that_can_not_share_needs_a_second_copy_asked_for_in_words(gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"llama model can't be shared .* set rollout\.share_base=false"):
        choice.choose(conf("vllm"), policy(shared=False))
    assert choice.choose(conf("auto"), policy(shared=False))[0] == "hf"
    name, said = choice.choose(conf("vllm", share_base=False), policy(shared=False))
    assert name == "vllm" and "a second copy" in said
