# pyright: reportMissingImports=false
# (vLLM is there only on GPU machines.)
"""Starts vLLM on a policy's weights: which of its settings, in which environment, with what said where it fails."""

import io
import json
import os
import platform
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy
import torch

from reasoner import config
from reasoner.errors import ModelError
from reasoner.garbage import importing, uncollected
from reasoner.models.policy import Policy
from reasoner.rollout.platform import engine_environment
from reasoner.rollout.vllm_adapter import EngineAdapter

GIB = 2**30
# In this process, and nothing sent anywhere. FlashInfer's sampler is an extra package, and not used here.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
DEFAULTS = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # The newer runner draws with each request's own seed in one kernel; the older one makes a call for each request.
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    # For 8-bit floats alone, which nothing here has: to find out whether it runs, vLLM would import it.
    "VLLM_USE_DEEP_GEMM": "0",
}

ALWAYS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "generation_config": "vllm",
    "dtype": "bfloat16",
    "gpu_memory_utilization": 0.01,  # is checked, and then not used: kv_cache_memory_bytes decides
    "enable_sleep_mode": True,
    "enable_prefix_caching": True,
    "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
    "disable_log_stats": True,
}


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds Python's, numpy's and torch's generators when it starts; afterwards they are what they were."""
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


@_random_state_kept()
@uncollected()
def start(
    folder: Path,
    policy: Policy,
    adapter: EngineAdapter,
    rollout: config.Rollout,
    *,
    max_context: int,
    kv_bytes: int,
    dequantize: bool,
    model_path: str | None,
) -> tuple[Any, Any]:
    """vLLM's `LLMEngine` and how its module was built (`vllm_weights.Built`); `folder` gets the files that it reads.

    The arguments are those of VllmEngine. Random states are as before. Raises ModelError where the card has no room.
    """
    _set_environment()
    _write_config(policy, folder)
    EngineArgs, LLMEngine, vllm_weights = import_vllm()
    own, name = None if model_path else policy.weights, type(policy.base).__name__
    built = vllm_weights.register(own, adapter, name, dequantize=dequantize)
    try:
        with redirect_stderr(io.StringIO()):  # progress bars: a start takes seconds
            settings = EngineArgs(
                **ALWAYS,
                model=model_path or str(folder),
                revision=policy.revision if model_path else None,
                load_format="auto" if model_path else vllm_weights.LOAD_FORMAT,
                quantization=vllm_weights.QUANTIZATION,
                max_model_len=max_context,
                max_num_seqs=rollout.max_sequences,
                max_num_batched_tokens=max(rollout.max_batched_tokens, rollout.max_sequences),
                kv_cache_memory_bytes=kv_bytes,
                # vllm_bursts.py asks the scheduler once for many tokens instead, but for the older model runner.
                async_scheduling=None if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0" else False,
                attention_config={"flash_attn_max_num_splits_for_cuda_graph": attention_splits(max_context)},
                # Without inductor: seconds to start instead of minutes, and faster here too.
                compilation_config={
                    "mode": 0,
                    "cudagraph_mode": "FULL_DECODE_ONLY",
                    "cudagraph_capture_sizes": capture_sizes(rollout.max_sequences),
                },
            )
            llm = LLMEngine.from_engine_args(settings)
    except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
        # The cache is allocated apart from torch, and its failure is a RuntimeError; too small a one is a ValueError.
        if not re.search("out of memory|KV cache", str(error)):
            raise
        free = torch.cuda.mem_get_info()[0] / GIB
        raise ModelError(
            f"out of memory while vLLM started with a cache of {kv_bytes / GIB:.1f} GiB ({free:.1f} GiB were free): "
            "lower rollout.kv_gib, rollout.max_batched_tokens or rollout.max_sequences"
        ) from error
    return llm, built


def import_vllm() -> tuple[Any, Any, Any]:
    """vLLM's `EngineArgs` and `LLMEngine`, and our `vllm_weights`, which needs vLLM. The environment is read here."""
    with importing():  # vLLM collects garbage eight times while it starts, each time the whole of what is not frozen
        from vllm import EngineArgs, LLMEngine  # and not LLM, which brings the web server with it

        from reasoner.rollout import vllm_weights

    return EngineArgs, LLMEngine, vllm_weights


def _write_config(policy: Policy, folder: Path) -> None:
    """config.json, all that vLLM reads of a model whose weights it is handed."""
    settings = policy.base.config.to_dict()
    for of_the_file in ("quantization_config", "_name_or_path", "torch_dtype", "transformers_version"):
        settings.pop(of_the_file, None)
    settings |= {"architectures": [type(policy.base).__name__], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings, default=str), encoding="utf-8")


def _set_environment() -> None:
    needed, _ = engine_environment(platform.release())
    os.environ.update(ENVIRONMENT)
    for name, value in (DEFAULTS | needed).items():
        os.environ.setdefault(name, value)


def attention_splits(max_context: int) -> int:
    """Into how many parts FlashAttention 3 may cut a sequence's keys in a decode graph. One saves a kernel a layer that
    puts parts together, and its buffers; it pays where there are few keys to go through."""
    return 1 if max_context <= 1024 else 32  # 32 is vLLM's


def capture_sizes(max_sequences: int) -> list[int]:
    """Batch sizes with a CUDA graph of their own; others are padded up to the next. Each costs start-up time and
    memory, so the large ones are 32 apart."""
    small = [size for size in (1, 2, 4, 8, 16) if size < max_sequences]
    return [*small, *range(32, max_sequences, 32), max_sequences]
