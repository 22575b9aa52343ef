"""Which engine samples, and why: `rollout.engine` as it was asked for, or for `auto` the best that can be had.

`auto` says what it chose and, where that is not vLLM, what stands in the way. An engine that was named and can't be had
is an error. Left out: making vLLM (vllm_engine.py).
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from reasoner import config, world
from reasoner.errors import ConfigError, MissingExtra
from reasoner.models.policy import Policy
from reasoner.models.sources import locate
from reasoner.rollout.engine import Decode, Engine

VLLM = "0.24.0"  # what it was tried with; vLLM changes from release to release what stands behind its names


def absent(asked: str) -> str | None:
    """What this machine lacks of vLLM, as the end of a sentence; None: nothing. `asked` is what needs it."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{torch.cuda.get_device_name()} has no bfloat16"
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        return str(MissingExtra("vllm", "gpu", asked))
    if installed != VLLM:
        return f"vllm {installed} is installed and {VLLM} is needed: pip install 'vllm=={VLLM}'"
    return None


def obstacle(config_: config.Config) -> str | None:
    """What keeps vLLM from sampling for this conf on this machine, as the end of a sentence; None: nothing known yet.

    Looks at the machine and the settings, not at the model: `check_policy` does.
    """
    why = absent("rollout=vllm")
    if why is not None:
        return why
    if world.size() > 1:
        return "it samples on one GPU, and torchrun started several processes"
    if config_.model.lora is None:
        return "it needs an adapter to hand over: set model.lora.r=32"
    if config_.model.dtype == "float32":
        return "it samples in bfloat16: set model.dtype=auto"
    own = config_.rollout.share_base is False
    if own and (config_.model.gguf or config_.model.quantize == "nf4"):
        return "with rollout.share_base=false it reads 16-bit weights from a folder or the hub: set share_base=true"
    return None


def refusal(why: str) -> str:
    """What to say where vLLM was named and `obstacle` found something."""
    return f"rollout.engine=vllm can't be had: {why}. rollout=hf samples without it"


def choose(config_: config.Config, policy: Policy) -> tuple[str, str]:
    """The engine's name, and the sentence to say. Raises ConfigError where the one named can't be had."""
    asked = config_.rollout.engine
    if asked == "hf":
        return "hf", "rollout.engine: hf; it samples from the policy's own weights"
    why = obstacle(config_)
    if why is None and config_.rollout.share_base and policy.weights is None:
        why = (
            f"the weights of this {policy.family.name} model can't be shared with it: set rollout.share_base=false, "
            "which loads them a second time"
        )
    if why is None:
        shared = "from the trainer's own weights" if config_.rollout.share_base else "from a second copy of the weights"
        chose = "auto chose vllm" if asked == "auto" else "vllm"
        return "vllm", f"rollout.engine: {chose}; it samples {shared}"
    if asked == "vllm":
        raise ConfigError(refusal(why))
    return "hf", f"rollout.engine: auto chose hf; vllm can't be had: {why}"


def samples_from_base(config_: config.Config) -> bool:
    """Whether vLLM will sample from the trainer's own weights, if the model turns out to be one that can share them.
    The loader asks: what the engine needs beside the base has to be allocated with it."""
    return config_.rollout.engine != "hf" and config_.rollout.share_base and obstacle(config_) is None


def make_engine(
    name: str,
    config_: config.Config,
    policy: Policy,
    decode: Decode,
    *,
    max_context: int,
    kv_bytes: int = 0,
    dequantize: bool = False,
) -> Engine:
    """The engine that `choose` named. `max_context`: tokens of prompt and completion together; `kv_bytes`: of vLLM's
    cache; `dequantize`: whether vLLM holds an NF4 base in 16 bits too."""
    if name == "hf":
        from reasoner.rollout.hf import HfEngine

        return HfEngine(policy, decode, max_context=max_context, max_sequences=config_.rollout.max_sequences)
    from reasoner.rollout.vllm_engine import VllmEngine

    path = None if config_.rollout.share_base else locate(config_.model).path
    sizes: Any = {"max_context": max_context, "kv_bytes": kv_bytes}
    return VllmEngine(policy, decode, config_.rollout, **sizes, dequantize=dequantize, model_path=path)
