"""A run opened, its weights written in the layout that is asked for, and the proof that the files say the same."""

import gc
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor

from reasoner.assembly import NO_CONTEXT_LIMIT, assemble, check_before_loading
from reasoner.config import Config, data_of, validate
from reasoner.console import Console
from reasoner.data.templates import Template, make_template
from reasoner.disk import refusal
from reasoner.disk import replace as replace_file
from reasoner.errors import ConfigError, GuardTripped, RunFolderError
from reasoner.evaluation.sets import compose_sets, to_measure
from reasoner.evaluation.weights import BASE, Weights, weights_of
from reasoner.export import again, gguf_artefact, gguf_layout, hub, ollama
from reasoner.export.again import Origin
from reasoner.export.gguf_file import Speech
from reasoner.export.proof import Answers, Drawn, Examiner, compare, logprobs_of, sentence
from reasoner.export.request import ADAPTER, MERGED, OLLAMA, REPORT, Request
from reasoner.models import base_files, merged
from reasoner.models.beside import save_beside
from reasoner.models.loading import load_model, load_tokenizer
from reasoner.models.policy import Policy
from reasoner.models.sources import context_limit, first_line, locate
from reasoner.models.stops import stop_ids
from reasoner.run_folder import CONFIG
from reasoner.summary import versions

UNTRIED = "; transformers read the file and no llama.cpp tried it: pip install -e '.[export]' brings one"


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A run's model, loaded without its data."""

    config: Config
    tokenizer: Any
    policy: Policy
    stop_ids: tuple[int, ...]
    template: Template

    @property
    def speech(self) -> Speech:
        """How the run asks and where it stops."""
        return gguf_artefact.speech(self.tokenizer, self.stop_ids, self.template)


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What the policy said, and its base of the same rows; None for a model trained whole."""

    drawn: Drawn
    answers: Answers
    base: Tensor | None

    @property
    def effect(self) -> float | None:
        """How far the adapter moved the base, nats in the mean."""
        return None if self.base is None else float((self.answers.logprobs - self.base).abs().mean())


def export(request: Request, *, functions: Mapping[str, Callable[..., Any]] | None = None, rows: Any = None) -> Path:
    """Write what the request names and prove it; the artefact's folder.

    With `request.repo` it is pushed to the hub too. `functions` are the rewards and `rows` the data that the run got
    from Python. Raises InputError, and GuardTripped where the artefact is not the policy.
    """
    if request.repo:
        hub.check(request)
    out = request.out if request.ready else _exported(request, functions or {}, rows)
    if request.repo:
        with Console() as console:
            console.status(f"pushing {out}")
            console.say(f"pushed: {hub.push(request)}")
    return out


def _exported(request: Request, functions: Mapping[str, Callable[..., Any]], rows: Any) -> Path:
    config, composed, _ = compose_sets(str(request.run / CONFIG), request.overrides, ())
    config = to_measure(config, set())
    width = min(config.rollout.max_sequences, request.problems)
    config = replace(
        config,
        rollout=replace(config.rollout, engine="hf", max_sequences=width),
        evaluate=replace(config.evaluate, samples=0),
    )
    chosen = _chosen(request, composed.values)
    _check(request, config)
    with Console() as console:
        if request.verify:
            return _proved(request, config, composed.folder, chosen, functions, rows, console)
        opened = _open(config)
        chosen.load(opened)
        told = _write(request, opened, chosen, console)
        _keep(request.out, {**told, "verified": False})
        console.say(f"exported: {request.out}; not verified, as verify=false asked")
        return request.out


def _proved(
    request: Request,
    config: Config,
    base_dir: Path,
    chosen: Weights,
    functions: Mapping[str, Callable[..., Any]],
    rows: Any,
    console: Console,
) -> Path:
    with ExitStack() as closing:
        parts = assemble(config, base_dir=base_dir, functions=functions, rows=rows, console=console)
        closing.callback(parts.rewards.close)
        limit = context_limit(config.model) or NO_CONTEXT_LIMIT
        examiner = Examiner(parts.evaluator, parts.task.sets, parts.task.template.decode, limit, request.problems)
        opened = Opened(config, parts.tokenizer, parts.policy, parts.stop_ids, parts.task.template)
        del parts
        chosen.load(opened)
        told = _write(request, opened, chosen, console)
        console.status("the policy answers")
        policy = opened.policy
        asked = _ask(examiner, policy)
        keeps = policy if request.to == ADAPTER else None
        of = Origin(opened.speech, policy.head_weight.dtype, policy.device, keeps)
        del opened, policy, keeps  # their memory is wanted for the artefact
        gc.collect()
        torch.cuda.empty_cache()
        console.status("the artefact answers")
        path, dtype = request.out / told.get("file", ""), told.get("dtype", "float32")
        with again.loaded(request, path, dtype, of, examiner) as subject:
            after = examiner.ask(subject, asked.drawn)
            wrong = again.differs(request, path, subject, of, [prompt.text for prompt, _ in asked.drawn])
        numbers, apart = compare(asked.answers, after, again.limit(request, dtype, of, asked.effect), asked.base)
        wrong = apart + wrong
    _keep(
        request.out,
        {**told, "verified": True, "loader": again.loader(request), "passed": not wrong, "differs": wrong, **numbers},
    )
    if wrong:
        raise GuardTripped(
            f"the export is not the policy: {'; '.join(wrong)}. Its files and {REPORT} are kept in {request.out} to "
            "look at, not to use"
        )
    untried = request.is_gguf and again.loader(request) != again.LLAMA_CPP
    console.say(f"exported: {request.out}; {sentence(numbers)}{UNTRIED if untried else ''}")
    if request.to == OLLAMA:
        console.say(f"next: ollama create NAME -f {request.out / ollama.MODELFILE}")
    return request.out


def _chosen(request: Request, values: Mapping[str, Any]) -> Weights:
    asked = (request.checkpoint,) if request.checkpoint else ()
    found = weights_of(request.run, validate(dict(values)), asked, key="checkpoint")
    if request.checkpoint and (len(found) > 1 or found[0].name == BASE):
        raise ConfigError(f"checkpoint={request.checkpoint}: name one checkpoint that was trained")
    return found[-1]


def _check(request: Request, config: Config) -> None:
    """What this run can't be exported to. Raises ConfigError, and what a run of this conf would."""
    if request.to == ADAPTER and config.model.lora is None:
        raise ConfigError("to=adapter: this run trained the whole model, which has no adapter: to=merged writes it")
    if request.original and config.model.quantize != "nf4":
        raise ConfigError(
            f"base=original is for runs on an NF4 base; this one trained on the original (model.quantize="
            f"{config.model.quantize}): leave it out"
        )
    if request.original and config.model.gguf:
        raise ConfigError("base=original: a GGUF file holds no 16-bit original: leave it out")
    check_before_loading(config)


