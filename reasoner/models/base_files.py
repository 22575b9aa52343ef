"""The weights in a model's safetensors files, one at a time, under the names of the text model alone.

No more than one weight is read into memory at once: the files are mapped, not loaded. Left out: GGUF (weights.py) and
pickled files, which are never opened.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from reasoner.errors import ModelError
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
    paths = _files(_folder(source))
    place: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, framework="pt", device="cpu") as file:
            place |= dict.fromkeys(file.keys(), path)
    packed = {name.split(nf4.STATE_KEY)[0] for name in place if nf4.STATE_KEY in name}
    for path in paths:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in sorted(file.keys()):
                if name in packed:
                    yield text_name(name), nf4.read_packed(name, file.get_tensor(name), _companions(name, place))
                elif f"{name.rpartition('.weight.')[0]}.weight" not in packed:
                    yield text_name(name), file.get_tensor(name)


def matrices(source: Source) -> Callable[[str], Tensor]:
    """The weight of a module of the text model by the module's name, read when it is asked for, on the CPU.

    Raises ModelError if the files hold it quantized, or not at all.
    """
    place: dict[str, tuple[Path, str]] = {}
    for path in _files(_folder(source)):
        with safe_open(path, framework="pt", device="cpu") as file:
            place |= {text_name(name): (path, name) for name in sorted(file.keys())}

    def matrix(module: str) -> Tensor:
        path, name = place.get(f"{module}.weight", (None, ""))
        if path is None:
            raise ModelError(f"{source.path} holds no weight of {module}")
        with safe_open(path, framework="pt", device="cpu") as file:
            value = file.get_tensor(name)
        if not value.is_floating_point():
            raise ModelError(
                f"{source.path} is quantized itself, so there is no 16-bit original: leave out base=original"
            )
        return value

    return matrix


def _companions(name: str, place: Mapping[str, Path]) -> dict[str, Tensor]:
    """What describes a packed weight, by what follows its name; it may lie in another file than the weight."""
    found: dict[str, Tensor] = {}
    for other in (other for other in place if other.startswith(f"{name}.")):
        with safe_open(place[other], framework="pt", device="cpu") as file:
            found[other.removeprefix(f"{name}.")] = file.get_tensor(other)
    return found


def _folder(source: Source) -> Path:
    if Path(source.path).is_dir():
        return Path(source.path)

    def fetch(patterns: list[str]) -> Path:
        how = {"revision": source.revision, "local_files_only": source.local_only}
        return Path(snapshot_download(source.path, allow_patterns=patterns, **how))

    folder = fetch([INDEX, WHOLE])  # then only what the index names: some repositories hold the model twice
    if (folder / INDEX).is_file():
        return fetch([path.name for path in _files(folder)])
    return folder if (folder / WHOLE).is_file() else fetch(["*.safetensors"])


def _files(folder: Path) -> list[Path]:
    """The files that make one model: some repositories hold it twice, in another layout too."""
    index = folder / INDEX
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({folder / name for name in named})
    whole = folder / WHOLE
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def text_name(name: str) -> str:
    """The name of a parameter or module of the whole model, as the text model alone has it."""
    name += "."
    for pattern, replacement in TEXT_PART.items():
        name = re.sub(pattern, replacement, name)
    return name.removesuffix(".")
