"""A tokenizer as GGUF describes it, so that llama.cpp cuts text into the same tokens.

Three kinds: byte-level BPE whose pre-tokenizer is one that models/gguf.py knows; BPE with byte fallback, as made from
SentencePiece files; and one token a character (model.scratch). Others are refused by name. Left out: normalizers, which
llama.cpp has not (Qwen's NFC changes decomposed text alone).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, models

from reasoner.data.codec import Codec
from reasoner.errors import ModelError
from reasoner.export.gguf_layout import REMEDY
from reasoner.models import gguf

SPACE = "\u2581"  # SentencePiece's mark for a space
BYTES, PIECES, CHARACTERS = "gpt2", "llama", "t5"  # tokenizer.ggml.model
IGNORES_MERGES = ("llama-bpe",)  # whole words of the vocabulary come before merges
BYTE_TOKENS = 256  # llama.cpp ends the process at a byte that has none
ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The file's tokens, a type each, and how text is cut into them."""

    kind: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    space_prefix: bool = False


def vocabulary(tokenizer: Any, *, rows: int, chat: bool) -> Vocabulary:
    """The fast tokenizer's `rows` tokens, as many as the embedding has. `chat`: prompts begin with control tokens.

    Raises ModelError for a tokenizer of another kind, naming its pre-tokenizer.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, pre = state["model"], _known_pre(state["pre_tokenizer"])
    tokens, types = _tokens(tokenizer, state, rows)
    kind, falls_back = model["type"], bool(model.get("byte_fallback"))
    steps = _normalizers(state["normalizer"])
    marks_spaces = steps <= {"Prepend", "Replace"} and _cuts_at_spaces(state["pre_tokenizer"])
    if kind == "BPE" and falls_back and marks_spaces and types.count(TokenType.BYTE) == BYTE_TOKENS:
        plain = [
            text.replace(SPACE, " ") if type_ in ADDED else text for text, type_ in zip(tokens, types, strict=True)
        ]
        scores = _scores(tokens, model["merges"])
        return Vocabulary(
            PIECES, "default", tuple(plain), types, scores=scores, space_prefix=_space_prefix(tokenizer, chat)
        )
    if kind == "BPE" and pre and steps <= {"NFC"} and bool(model.get("ignore_merges")) == (pre in IGNORES_MERGES):
        return Vocabulary(BYTES, pre, tokens, types, merges=tuple(_pair(merge) for merge in model["merges"]))
    normal = [text for text, type_ in zip(tokens, types, strict=True) if type_ == TokenType.NORMAL]
    if kind == "WordLevel" and not state["normalizer"] and all(len(text) == 1 and text != SPACE for text in normal):
        shown = tuple(SPACE if text == " " else text for text in tokens)
        return Vocabulary(CHARACTERS, "default", shown, types, scores=(-1.0,) * rows)
    text = json.dumps(state["pre_tokenizer"], sort_keys=True)
    raise ModelError(
        f"GGUF is not there for this tokenizer: {kind}, normalizer {', '.join(sorted(steps)) or 'none'}, pre-tokenizer "
        f"{hashlib.sha256(text.encode()).hexdigest()[:12]} ({text[:200]}), which is none of "
        f"{', '.join(gguf.PRE_TOKENIZERS)}: {REMEDY}"
    )


def _known_pre(state: Any) -> str | None:
    """llama.cpp's name of a pre-tokenizer, by what it does and not by the model's name."""
    for name in gguf.PRE_TOKENIZERS:
        known = Tokenizer(models.BPE())
        known.pre_tokenizer = gguf.pre_tokenizer(name)
        if _plain(json.loads(known.to_str())["pre_tokenizer"]) == _plain(state):
            return name
    return None


def _cuts_at_spaces(state: Any) -> bool:
    """Whether a pre-tokenizer cuts text nowhere else: SentencePiece's mark, or Gemma's Split, or none at all."""
    return not state or state["type"] == "Metaspace" or state.get("pattern") == {"String": " "}


def _normalizers(state: Any) -> set[str]:
    """The kinds of a normalizer's steps."""
    if not state:
        return set()
    inner = state.get("normalizers")
    return {state["type"]} if inner is None else {kind for one in inner for kind in _normalizers(one)}


def _plain(state: Any) -> Any:
    """Without the offsets' settings, which change no token."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items() if key != "trim_offsets"}
    return [_plain(value) for value in state] if isinstance(state, list) else state


def _tokens(tokenizer: Any, state: dict[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Every row's text and type; rows beyond the tokenizer's last token are called unused."""
    added = {token["id"]: token["special"] for token in state["added_tokens"]}
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    special, unknown, has_bytes = (
        set(tokenizer.all_special_ids),
        tokenizer.unk_token_id,
        state["model"].get("byte_fallback"),
    )

    def type_of(number: int) -> TokenType:
        if number not in texts:
            return TokenType.UNUSED
        if has_bytes and _is_byte(texts[number]):
            return TokenType.BYTE
        if number == unknown and number not in ends:
            return TokenType.UNKNOWN
        if number in added or number in special:
            return TokenType.CONTROL if added.get(number, True) else TokenType.USER_DEFINED
        return TokenType.NORMAL

    tokens = tuple(texts.get(number, f"[PAD{number}]") for number in range(rows))
    return tokens, tuple(int(type_of(number)) for number in range(rows))


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _pair(merge: str | Sequence[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _scores(tokens: Sequence[str], merges: Sequence[str | Sequence[str]]) -> tuple[float, ...]:
    """SentencePiece joins the neighbours whose whole has the highest score, BPE those of the first merge: the score is
    the rank, negated. What no merge makes has the lowest."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    last = -float(len(merges))
    return tuple(-float(ranks[token]) if token in ranks else last for token in tokens)


def _space_prefix(tokenizer: Any, chat: bool) -> bool:
    """Whether text gets a space in front: where prompts begin with control tokens, the text that follows one."""
    begins = tokenizer.eos_token if chat else ""
    ids = tokenizer(f"{begins}a", add_special_tokens=False)["input_ids"][1 if chat else 0 :]
    return tokenizer.convert_ids_to_tokens(ids)[0].startswith(SPACE)


def write_tokens(
    writer: GGUFWriter,
    found: Vocabulary,
    tokenizer: Any,
    stops: Sequence[int],
    chat_template: str | None,
) -> None:
    """The vocabulary with its special ids, the chat template that prompts were made with, and every stop id.

    Raises ModelError for more stop ids than the format has names for.
    """
    writer.add_tokenizer_model(found.kind)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores:
        writer.add_token_scores(found.scores)
    if found.kind == BYTES:
        writer.add_token_merges(found.merges)
    else:
        writer.add_add_space_prefix(found.space_prefix)
    writer.add_add_bos_token(Codec(tokenizer).begins_with_bos())
    writer.add_add_eos_token(False)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if found.kind != BYTES and tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    places = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    ordered = sorted(stops, key=lambda number: number != tokenizer.eos_token_id)
    if len(ordered) > len(places):
        raise ModelError(
            f"GGUF names {len(places)} stop tokens and this run has {len(ordered)}: "
            f"{tokenizer.convert_ids_to_tokens(ordered)}: {REMEDY}"
        )
    for add, number in zip(places, ordered, strict=False):
        add(number)
    if chat_template:
        writer.add_chat_template(chat_template)
