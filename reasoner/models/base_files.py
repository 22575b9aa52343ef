"""The weights in a model's safetensors files, one at a time, under the names of the text model alone.

No more than one weight is read into memory at once: the files are mapped, not loaded. Left out: GGUF (weights.py) and
pickled files, which are never opened.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from reasoner.models import nf4
from reasoner.models.sources import Source

# The names of a composite (vision) checkpoint's text part, in both spellings there are -> those of the text model
# alone.
TEXT_PART = {
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(model\.language_model|language_model\.model)\.": "model.",
}
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


def read(source: Source) -> Iterator[tuple[str, "Tensor | nf4.Packed"]]:
    """(name, value) of every weight, on the CPU; what bitsandbytes quantized comes packed. Raises what safetensors and
    the hub raise where a file can't be read."""
    for path in _files(_folder(source)):
        with safe_open(path, framework="pt", device="cpu") as file:
            names = set(file.keys())
            packed = {name.split(nf4.STATE_KEY)[0] for name in names if nf4.STATE_KEY in name}
            for name in sorted(names):
                if name in packed:
                    companions = {
                        other.removeprefix(f"{name}."): file.get_tensor(other)
                        for other in names
                        if other.startswith(f"{name}.")
                    }
                    yield _text_name(name), nf4.read_packed(name, file.get_tensor(name), companions)
                elif f"{name.rpartition('.weight.')[0]}.weight" not in packed:
                    yield _text_name(name), file.get_tensor(name)


def _folder(source: Source) -> Path:
    if Path(source.path).is_dir():
        return Path(source.path)
    files = ["*.safetensors", INDEX]
    return Path(
        snapshot_download(
            source.path, revision=source.revision, local_files_only=source.local_only, allow_patterns=files
        )
    )


def _files(folder: Path) -> list[Path]:
    """The files that make one model: some repositories hold it twice, in another layout too."""
    index = folder / INDEX
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({folder / name for name in named})
    whole = folder / WHOLE
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _text_name(name: str) -> str:
    for pattern, replacement in TEXT_PART.items():
        name = re.sub(pattern, replacement, name)
    return name