def _open(config: Config) -> Opened:
    tokenizer = load_tokenizer(config.model)
    template = make_template(tokenizer, data_of(config, config.grpo.data, "grpo.data"))
    policy = load_model(config.model, tokenizer, seed=config.seed)
    return Opened(config, tokenizer, policy, stop_ids(tokenizer, template, policy.model), template)


def _dtype(request: Request, policy: Policy) -> Literal["float32", "bfloat16"]:
    if request.dtype == "auto":
        return "bfloat16" if isinstance(policy.model, PeftModel) else "float32"
    return "float32" if request.dtype == "float32" else "bfloat16"


def _write(request: Request, opened: Opened, chosen: Weights, console: Console) -> dict[str, Any]:
    """The artefact, written beside its place and moved there whole; what export.json says of it."""
    console.status(f"{chosen.name}: writing to={request.to}")
    policy, out = opened.policy, request.out
    partial = out.with_name(f".{out.name}.partial")
    dtype = _dtype(request, policy)
    told: dict[str, Any] = {}
    base = "original" if request.original else "trained"
    original = base_files.matrices(locate(opened.config.model)) if request.original else None
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        if request.to == ADAPTER:
            policy.save(partial, opened.tokenizer, stop_ids=opened.stop_ids)
        elif request.to == MERGED:
            merged.write(policy, partial, dtype=getattr(torch, dtype), original=original)
            save_beside(partial, opened.tokenizer, opened.stop_ids)
            told = {"dtype": dtype, "base": base}
        else:
            name, quant = opened.config.name, request.quant
            beside = _modelfile(request, opened) if request.to == OLLAMA else None
            told = gguf_artefact.write(policy, opened.speech, partial, out, name=name, quant=quant, original=original)
            told["base"] = base
            if beside:
                (partial / ollama.MODELFILE).write_text(beside, encoding="utf-8")
        if out.is_dir():
            out.rmdir()  # it was found empty
        partial.rename(out)
    except OSError as error:
        raise refusal(error, f"write {out}", "free it or name another folder by out=") from None
    except SafetensorError as error:
        raise RunFolderError(f"can't write {out}: {first_line(error)}; name another folder by out=") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "run": str(request.run),
        "weights": chosen.name,
        "to": request.to,
        **told,
        "versions": versions(),
    }


def _modelfile(request: Request, opened: Opened) -> str:
    """Raises ModelError where Ollama can't ask as the run did."""
    config, model = opened.config, opened.policy.base.config
    context = min(gguf_layout.context_length(model), context_limit(config.model) or NO_CONTEXT_LIMIT)
    stops = [opened.tokenizer.decode([number]) for number in opened.stop_ids]
    system = data_of(config, config.grpo.data, "grpo.data").system
    file = gguf_artefact.file_name(request.quant)
    template = ollama.template_of(opened.template)
    return ollama.modelfile(file, config, template, stops, system=system, context=context)


def _ask(examiner: Examiner, policy: Policy) -> Asked:
    drawn = examiner.draw(policy)
    answers = examiner.ask(examiner.subject(policy), drawn)
    if not isinstance(policy.model, PeftModel):
        return Asked(drawn, answers, None)
    with policy.model.disable_adapter():
        return Asked(drawn, answers, logprobs_of(policy.score, drawn))


def _keep(folder: Path, told: Mapping[str, Any]) -> None:
    text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
    try:
        replace_file(folder / REPORT, text.encode())
    except OSError as error:
        raise refusal(error, f"write {folder / REPORT}", "free it") from None
