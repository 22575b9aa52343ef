"""An artefact loaded again from its files, as those who get it load it."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reasoner.export import llama
from reasoner.export.gguf_file import Speech
from reasoner.export.proof import Examiner, Limit, Subject, tokens_differ
from reasoner.export.request import ADAPTER, Request
from reasoner.models import gguf
from reasoner.models.loading import load_merged
from reasoner.models.policy import Policy

PEFT, TRANSFORMERS, LLAMA_CPP = "peft", "transformers", "llama.cpp"


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """What is known of the policy once it has been given up for the artefact."""

    speech: Speech
    dtype: torch.dtype
    device: torch.device
    policy: Policy | None  # the policy itself where the artefact is loaded onto its base


def loader(request: Request) -> str:
    """Who loads the artefact."""
    if request.to == ADAPTER:
        return PEFT
    return LLAMA_CPP if request.is_gguf and llama.installed() else TRANSFORMERS


@contextmanager
def loaded(request: Request, path: Path, dtype: str, of: Origin, examiner: Examiner) -> Iterator[Subject]:
    """What answers from the artefact at `path`, whose weights are `dtype`. A GGUF file computes on the CPU."""
    kind = loader(request)
    if kind == LLAMA_CPP:
        threads = torch.get_num_threads()
        engine = llama.LlamaEngine(path, examiner.decode, max_context=examiner.longest, threads=threads)
        try:
            yield Subject(engine, engine.score)
        finally:
            engine.close()
        return
    if of.policy is not None:
        _reload(of.policy, path)
        yield examiner.subject(of.policy)
        return
    # On a CPU bfloat16 sums are slow, and say nothing of the files.
    bfloat16 = not request.is_gguf and of.device.type == "cuda" and dtype == "bfloat16"
    device = torch.device("cpu") if request.is_gguf else of.device
    policy = load_merged(path, of.speech.tokenizer, dtype="bfloat16" if bfloat16 else "float32", device=device)
    yield examiner.subject(policy)
    del policy
    gc.collect()


def _reload(policy: Policy, folder: Path) -> None:
    """The adapter from its files, over one that is emptied first, so that what the files lack is seen."""
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight.zero_()
    policy.reload(folder)


def limit(request: Request, dtype: str | None, of: Origin, effect: float | None) -> Limit:
    """How far the artefact's logprobs may be from the policy's; `effect`: see `Limit.of`."""
    if request.is_gguf:
        rounded = of.dtype == torch.bfloat16
        return Limit.of_gguf(request.quant, effect, rounded=rounded, original=request.original)
    rounded = request.to != ADAPTER and torch.bfloat16 in (of.dtype, getattr(torch, str(dtype)))
    return Limit.of(rounded=rounded, effect=effect, original=request.original)


def differs(request: Request, path: Path, subject: Subject, of: Origin, texts: Sequence[str]) -> list[str]:
    """What the artefact says other than the run, a line each: tokens of the prompts, chat template, stop ids."""
    said, engine = of.speech, subject.engine
    if not request.is_gguf:
        return tokens_differ(path, said.tokenizer, said.stops, texts)
    if isinstance(engine, llama.LlamaEngine):
        ids: Any = [engine.tokenize(text) for text in texts]
        template, lost = engine.chat_template, [number for number in said.stops if not engine.ends(number)]
    else:
        header = gguf.read_metadata(path)
        known = header["tokenizer.ggml.model"] == "gpt2"
        ids = gguf.make_tokenizer(header, path)(list(texts)).input_ids if known else None
        template = header.get("tokenizer.chat_template")
        ends = {header.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
        lost = sorted(set(said.stops) - ends)
    found = []
    if ids is not None and ids != said.tokenizer(list(texts)).input_ids:
        found.append("its tokenizer cuts the prompts into other tokens")
    if template != said.chat_template:
        found.append("its chat template is another")
    if lost:
        found.append(f"it does not stop at {', '.join(said.tokenizer.convert_ids_to_tokens(lost))}")
    return found
