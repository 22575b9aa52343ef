"""The model that every trainer of benchmarks/word_problems.py and beside_trl.py starts from: a base with the adapter of
an earlier SFT merged into it, saved as a bfloat16 folder.

    python -m benchmarks.word_model --gguf FILE --adapter DIR --out DIR

`--gguf` is the file that `make smol` fetches; `--adapter` holds adapter*.safetensors in peft's names, whose metadata
says the rank `r`; its alpha is twice that.
"""

import argparse
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from reasoner import config
from reasoner.compose import compose_conf
from reasoner.config import validate
from reasoner.data.templates import make_template
from reasoner.models.loading import load_model, load_tokenizer
from reasoner.models.policy import Policy
from reasoner.models.stops import stop_ids


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The adapter's tensors in float32, under the names that ours has, and its rank."""
    tensors: dict[str, Tensor] = {}
    rank = 0
    for path in sorted(folder.glob("adapter*.safetensors")):
        with safe_open(path, "pt") as file:
            rank = int(file.metadata()["r"])
            tensors |= {name.replace(".default.", ".policy."): file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118  (no mapping)
    if not tensors:
        raise SystemExit(f"{folder} holds no adapter*.safetensors")
    return tensors, rank


def merge(gguf: Path, adapter: Path, out: Path) -> None:
    """Write the merged model, its tokenizer and its stop ids."""
    tensors, rank = read_adapter(adapter)
    conf = validate(compose_conf("smol").values)
    described = config.Model(
        name=conf.model.name,
        gguf=config.Gguf(str(gguf)),
        dtype="float32",
        lora=config.Lora(r=rank, alpha=2 * rank),
        eos_token=conf.model.eos_token,
        pad_token=conf.model.pad_token,
    )
    tokenizer = load_tokenizer(described)
    policy = load_model(described, tokenizer, seed=0, device="cpu")
    policy.load_state(tensors)
    merged = cast(Any, policy.model).merge_and_unload().to(torch.bfloat16)
    merged.config.dtype = "bfloat16"
    template = make_template(tokenizer, conf.data)
    whole = Policy(merged, policy.family, revision=None)
    whole.save(out, tokenizer, stop_ids=stop_ids(tokenizer, template, merged))
    print(f"{out}: {sum(p.numel() for p in merged.parameters()) / 1e6:.1f}M parameters, adapter of rank {rank} merged")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    merge(given.gguf, given.adapter, given.out)
