"""A policy as one GGUF file in f16 or q8_0, written tensor by tensor: the host holds one weight at a time.

Matrices take the type that is asked for, where their rows divide into its blocks, else f16; vectors stay float32, as
llama.cpp wants them. k-quants are llama.cpp's to make (llama.py). Everything that can't be said in the format is
refused before the file is opened.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_VERSION, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reasoner.errors import ModelError
from reasoner.export import gguf_layout, gguf_tokens
from reasoner.models import merged
from reasoner.models.policy import Policy

F16, Q8_0, Q4_K_M = "f16", "q8_0", "q4_k_m"
TYPES = {F16: GGMLQuantizationType.F16, Q8_0: GGMLQuantizationType.Q8_0}
FILE_TYPES = {F16: LlamaFileType.MOSTLY_F16, Q8_0: LlamaFileType.MOSTLY_Q8_0}
LARGEST_F16 = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True, eq=False)
class Speech:
    """How prompts are made and answers end, which the file says too."""

    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]
    chat_template: str | None  # as prompts were rendered; None: plain text


def plan(policy: Policy, speech: Speech, *, name: str, original: merged.Original | None = None) -> "Plan":
    """What a file of this policy holds. Raises ModelError for what the format or llama.cpp can't say."""
    config: Any = policy.base.config
    row = gguf_layout.architecture(config)
    rows = policy.head_weight.shape[0]
    found = gguf_tokens.vocabulary(speech.tokenizer, rows=rows, chat=speech.chat_template is not None)
    weights = gguf_layout.weights(config, merged.values(policy, original))
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[row.arch])
    writer.add_type("model")
    writer.add_name(name)
    gguf_layout.write_settings(writer, config, rows=rows)
    gguf_tokens.write_tokens(writer, found, speech.tokenizer, speech.stops, speech.chat_template)
    return Plan(writer, weights)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A file that could be written; once."""

    writer: GGUFWriter
    weights: Sequence[gguf_layout.Weight]

    def write(self, path: Path, kind: str) -> None:
        """The file in `kind`, f16 or q8_0. Raises ModelError for a weight that float16 can't hold, and OSError."""
        writer, types = self.writer, {weight.name: _type(weight.shape, kind) for weight in self.weights}
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        for weight in self.weights:
            block, size = GGML_QUANT_SIZES[types[weight.name]]
            numbers = torch.Size(weight.shape).numel()
            writer.add_tensor_info(
                weight.name, weight.shape, _FLOAT32, numbers // block * size, raw_dtype=types[weight.name]
            )
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for weight in self.weights:
                value = weight.make().detach().float().cpu().contiguous()
                _check(weight.name, value, types[weight.name])
                writer.write_tensor_data(quantize(value.numpy(), types[weight.name]))
        finally:
            writer.close()


_FLOAT32 = torch.zeros(0).numpy().dtype


def _type(shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    wanted = TYPES[kind]
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _check(name: str, value: Tensor, type_: GGMLQuantizationType) -> None:
    largest = float(value.abs().max())
    if not largest <= (LARGEST_F16 if type_ != GGMLQuantizationType.F32 else torch.finfo(torch.float32).max):
        raise ModelError(f"{name} holds {largest:.3g}, which {type_.name} can't: {gguf_layout.REMEDY}")


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of each type the file holds."""
    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors))
