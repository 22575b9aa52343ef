"""This project's rows of benchmarks/update.py: its SFT step as a run takes it, and the same with one thing changed.

A thing that this version does not have yet is left out, so that the table grows with the project.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import CONTEXT_GIB, GIB
from benchmarks.random_model import DEVICE, random_policy
from benchmarks.update_work import ALPHA, LR, RANK, TARGETS, Row, Work, stepped
from reasoner import config
from reasoner.compose import compose_conf
from reasoner.config import validate
from reasoner.memory import BFLOAT16, ENGINE, STATES_8BIT
from reasoner.models.adapted_linear import AdaptedLinear, join
from reasoner.models.loading import layers_of, recompute_layers
from reasoner.models.policy import Policy
from reasoner.peak import rehearse
from reasoner.sft import SFTTrainer
from reasoner.types import Example, Prompt
from reasoner.update import Updater

OURS = "reasoner"
WITHIN = {"1.5b": 24, "7b": 16}  # of the row that recomputes as little as fits: GiB of its card
# Of the main row that recomputes nothing: into how many parts the update's tokens go, each the most of a micro-batch.
KEEPING = {"7b": 2}


@dataclass(frozen=True)
class Switch:
    """A name of a module that is True or False. The whole table has it True; one row has it False."""

    without: str  # the row's name
    module: str
    name: str

    @property
    def there(self) -> bool:
        """Whether this version has it."""
        return find_spec(self.module) is not None and hasattr(import_module(self.module), self.name)

    @contextmanager
    def set(self, value: bool) -> Iterator[None]:
        """Inside, it has this value."""
        module = import_module(self.module)
        before = getattr(module, self.name)
        setattr(module, self.name, value)
        try:
            yield
        finally:
            setattr(module, self.name, before)


SWITCHES = (
    Switch("loss head in torch", "reasoner.kernels.linear_logprobs", "PREFER_TRITON"),
    Switch("norms in torch", "reasoner.kernels.elementwise", "PREFER_NORM"),
    Switch("rotary positions in torch", "reasoner.kernels.elementwise", "PREFER_ROTARY"),
    Switch("SwiGLU in torch", "reasoner.kernels.elementwise", "PREFER_GATED"),
)


@contextmanager
def everything_on(without: Switch | None = None) -> Iterator[None]:
    """Inside, every switch that there is is on, but one."""
    with ExitStack() as switches:
        for switch in SWITCHES:
            if switch.there:
                switches.enter_context(switch.set(switch is not without))
        yield


def examples_of(work: Work) -> list[Example]:
    """The work as worked examples."""
    found = []
    for i, (ids, prompt) in enumerate(zip(work.ids, work.prompts, strict=True)):
        asked = Prompt(id=str(i), text="", answer="", columns={}, token_ids=tuple(ids[:prompt]))
        found.append(Example(asked, tuple(ids[prompt:])))
    return found


class Ours:
    """A policy, and ways to train it."""

    def __init__(self, work: Work, logs: Path):
        lora = config.Lora(r=RANK, alpha=ALPHA, targets=TARGETS)
        self.policy = random_policy(work.shape, nf4=True, lora=lora, recompute=True)
        self.work, self.logs, self.examples = work, logs, examples_of(work)

    def rows(self) -> list[Row]:
        """With everything on: what a run does with model.gradient_checkpointing=true; with auto on a card of WITHIN
        GiB; and with false, which is faster and takes the more memory the larger a micro-batch is."""
        found = [self._row(OURS)]
        if (gib := WITHIN.get(self.work.shape)) and DEVICE.type == "cuda":
            found.append(self._row(f"{OURS}, a card of {gib} GiB", prepare=lambda: self._fit(gib)))
        return [*found, self._keeping(KEEPING.get(self.work.shape, 1))]

    def variants(self) -> list[Row]:
        """The first of them with one thing changed."""
        layers = [part for part in self.policy.model.modules() if isinstance(part, AdaptedLinear)]
        found = [self._keeping(2)] if self.work.shape not in KEEPING else []
        if DEVICE.type == "cuda":
            found.append(self._row(f"{OURS}, inputs on the host", prepare=lambda: offload_inputs(self.policy)))
        found += [self._row(f"{OURS}, {self._said(parts)}", parts=parts) for parts in (2, 4)]
        found += [self._row(f"{OURS}, {one.without}", without=one) for one in SWITCHES if one.there]
        if layers and self.policy.weights is not None:
            found.append(self._row(f"{OURS}, q/k/v and gate/up apart", prepare=lambda: part_siblings(layers)))
        if DEVICE.type == "cuda":
            found.append(self._row(f"{OURS}, float32 optimizer states", optim="adamw"))
        return found

    def _keeping(self, parts: int) -> Row:
        name = f"{OURS}, nothing recomputed, {self._said(parts)}"
        return self._row(name, prepare=lambda: set_recompute(self.policy, False), parts=parts)

    def _fit(self, gib: int) -> None:
        """Have as few layers recompute as a run's rehearsal would on a card of so many GiB."""
        set_recompute(self.policy, False)
        typed = ["card=24", "stages=[sft]", "data.max_prompt_tokens=1", f"sft.examples_per_step={self.work.num}"]
        typed += [f"sft.tokens_per_micro_batch={self.work.tokens}", f"sft.max_completion_tokens={self.work.longest}"]
        settings = validate(compose_conf("gsm8k_base", typed).values)
        assert settings.model.gradient_checkpointing == "auto"
        beside = (STATES_8BIT + BFLOAT16) * sum(weight.numel() for weight in self.policy.trainable().values())
        beside += ENGINE + int(settings.rollout.keep_free_gib * GIB)
        room = int((gib - CONTEXT_GIB) * GIB) - torch.cuda.memory_allocated() - beside
        rehearse(settings, self.policy, max_context=self.work.tokens, room=room)

    def _said(self, parts: int) -> str:
        """Not by their number: whole sequences seldom fill a micro-batch."""
        return f"{self.work.tokens // parts:,} tokens a micro-batch"

    def _row(
        self,
        name: str,
        *,
        without: Switch | None = None,
        prepare: Callable[[], None] = lambda: None,
        parts: int = 1,
        optim: str = "adamw_8bit" if DEVICE.type == "cuda" else "adamw",
    ) -> Row:
        said: list[str] = []
        row = Row(name, lambda warm_up, timed: [], {"optimizer": optim})

        def run(warm_up: int, timed: int) -> list[float]:
            set_recompute(self.policy, True)
            if self.policy.weights is not None:
                join(self.policy.model, self.policy.weights)
            prepare()
            self.policy.train_mode(dropout=False)
            updater = make_updater(self.policy, optim, self.work.tokens // parts, said.append, self.logs)
            trainer = SFTTrainer(self.policy, updater)

            def update() -> None:
                row.facts["loss"] = trainer.step(self.examples)["loss"]

            with everything_on(without):
                seconds = stepped(update)(warm_up, timed)
            row.facts |= {"micro_batch": f"{updater.tokens_per_micro_batch} tokens", "said": said}
            row.facts["recomputed_layers"] = self.policy.recomputed
            return seconds

        row.run = run
        return row


def make_updater(policy: Policy, optim: str, tokens: int, say: Callable[[str], None], logs: Path) -> Updater:
    """With the settings of conf=gsm8k_base's SFT on a card of 24 GB, and so many tokens in a micro-batch."""
    typed = [f"optim@sft.optim={optim}", "card=24", f"sft.optim.lr={LR}"]
    sft = validate(compose_conf("gsm8k_base", typed).values).sft
    return Updater(
        policy.trainable(),
        sft.optim,
        num_steps=1000,
        tokens_per_micro_batch=tokens,
        say=say,
        save_bad_batches_to=logs,
    )


def set_recompute(policy: Policy, on: bool) -> None:
    """Have layers recompute, or keep what they made."""
    if on:
        recompute_layers(policy.base, "the model")
        return
    for layer in layers_of(policy.model):
        layer.gradient_checkpointing = False


def offload_inputs(policy: Policy) -> None:
    """Have layers that recompute keep their inputs on the host."""
    recompute_layers(policy.base, "the model", offload=True)


def part_siblings(layers: list[Any]) -> None:
    """Have each adapted layer computed alone; `join` undoes it."""
    for layer in layers:
        layer.siblings = None
