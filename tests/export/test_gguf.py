"""to=gguf: llama.cpp loads what was written and says what the policy said; what it can't take is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import gguf as package
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reasoner import config
from reasoner.__main__ import main
from reasoner.chat import open_model
from reasoner.data.templates import make_template
from reasoner.errors import ModelError
from reasoner.export import again, gguf_file, gguf_layout, llama
from reasoner.export.gguf_file import F16, Q8_0, Speech
from reasoner.export.proof import Limit
from reasoner.export.request import Request
from reasoner.models import gguf, scratch
from reasoner.models.loading import load_merged
from reasoner.models.policy import Policy
from reasoner.rollout.engine import Sampling
from reasoner.rollout.hf import HfEngine
from reasoner.types import Prompt
from tests.models.tiny_models import VOCABULARY, make_policy

DATA = Path(__file__).parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data folder is not there")
needs_llama = pytest.mark.skipif(not llama.installed(), reason="no llama-cpp-python: make test builds it")
CHARACTERS = "".join(chr(code) for code in range(35, 35 + VOCABULARY - 3))
CHARACTERS_ALONE = scratch.make_tokenizer(
    config.Scratch(characters=CHARACTERS, hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=4)
)
GAPS = {F16: 0.005, Q8_0: 0.1}  # nats in the mean; measured 0.0003 to 0.0022 and 0.023 to 0.039
# What llama.cpp computes of each family: no window where it keeps none, attention scaled by the head.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * 2},
    "qwen3": {"use_sliding_window": False, "layer_types": ["full_attention"] * 2},
    "phi3": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "long_factor": [1.5, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3]}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", LLAMA3 | {"original_max_position_embeddings": 16}),
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}),
    "longrope": ("phi3", LONG | {"original_max_position_embeddings": 64, "factor": 2.0}),
}
TEXTS = ["a  2  soft drinks for$ 4 each", "  12345 +x\n\n\n\tdef f():", "naïve 你好 ½ ١٢", "it's I'LL 3.14e-5"]


def random_policy(family: str, **changes: Any) -> Policy:
    """Norms and biases too are random, so that one that is lost or shifted is seen."""
    policy = make_policy(family, **{**FAMILIES[family], **changes})
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in policy.base.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                weight.add_(torch.randn(weight.shape, generator=draw) * 0.3)
    return policy


def write(policy: Policy, folder: Path, kind: str = F16, tokenizer: Any = CHARACTERS_ALONE, **said: Any) -> Path:
    path = folder / f"{policy.family.name}-{kind}.gguf"
    speech = Speech(tokenizer, said.get("stops", (1,)), said.get("chat_template"))
    gguf_file.plan(policy, speech, name="tiny").write(path, kind)
    return path


def gap(policy: Policy, path: Path, *, context: int = 64, tokens: int = 50) -> float:
    """Mean distance of llama.cpp's logprobs from the policy's, nats."""
    ids = torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    engine = llama.LlamaEngine(path, str, max_context=context, threads=1)
    found = engine.score(ids)
    engine.close()
    return float((found - policy.score(ids)).abs().mean())


@needs_llama
@pytest.mark.parametrize("kind", [F16, Q8_0])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_every_family_as_we_do(family: str, kind: str, tmp_path: Path):
    policy = random_policy(family)
    path = write(policy, tmp_path, kind)
    assert gap(policy, path) < GAPS[kind]
    types = gguf_file.tensor_types(path)
    assert types["F32"] >= 5 and types[kind.upper()] > 5  # rows of 48 numbers have no whole blocks of 32: float16


@needs_llama
@pytest.mark.parametrize("rope", ROPES)
def test_llama_cpp_turns_positions_as_we_do(rope: str, tmp_path: Path):
    family, settings = ROPES[rope]
    settings = {"rope_theta": 10_000.0, **settings}
    policy = random_policy(family, rope_parameters=settings, max_position_embeddings=128)
    assert gap(policy, write(policy, tmp_path)) < GAPS[F16]
    plain = random_policy(family, max_position_embeddings=128)
    assert gap(policy, write(plain, tmp_path)) > 10 * GAPS[F16], "a scaling that changes nothing proves nothing"


@needs_llama
@pytest.mark.parametrize(
    ("family", "what"), [("llama", "interleave"), ("gemma2", "norm_offset"), ("gemma3_text", "windows")]
)
def test_a_wrong_layout_is_far_from_the_policy(family: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    policy = random_policy(family)
    if what == "interleave":
        monkeypatch.setattr(gguf_layout, "interleave", lambda weight, head_dim: weight)
    elif what == "norm_offset":
        monkeypatch.setattr(gguf_layout, "_arranged", lambda name, make, config, row: make)
    else:
        monkeypatch.setattr(package.GGUFWriter, "add_sliding_window", lambda self, value: None)
    assert gap(policy, write(policy, tmp_path)) > 10 * GAPS[F16]


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("granite", {}, "GGUF is not there for granite models (it is for llama, mistral,"),
        ("qwen3_moe", {}, "GGUF is not there for qwen3_moe"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "is dynamic"),
        ("qwen2", {"head_dim": 16}, "4 heads of 16 are not its width of 32"),
        ("gemma2", {"query_pre_attn_scalar": 4}, "its query_pre_attn_scalar is 4, not 8"),
        ("gemma2", {"tie_word_embeddings": False}, "its head is not the embedding"),
    ],
)
def test_what_llama_cpp_has_not_is_refused_before_anything_is_written(
    family: str, changes: dict[str, Any], said: str, tmp_path: Path
):
    policy = make_policy(family, **{**FAMILIES.get(family, {}), **changes})
    with pytest.raises(ModelError, match=re.escape(said)) as caught:
        write(policy, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_window_that_llama_cpp_has_not_bounds_the_context(tmp_path: Path):
    for family, changes, context in (("mistral", {"sliding_window": 5}, 5), ("gemma2", {}, 64), ("llama", {}, 64)):
        header = gguf.read_metadata(write(random_policy(family, **changes), tmp_path))
        assert gguf.context_length(header) == context


def test_weights_come_back_through_transformers(tmp_path: Path):
    policy = random_policy("llama")
    back = load_merged(write(policy, tmp_path), CHARACTERS_ALONE, dtype="float32", device=torch.device("cpu"))
    ids = list(range(3, 40))
    torch.testing.assert_close(back.score(ids), policy.score(ids), atol=5e-3, rtol=0)


def test_a_weight_that_float16_can_not_hold_is_refused(tmp_path: Path):
    policy = random_policy("llama")
    with torch.no_grad():
        policy.head_weight[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"output\.weight holds 1e\+05, which F16 can't"):
        write(policy, tmp_path)


def byte_fallback(scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece's are converted: pieces with marked spaces, and a token for every byte."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    lines = Path(__file__).read_text().splitlines()
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*base, *state["vocab"]]))}
    pairs = [tuple(merge) for merge in state["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "normalizer":
        marks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(marks)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def same_ids(tokenizer: Any, texts: list[str], folder: Path, **said: Any) -> bool:
    policy = make_policy("llama", vocab_size=len(tokenizer) + 3)  # rows beyond the last token
    stops = (tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else (0,)
    path = write(policy, folder, tokenizer=tokenizer, **{"stops": stops, **said})
    engine = llama.LlamaEngine(path, str, max_context=64, threads=1)
    same = [engine.tokenize(text) for text in texts] == tokenizer(texts).input_ids
    assert all(engine.ends(number) for number in stops) and engine.chat_template == said.get("chat_template")
    engine.close()
    return same


@needs_llama
@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalizer"])
def test_pieces_with_byte_fallback_are_cut_alike(scheme: str, tmp_path: Path):
    tokenizer = byte_fallback(scheme)
    lines = Path(__file__).read_text().splitlines()
    texts = [line for line in lines if line and line[0] != " " and "</s>" not in line]
    assert same_ids(tokenizer, [*texts, TEXTS[0], TEXTS[2]], tmp_path)
    if scheme in ("first", "never"):
        begun = [f"</s>{text}" for text in (*texts, *TEXTS[:3])]
        assert same_ids(tokenizer, begun, tmp_path, chat_template="{{ messages }}")


@needs_llama
@needs_data
@pytest.mark.parametrize("folder", ["smollm2-135m-instruct", "llama-3.2-instruct-hf", "qwen3"])
def test_real_tokenizers_cut_alike(folder: str, tmp_path: Path):
    assert same_ids(AutoTokenizer.from_pretrained(DATA / "tokenizers" / folder), TEXTS, tmp_path)


def test_an_unknown_tokenizer_is_named(tmp_path: Path):
    unknown = Tokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    unknown.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unknown, eos_token="</s>")
    with pytest.raises(ModelError, match=r"BPE, normalizer none, pre-tokenizer [0-9a-f]{12} \(.*Punctuation"):
        write(make_policy("llama", vocab_size=3), tmp_path, tokenizer=tokenizer)
    pieces = byte_fallback("normalizer")
    pieces.backend_tokenizer.pre_tokenizer = pre_tokenizers.Punctuation()
    with pytest.raises(ModelError, match=r"BPE, normalizer Prepend, Replace, pre-tokenizer .*Punctuation"):
        write(make_policy("llama", vocab_size=len(pieces)), tmp_path, tokenizer=pieces)
    with pytest.raises(ModelError, match="names 3 stop tokens and this run has 4"):
        write(random_policy("llama"), tmp_path, stops=(1, 3, 4, 5))
    assert not list(tmp_path.iterdir())


def told(folder: Path) -> dict:
    return json.loads((folder / "export.json").read_text())


@needs_llama
@pytest.mark.parametrize(("quant", "most"), [("f16", 0.002), ("q8_0", 0.02), ("q4_k_m", 0.08)])
def test_an_export_of_a_run_is_loaded_by_llama_cpp(quant: str, most: float, trained_run: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert main(["export", f"run={trained_run}", "to=gguf", f"quant={quant}", f"out={out}"]) == 0
    found = told(out)
    assert found["passed"] and found["loader"] == "llama.cpp" and found["differs"] == []
    assert found["mean_gap"] < most and found["sets"]["heldout"]["problems"] == 60
    assert sorted(path.name for path in out.iterdir()) == ["export.json", f"model-{quant}.gguf"]
    # Rows of 32 and 64 numbers have no blocks of 256: llama.cpp takes the nearest types of blocks of 32.
    assert {"f16": "F16", "q8_0": "Q8_0", "q4_k_m": "Q5_0"}[quant] in found["tensors"]
    if quant == "f16":
        says_the_same(trained_run, out / "model-f16.gguf")


def says_the_same(run: Path, path: Path) -> None:
    """The same prompt ids, greedy completions, logprobs and stop."""
    model = open_model(run, "export", [])
    model.policy.load_state(model.weights["export"])
    template = make_template(model.tokenizer, model.config.data)
    asked = [
        template.prompt(text) for text in ("12+3=", "4+4=", "9+81=", "7+7=", "5+6=", "1+9=", "3+3=", "2+5=", "8+9=")
    ]
    prompts = [Prompt(str(i), one.text, "", {}, one.token_ids) for i, one in enumerate(asked)]
    engine = llama.LlamaEngine(path, template.decode, max_context=32, threads=1)
    assert [engine.tokenize(prompt.text) for prompt in prompts] == [list(prompt.token_ids) for prompt in prompts]
    greedy = Sampling(0.0, 8, 1, model.stop_ids, 0)
    hf = HfEngine(model.policy, template.decode, max_context=32, max_sequences=4)
    ours, theirs = (one.generate(prompts, greedy, policy_step=0) for one in (hf, engine))
    for (a,), (b,) in zip(ours, theirs, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert a.sampling_logprobs == pytest.approx(b.sampling_logprobs, abs=0.01)
    assert any(one.finish_reason == "stop" for (one,) in theirs)
    engine.close()


@needs_llama
def test_an_adapter_is_merged_and_a_lost_one_is_seen(
    adapted_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    asked = ["export", f"run={adapted_run}", "to=gguf", "quant=f16", "problems=40"]
    assert main([*asked, f"out={tmp_path / 'a'}"]) == 0
    assert told(tmp_path / "a")["adapter_share"] == pytest.approx(1, abs=0.02)
    monkeypatch.setattr(gguf_file.merged, "merge", lambda base, adapter, scaling: base)
    assert main([*asked, f"out={tmp_path / 'b'}"]) == 3
    assert "not 100%: it is lost" in capsys.readouterr().err and not told(tmp_path / "b")["passed"]


def test_without_llama_cpp_transformers_loads_it_and_q4_k_m_is_refused(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(llama, "PACKAGE", "no_such_llama")
    assert main(["export", f"run={trained_run}", "to=gguf", f"out={tmp_path / 'a'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "needs the package 'llama-cpp-python': pip install -e '.[export]'" in error and "\n" not in error
    assert main(["export", f"run={trained_run}", "to=gguf", "quant=q8_0", f"out={tmp_path / 'b'}"]) == 0
    found = told(tmp_path / "b")
    assert found["passed"] and found["loader"] == "transformers" and found["mean_gap"] < 0.02
    assert "no llama.cpp tried it" in capsys.readouterr().out


@needs_llama
def test_the_f16_file_is_kept_where_quantizing_fails(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(llama, "FTYPE_Q4_K_M", 9999)
    out = tmp_path / "out"
    assert main(["export", f"run={trained_run}", "to=gguf", f"out={out}"]) == 2
    assert f"the f16 file is kept: {out / 'model-f16.gguf'}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["model-f16.gguf"]
    assert gguf.read_metadata(out / "model-f16.gguf")["general.architecture"] == "llama"


def test_limits_follow_what_rounds():
    def nats(quant: str, effect: float | None, rounded: bool) -> float | None:
        return Limit.of_gguf(quant, effect, rounded=rounded, original=False).nats

    assert nats(F16, None, False) == 0.01 and nats(F16, 0.02, True) == 0.05 and nats(Q8_0, None, True) == 0.15
    assert nats(F16, 4.0, False) == 1.0 and nats("q4_k_m", 0.1, False) == 0.5
    assert Limit.of_gguf(F16, 1.0, rounded=False, original=True).nats is None


def test_other_stop_ids_and_another_template_are_seen(tmp_path: Path):
    path = write(random_policy("llama"), tmp_path, stops=(1,), chat_template="{{ messages }}")
    of = again.Origin(Speech(CHARACTERS_ALONE, (1, 4), "{{ other }}"), torch.float32, torch.device("cpu"), None)
    request = Request(tmp_path, "gguf", tmp_path, quant=F16)
    subject: Any = type("Nobody", (), {"engine": None})()
    assert again.differs(request, path, subject, of, ["$"]) == [
        "its chat template is another",
        "it does not stop at $",
    ]
