"""Other trainers' rows of benchmarks/update.py: plain transformers + peft + bitsandbytes, TRL with Liger, Unsloth.

Each side is a class with `rows()`; what it needs is imported when it is made. Models have random weights, made and
quantized where they stay. Left out: attention by the flash-attn package, which is no part of transformers, and
flex_attention, whose compilation takes longer than the whole table.
"""

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.random_model import DEVICE, weights
from benchmarks.update_work import ALPHA, LR, RANK, TARGETS, Row, Work, finish_gpu_work, stepped
from reasoner import config
from reasoner.models.base_model import EmptyOnMeta
from reasoner.models.loading import recompute_layers
from reasoner.models.scratch import make_tokenizer

MICRO_BATCHES = {"7b": (8, 4)}  # sequences, tried in this order; of other shapes:
MICRO_BATCHES_ELSE = (24, 8, 4)
MICRO_TOKENS = (4096, 2048)
TRL_MICRO_BATCH = 8
CLOSE = 1.03  # a smaller micro-batch is taken if it costs less than this factor in time


def quantized_model(work: Work) -> Any:
    """transformers' model with bitsandbytes' NF4 layers, as from_pretrained leaves it, without files."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # pyright: ignore[reportPrivateImportUsage]

    with DEVICE, EmptyOnMeta():
        model: Any = AutoModelForCausalLM.from_config(work.config, dtype=torch.bfloat16, attn_implementation="sdpa")
    head = model.get_output_embeddings()
    for name, part in list(model.named_modules()):
        if isinstance(part, nn.Linear) and part is not head:
            parent, _, leaf = name.rpartition(".")
            linear: Any = Linear4bit(
                part.in_features, part.out_features, part.bias is not None, compute_dtype=torch.bfloat16,
                compress_statistics=False, quant_type="nf4", device="meta",
            )  # fmt: skip
            setattr(model.get_submodule(parent), leaf, linear)
    for name, value in weights(work.config):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, Linear4bit) and leaf == "weight":
            packed: Any = Params4bit(
                value.cpu() if DEVICE.type == "cpu" else value, requires_grad=False, quant_type="nf4",
                compress_statistics=False, module=module,
            )  # fmt: skip
            module.weight = packed.to(DEVICE)
        else:
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    if work.config.tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight
    model.is_loaded_in_4bit = True
    return model.eval()


def lora_config() -> Any:
    """peft's, on the seven projections."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")


Micro = tuple[dict[str, Any], Tensor]  # the model's arguments, and labels


class Plain:
    """transformers + peft + bitsandbytes in a plain loop: what Trainer does in a step, without its bookkeeping."""

    def __init__(self, work: Work, logs: Path):
        from peft import get_peft_model

        self.work = work
        base = quantized_model(work)
        recompute_layers(base, work.shape)
        self.model: Any = get_peft_model(base, lora_config())
        self.model.train()
        self.parameters = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.0, fused=DEVICE.type == "cuda")

    def rows(self) -> list[Row]:
        """Padded rows sorted by length."""
        sizes = [size for size in MICRO_BATCHES.get(self.work.shape, MICRO_BATCHES_ELSE) if size <= self.work.num]
        return [self._row("transformers + peft + bitsandbytes, padded", "sequences", sizes, self._padded)]

    def variants(self) -> list[Row]:
        """Packed rows: position ids that begin anew, from which transformers makes sdpa's block mask."""
        sizes = [size for size in MICRO_TOKENS if size <= self.work.tokens] or [self.work.tokens]
        return [self._row("transformers + peft + bitsandbytes, packed", "tokens", sizes, self._packed)]

    def _row(self, name: str, unit: str, sizes: list[int], make: Callable[[int], list[Micro]]) -> Row:
        row = Row(name, lambda warm_up, timed: [])
        chosen: list[list[Micro]] = []

        def run(warm_up: int, timed: int) -> list[float]:
            if not chosen:
                tried = {size: self._try(make(size)) for size in sizes}
                row.facts["tried_s"] = {str(size): seconds for size, seconds in tried.items()}
                size = fastest(tried)
                row.facts["micro_batch"] = f"{size} {unit}"
                chosen.append(make(size))
                if DEVICE.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
            return stepped(lambda: row.facts.update(loss=self._update(chosen[0])))(warm_up, timed)

        row.run = run
        return row

    def _try(self, micro: list[Micro]) -> float | None:
        try:
            return stepped(lambda: void(self._update(micro)))(1, 1)[0]
        except torch.OutOfMemoryError:
            pass
        self.optimizer.zero_grad(set_to_none=True)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _update(self, micro: list[Micro]) -> float:
        total = torch.zeros((), device=DEVICE)
        for inputs, labels in micro:
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                found = self.model(
                    **inputs, labels=labels, use_cache=False, num_items_in_batch=self.work.num_trained
                )  # fmt: skip
            found.loss.backward()
            total += found.loss.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)

    def _labels(self, i: int) -> Tensor:
        ids, prompt = self.work.ids[i], self.work.prompts[i]
        return torch.tensor([-100] * prompt + ids[prompt:])

    def _padded(self, size: int) -> list[Micro]:
        found = []
        for first in range(0, self.work.num, size):
            numbers = range(first, min(first + size, self.work.num))
            longest = max(self.work.lengths[i] for i in numbers)
            ids = torch.zeros(len(numbers), longest, dtype=torch.int64)
            mask, labels = ids.clone(), ids - 100
            for row, i in enumerate(numbers):
                length = self.work.lengths[i]
                ids[row, :length] = torch.tensor(self.work.ids[i])
                mask[row, :length] = 1
                labels[row, :length] = self._labels(i)
            inputs = {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}
            found.append((inputs, labels.to(DEVICE)))
        return found

    def _packed(self, size: int) -> list[Micro]:
        found, row = [], list[int]()
        for i, length in enumerate((*self.work.lengths, size + 1)):
            if row and sum(self.work.lengths[j] for j in row) + length > size:
                ids = torch.cat([torch.tensor(self.work.ids[j]) for j in row])
                places = torch.cat([torch.arange(self.work.lengths[j]) for j in row])
                labels = torch.cat([self._labels(j) for j in row])
                inputs = {"input_ids": ids[None].to(DEVICE), "position_ids": places[None].to(DEVICE)}
                found.append((inputs, labels[None].to(DEVICE)))
                row = []
            row.append(i)
        return found


