"""Where a model comes from, and what can be said of it before any weight is loaded.

Three sources: a hub id or a local folder (safetensors only; no code of theirs is ever run), a GGUF file, and `scratch`.
`check_model` refuses what can't be trained, `context_limit` reads how long a sequence may be; both read a few
kilobytes. Left out: weights (loading.py).
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from transformers import AutoConfig, PretrainedConfig

from reasoner import config
from reasoner.errors import ModelError
from reasoner.models import gguf, nf4, scratch

HUB_TIMEOUT_S = 10
NEVER_ADAPTED = ("lm_head", "embed_tokens")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Source:
    """A folder or hub id, as transformers takes it: `from_pretrained(source.path, **source.options)`."""

    path: str
    revision: str | None  # the hub's commit; None for a folder
    local_only: bool

    @property
    def options(self) -> dict[str, object]:
        """What every `from_pretrained` of this source gets."""
        pinned = {"revision": self.revision} if self.revision else {}
        return {"trust_remote_code": False, "local_files_only": self.local_only, **pinned}


def check_model(model: config.Model) -> None:
    """Nothing, if this model can be trained as asked; else ModelError with the key to change. Loads no weights."""
    if model.quantize == "nf4":
        _check_nf4(model)
    if model.gguf and model.scratch:
        raise ModelError("model.gguf and model.scratch are both set: set one of them to null")
    if model.scratch and model.lora:
        raise ModelError("model.scratch has no trained base to adapt: set model.lora=null")
    if model.revision and (model.gguf or model.scratch or Path(model.name).expanduser().is_dir()):
        raise ModelError(
            f"model.revision={model.revision} names a commit on the hub, but the model is here: set it to null"
        )
    if model.lora is None and model.dtype == "bfloat16":
        raise ModelError(
            "model.dtype=bfloat16 without LoRA: bfloat16 weights swallow small steps (0.02 - 1e-5 stays 0.02). "
            "Set model.dtype=float32, or train an adapter: model.lora.r=32"
        )
    refused = sorted(set(model.lora.targets) & set(NEVER_ADAPTED)) if model.lora else []
    if refused:
        raise ModelError(
            f"model.lora.targets has {', '.join(refused)}: an adapter there unties the head. Remove it from the list"
        )
    if model.scratch:
        scratch.make_tokenizer(model.scratch)
    context_limit(model)


def _check_nf4(model: config.Model) -> None:
    if not torch.cuda.is_available():
        raise ModelError("model.quantize=nf4 needs a CUDA GPU: set model.quantize=none")
    if model.scratch or model.lora is None:
        raise ModelError(
            "model.quantize=nf4 freezes the base, and there is no adapter to train: set model.lora.r=32, or "
            "model.quantize=none"
        )
    if model.dtype == "float32":
        raise ModelError("model.quantize=nf4 computes in bfloat16: set model.dtype=auto")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ModelError(f"model.quantize=nf4 needs bfloat16, which {torch.cuda.get_device_name()} has not")
    nf4.check_installed("model.quantize=nf4")


def context_limit(model: config.Model) -> int | None:
    """The longest sequence (prompt + completion) in tokens, from the config alone; None if the model does not say.

    Positions past it run without an error and mean nothing. Raises ModelError if model.max_context asks for more.
    """
    made_for = (
        gguf.context_length(gguf.read_metadata(gguf.find(model.gguf))) if model.gguf else _positions(read_config(model))
    )
    if model.max_context and made_for and model.max_context > made_for:
        raise ModelError(
            f"model.max_context={model.max_context} is more than the {made_for} tokens that {model.name} was made for"
        )
    return model.max_context or made_for


def _positions(hf_config: PretrainedConfig) -> int | None:
    return getattr(hf_config, "max_position_embeddings", None)


def read_config(model: config.Model) -> PretrainedConfig:
    """The text model's config, of any source but GGUF. Raises ModelError as `locate` does."""
    if model.scratch:
        return scratch.make_config(model.scratch, model.max_context)
    source = locate(model)
    try:
        whole = AutoConfig.from_pretrained(source.path, **source.options)
        text = whole.get_text_config()
        if hasattr(whole, "quantization_config"):  # a composite one says it for all of its parts
            text.quantization_config = whole.quantization_config
        return text
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(model, error) from None


@lru_cache(maxsize=8)
def locate(model: config.Model) -> Source:
    """Where the files of a model are that is neither GGUF nor scratch.

    A local folder comes before the hub. If the hub can't be reached, what was downloaded before is used. Raises
    ModelError if a folder has no safetensors, and if the hub doesn't know the id or won't give it.
    """
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return Source(str(folder), None, local_only=True)
    name, at = model.name, f" at revision {model.revision}" if model.revision else ""
    try:
        info = HfApi().model_info(name, revision=model.revision, timeout=HUB_TIMEOUT_S)
    except HFValidationError:
        raise ModelError(f"model.name={name} is neither a folder here nor a hub id (ORGANISATION/MODEL)") from None
    except RevisionNotFoundError:
        raise ModelError(
            f"model.name={name} has no revision {model.revision}: look at https://huggingface.co/{name}"
        ) from None
    except GatedRepoError:
        raise ModelError(_gated(name)) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"the hub has no model '{name}' that you may see: check the name, or set HF_TOKEN if it is private"
        ) from None
    except (httpx.HTTPError, OSError):
        return Source(name, model.revision, local_only=True)
    if not any(sibling.rfilename.endswith(".safetensors") for sibling in info.siblings or ()):
        raise ModelError(
            f"model.name={name}{at} has no .safetensors file; pickled weights are never loaded. Choose another"
        )
    return Source(name, info.sha, local_only=False)


def locate_tokenizer(model: config.Model) -> Source:
    """Where the tokenizer of such a model is: as `locate`, but a local folder may hold a tokenizer and no weights."""
    folder = Path(model.name).expanduser()
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if not weights and any((folder / name).is_file() for name in TOKENIZER_FILES):
        return Source(str(folder), None, local_only=True)
    return locate(model)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.name={folder} has no config.json: name the folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        pickled = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
        found = f"only {pickled}; pickled weights are never loaded" if pickled else "no weights"
        raise ModelError(f"model.name={folder} has {found}: convert them to .safetensors (save_pretrained does)")


def unreadable(model: config.Model, error: Exception) -> ModelError:
    """The one line to say when transformers could not read a model's files."""
    causes = [error, error.__cause__, getattr(error.__cause__, "__cause__", None)]
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return ModelError(_gated(model.name))
    if not Path(model.name).expanduser().is_dir() and locate(model).local_only:
        return ModelError(
            f"the hub can't be reached and {model.name} was not downloaded before: connect once, or put the model "
            "into a folder and set model.name=FOLDER"
        )
    return ModelError(f"model.name={model.name} can't be read: {first_line(error)}")


def first_line(error: Exception) -> str:
    """What another library's error says, without the pages that follow."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _gated(name: str) -> str:
    return f"model.name={name} is gated: accept its licence at https://huggingface.co/{name} and set HF_TOKEN"
