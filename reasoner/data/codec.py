"""Text to ids and back, so that a row can't write a control token and nothing is lost unseen.

Row text goes through `guard` first: control tokens in it (`<|im_end|>`) are wrapped in marks, survive the chat template
like any text, and are then encoded as the characters they are. Text of the conf and of templates is trusted. Reasoning
tags are no control tokens: they end no turn, and rows with worked thoughts hold them. Left out: added tokens that the
tokenizer itself doesn't call special.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from reasoner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters, which Unicode keeps out of texts
REASONING_TAGS = ("<think>", "</think>")
NOTHING = "(?!)"
TEXTS_AT_ONCE = 4096

Ids = tuple[int, ...]


class Codec:
    """A tokenizer as we use it. Where a row holds a control token, a sentencepiece tokenizer may put one space more
    before the text that follows the template's own tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        self.special = {token.content: (number, token) for number, token in added.items() if token.special}
        self.control = re.compile(_one_of(text for text in self.special if text not in REASONING_TAGS))
        self.pieces = re.compile(f"{OPEN}(.*?){CLOSE}|({_one_of(self.special)})", re.DOTALL)

    def guard(self, text: str) -> str:
        """The text of a row with its control tokens marked as text. Raises DataError if it holds the marks itself."""
        if OPEN in text or CLOSE in text:
            raise DataError("the text holds U+FDD0 or U+FDD1, which are no characters: remove them")
        return self.control.sub(f"{OPEN}\\g<0>{CLOSE}", text)

    @staticmethod
    def unguard(text: str) -> str:
        """The text without the marks, as a person reads it."""
        return text.replace(OPEN, "").replace(CLOSE, "") if OPEN in text else text

    def encode(self, text: str) -> Ids:
        """The ids of guarded text and nothing else: no BOS is added."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of many guarded texts; where nothing is marked they are what the tokenizer makes of the text."""
        ids: list[Ids] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            some = texts[start : start + TEXTS_AT_ONCE]
            whole = self._tokenize([text if OPEN not in text else "" for text in some])
            ids += [
                self._encode_marked(text) if OPEN in text else plain for text, plain in zip(some, whole, strict=True)
            ]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens kept, no space tidied away: what rewards and people read."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast(str, text)

    def control_in(self, text: str) -> str | None:
        """The first control token in the text."""
        found = self.control.search(text)
        return found[0] if found else None

    def lost(self, text: str) -> set[str]:
        """The visible characters of the text that don't come back from decode(encode(text))."""
        back = set(unicodedata.normalize("NFKC", self.decode(self.encode(text))))
        there = unicodedata.normalize("NFKC", text)
        return {char for char in there if char not in back and char.isprintable() and not char.isspace()}

    def begins_with_bos(self) -> bool:
        """True if the tokenizer by itself puts its BOS before a text."""
        bos = self.tokenizer.bos_token_id
        own = cast(list[int], self.tokenizer("a")["input_ids"])
        return bos is not None and own[:1] == [bos] and self.encode("a")[:1] != (bos,)

    def _encode_marked(self, text: str) -> Ids:
        """Between two trusted control tokens the text is encoded in one go, so that no word is cut at a mark."""
        ids: list[int] = []
        waiting, end, swallows_space = "", 0, False
        for piece in self.pieces.finditer(text):
            before = text[end : piece.start()]
            waiting += before.lstrip() if swallows_space and not waiting else before
            end = piece.end()
            if piece[2] is None:
                waiting += piece[1]
                continue
            number, token = self.special[piece[2]]
            ids += self._tokenize([waiting.rstrip() if token.lstrip else waiting], split_special_tokens=True)[0]
            ids.append(number)
            waiting, swallows_space = "", token.rstrip
        rest = text[end:]
        waiting += rest.lstrip() if swallows_space and not waiting else rest
        return (*ids, *self._tokenize([waiting], split_special_tokens=True)[0])

    def _tokenize(self, texts: list[str], *, split_special_tokens: bool = False) -> list[Ids]:
        encoded = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False
        )
        return [tuple(ids) for ids in cast(list[list[int]], encoded["input_ids"])]


def _one_of(texts: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, texts), key=len, reverse=True)) or NOTHING
