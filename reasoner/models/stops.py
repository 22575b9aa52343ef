"""The ids that end a completion: one list for engines, evaluation and export. The first to come ends it, is part of it
and is trained.

Four places name such ids and disagree (Llama 3.2's configs say <|end_of_text|> while its chat turns close with
<|eot_id|>): all are taken.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from reasoner.data.templates import Template


def stop_ids(tokenizer: PreTrainedTokenizerBase, template: Template, model: Any) -> tuple[int, ...]:
    """The eos of tokenizer, config and generation_config, and the id that closes the template's turn; sorted.

    `model` is a transformers model or a PeftModel around one.
    """
    settings = (model.config, getattr(model, "generation_config", None))
    found = [
        tokenizer.eos_token_id,
        template.turn_end_id,
        *(getattr(place, "eos_token_id", None) for place in settings),
    ]
    ids = [one for entry in found for one in (entry if isinstance(entry, list | tuple) else [entry])]
    return tuple(sorted({int(one) for one in ids if one is not None}))