def void(_: Any) -> None:
    """Nothing of it."""


def fastest(tried: dict[int, float | None]) -> int:
    """The size that took least, or a smaller one that took hardly more. Raises OutOfMemoryError where none ran."""
    ran = {size: seconds for size, seconds in tried.items() if seconds is not None}
    if not ran:
        raise torch.OutOfMemoryError("at every micro-batch size")
    return min(size for size, seconds in ran.items() if seconds <= CLOSE * min(ran.values()))


class TRL:
    """TRL's SFTTrainer with its own settings, Liger's kernels where they are installed, padded rows by length."""

    def __init__(self, work: Work, logs: Path):
        self.work, self.logs = work, logs
        self.liger = find_spec("liger_kernel") is not None
        self.trainer = self._trainer(quantized_model(work), lora_config())

    def rows(self) -> list[Row]:
        """One."""
        name = "TRL SFTTrainer" + (" + Liger" if self.liger else " (no Liger here)")
        return [sft_trainer_row(name, self.trainer)]

    def variants(self) -> list[Row]:
        """None."""
        return []

    def _trainer(self, model: Any, peft_config: Any) -> Any:
        return make_sft_trainer(self.work, self.logs, model, peft_config, use_liger_kernel=self.liger)


def make_sft_trainer(work: Work, logs: Path, model: Any, peft_config: Any, **more: Any) -> Any:
    """SFTTrainer on the work, over and over in the same order."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    labels = [[-100] * prompt + ids[prompt:] for ids, prompt in zip(work.ids, work.prompts, strict=True)]
    rows = Dataset.from_dict({"input_ids": work.ids, "labels": labels})
    size = min(TRL_MICRO_BATCH, work.num)
    options = SFTConfig(
        output_dir=str(logs / "trl"),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=work.num // size,
        max_steps=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_length=None,
        train_sampling_strategy="sequential",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=DEVICE.type == "cuda",
        use_cpu=DEVICE.type == "cpu",
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )
    tokenizer = make_tokenizer(config.Scratch(characters="abc"))
    return SFTTrainer(
        model=model, args=options, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
    )


def sft_trainer_row(name: str, trainer: Any) -> Row:
    """Its steps between two callbacks, optimizer included and the making of batches not."""
    from transformers import TrainerCallback

    row = Row(name, lambda warm_up, timed: [])
    seconds: list[float] = []

    class Watch(TrainerCallback):
        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            finish_gpu_work()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            finish_gpu_work()
            seconds.append(time.perf_counter() - self.began)

    trainer.add_callback(Watch())

    def run(warm_up: int, timed: int) -> list[float]:
        seconds.clear()
        trainer.args.max_steps = warm_up + timed
        row.facts["loss"] = trainer.train().training_loss
        options = trainer.args
        row.facts["micro_batch"] = f"{options.per_device_train_batch_size} sequences"
        row.facts["optimizer"] = str(options.optim)
        return seconds[warm_up:]

    row.run = run
    return row


class Unsloth:
    """Unsloth's model in TRL's SFTTrainer. Its loader reads files only: the random weights go through /tmp."""

    def __init__(self, work: Work, logs: Path):
        from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

        folder = logs / f"unsloth-{work.shape}"
        model: Any = AutoModelForCausalLM.from_config(work.config, dtype=torch.bfloat16)
        model.load_state_dict(dict(weights(work.config)), strict=False)
        model.save_pretrained(folder)
        make_tokenizer(config.Scratch(characters="abc")).save_pretrained(folder)
        del model
        loaded, _ = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=work.longest, load_in_4bit=True, dtype=torch.bfloat16
        )
        adapted = FastLanguageModel.get_peft_model(
            loaded, r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, use_gradient_checkpointing="unsloth",
            random_state=0,
        )  # fmt: skip
        self.trainer = make_sft_trainer(work, logs, adapted, None)

    def rows(self) -> list[Row]:
        """One."""
        return [sft_trainer_row("Unsloth", self.trainer)]

    def variants(self) -> list[Row]:
        """None."""
        return []
