"""to=gguf: one file, in the type that is asked for. q4_k_m is made by llama.cpp of an f16 file."""

from pathlib import Path
from typing import Any

import torch

from reasoner.data.templates import ChatTemplate, Template
from reasoner.errors import ModelError
from reasoner.export import gguf_file, llama
from reasoner.export.gguf_file import F16, Q4_K_M, Speech
from reasoner.models.merged import Original
from reasoner.models.policy import Policy


def file_name(quant: str) -> str:
    """The file's name in the artefact's folder."""
    return f"model-{quant}.gguf"


def speech(tokenizer: Any, stops: tuple[int, ...], template: Template) -> Speech:
    """How the run asked; a plain template leaves the file without a chat template."""
    return Speech(tokenizer, stops, template.source if isinstance(template, ChatTemplate) else None)


def write(
    policy: Policy, speech: Speech, folder: Path, out: Path, *, name: str, quant: str, original: Original | None
) -> dict[str, Any]:
    """The file in `folder`, which exists; what export.json says of it. `out` gets the f16 file if only the last step
    fails. Raises ModelError, and OSError."""
    path = folder / file_name(quant)
    plan = gguf_file.plan(policy, speech, name=name, original=original)
    if quant == Q4_K_M:
        source = folder / file_name(F16)
        plan.write(source, F16)
        try:
            llama.quantize(source, path, threads=torch.get_num_threads())
        except ModelError as error:
            out.mkdir(parents=True, exist_ok=True)
            kept = source.rename(out / source.name)
            raise ModelError(f"{error}; the f16 file is kept: {kept}") from None
        source.unlink()
    else:
        plan.write(path, quant)
    return {"quant": quant, "file": path.name, "bytes": path.stat().st_size, "tensors": gguf_file.tensor_types(path)}
