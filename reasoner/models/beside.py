"""What goes beside a model's weights, so that others ask and stop as we do."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase


def save_beside(folder: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...]) -> None:
    """The tokenizer, and a generation_config.json with the stop ids (none: the tokenizer's eos)."""
    tokenizer.save_pretrained(folder)
    # Ids alone: the checkpoint's sampling defaults (a repetition penalty, a top-k) are not what we trained or scored.
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(stop_ids) or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
