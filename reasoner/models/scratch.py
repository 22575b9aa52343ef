"""A small Llama made from random numbers, and its tokenizer of one token a character: a whole run with nothing to
download.

Left out: merges, a chat template (use data.template=plain) and any other architecture.
"""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from reasoner.config import Scratch
from reasoner.errors import ModelError

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
MAX_POSITIONS = 1024  # tokens, where model.max_context does not say


def make_tokenizer(scratch: Scratch) -> PreTrainedTokenizerFast:
    """A tokenizer with the ids pad 0, eos 1, unknown 2, then `characters` in their order.

    A character that it can't say becomes `<unk>`, which a decode shows: it never vanishes. Raises ModelError if one
    stands twice.
    """
    twice = sorted({c for c in scratch.characters if scratch.characters.count(c) > 1})
    if twice or not scratch.characters:
        raise ModelError(
            f"model.scratch.characters={scratch.characters!r}: each character once, at least one; twice there: {twice}"
        )
    vocabulary = {token: index for index, token in enumerate((PAD, EOS, UNKNOWN, *scratch.characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def make_config(scratch: Scratch, max_context: int | None) -> LlamaConfig:
    """The Llama that `scratch` describes, embeddings tied. Raises ModelError if the sizes don't divide."""
    if (
        scratch.hidden_size % scratch.heads
        or scratch.heads % scratch.kv_heads
        or scratch.hidden_size // scratch.heads % 2
    ):
        raise ModelError(
            f"model.scratch: hidden_size={scratch.hidden_size} must be an even multiple of heads={scratch.heads}, "
            f"and heads a multiple of kv_heads={scratch.kv_heads}"
        )
    return LlamaConfig(
        vocab_size=3 + len(scratch.characters),
        hidden_size=scratch.hidden_size,
        intermediate_size=scratch.intermediate_size,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=scratch.kv_heads,
        max_position_embeddings=max_context or MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype=torch.float32,
    )
