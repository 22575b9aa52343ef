"""The verb export: what it writes loads elsewhere and says what the policy said, and its proof sees what does not."""

import json
import re
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasoner.__main__ import main
from reasoner.chat import open_model
from reasoner.errors import ModelError
from reasoner.export import command
from reasoner.export.proof import adapter_share
from reasoner.models import adapters, merged
from reasoner.models.base_files import INDEX
from tests.models.tiny_models import make_policy

ROOT = Path(__file__).parents[2]
QUESTIONS = ("1 + 2=", "9 + 5=", "7 + 8=")
COMMANDS = re.findall(r"^python -m reasoner (export .*?)(?: +#.*)?$", (ROOT / "docs/export.md").read_text(), re.M)


def told(folder: Path) -> dict:
    return json.loads((folder / "export.json").read_text())


def of_the_run(run: Path, weights: str) -> Tensor:
    """Our logprobs of the questions' tokens by one of the run's weights."""
    model = open_model(run, weights, [])
    model.policy.load_state(model.weights[weights])
    return torch.cat([model.policy.score(model.tokenizer(text).input_ids) for text in QUESTIONS])


@torch.no_grad()
def of_transformers(model: torch.nn.Module, folder: Path) -> Tensor:
    """transformers' own logprobs of the same tokens."""
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), []
    for text in QUESTIONS:
        ids = torch.tensor([tokenizer(text).input_ids])
        logits = model(input_ids=ids).logits[0].float()
        rows.append(logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(rows)


def test_an_adapter_loads_in_peft_with_the_same_logprobs(adapted_run: Path, trained_run: Path, tmp_path: Path):
    out = tmp_path / "adapter"
    assert main(["export", f"run={adapted_run}", "to=adapter", f"out={out}", "checkpoint=00-sft-000006"]) == 0
    base = AutoModelForCausalLM.from_pretrained(trained_run / "model")
    ours, plain = of_the_run(adapted_run, "00-sft-000006"), of_transformers(base, out)
    with warnings.catch_warnings():  # peft 0.21 asks transformers by a name that it deprecates
        warnings.simplefilter("ignore", FutureWarning)
        theirs = of_transformers(PeftModel.from_pretrained(base, str(out)), out)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert (ours - plain).abs().mean() > 0.01, "an adapter that changes nothing proves nothing"
    found = told(out)
    assert found["passed"] and found["weights"] == "00-sft-000006" and found["mean_gap"] < 1e-5
    assert found["sets"]["heldout"]["policy"] == found["sets"]["heldout"]["artefact"]


@pytest.mark.parametrize(("dtype", "gap"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_a_merged_model_loads_in_transformers_from_its_shards(
    dtype: str, gap: float, adapted_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(merged, "SHARD_BYTES", 12_000)
    out = tmp_path / "merged"
    assert main(["export", f"run={adapted_run}", "to=merged", f"dtype={dtype}", f"out={out}"]) == 0
    files = sorted(out.glob("*.safetensors"))
    places = json.loads((out / INDEX).read_text())["weight_map"]
    assert len(files) > 2 and {path.name for path in files} == set(places.values())
    kept = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert kept.keys() == places.keys() and {str(t.dtype) for t in kept.values()} == {f"torch.{dtype}"}
    model, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(of_transformers(model, out), of_the_run(adapted_run, "export"), atol=gap, rtol=0)
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert tuple(stops) == open_model(adapted_run, None, []).stop_ids
    found = told(out)
    assert found["passed"] and found["dtype"] == dtype and found["mean_gap"] < gap
    assert found["adapter_share"] == pytest.approx(1, abs=0.1) and found["sets"]["heldout"]["problems"] == 60


def test_a_whole_model_is_copied(trained_run: Path, tmp_path: Path):
    out = tmp_path / "whole"
    assert main(["export", f"run={trained_run}", "to=merged", f"out={out}"]) == 0
    before, after = load_file(trained_run / "model/model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert told(out)["mean_gap"] == 0 and "adapter_share" not in told(out)


def test_a_tied_head_stays_tied_and_experts_are_refused(tmp_path: Path):
    merged.write(make_policy("qwen3"), tmp_path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="qwen3_moe, whose experts"):
        merged.write(make_policy("qwen3_moe"), tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_proof_sees_that_the_scaling_was_forgotten(
    dtype: str, adapted_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(adapters, "scaling", lambda model: 1.0)
    out = tmp_path / "merged"
    assert main(["export", f"run={adapted_run}", "to=merged", f"dtype={dtype}", f"out={out}"]) == 3
    error = capsys.readouterr().err
    assert "the export is not the policy: its logprobs are" in error and "not 100%" in error
    assert not told(out)["passed"] and told(out)["adapter_share"] < 0.6


def test_the_proof_sees_other_stop_ids_and_a_lost_matrix(
    adapted_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    save, beside = adapters.save, command.save_beside

    def lossy(model: PeftModel, folder: Path) -> None:
        save(model, folder)
        tensors = load_file(folder / adapters.WEIGHTS_FILE)
        save_file({name: t * ("layers.1" in name) for name, t in tensors.items()}, folder / adapters.WEIGHTS_FILE)

    monkeypatch.setattr(adapters, "save", lossy)
    assert main(["export", f"run={adapted_run}", "to=adapter", f"out={tmp_path / 'a'}"]) == 3
    assert "its logprobs are" in capsys.readouterr().err
    monkeypatch.setattr(command, "save_beside", lambda folder, tokenizer, stops: beside(folder, tokenizer, (5,)))
    assert main(["export", f"run={adapted_run}", "to=merged", f"out={tmp_path / 'b'}"]) == 3
    assert capsys.readouterr().err.strip().endswith("to look at, not to use")
    assert told(tmp_path / "b")["differs"] == ["its generation_config stops at [5], not at [1]"]


def test_the_share_of_an_adapter_is_seen_below_the_rounding():
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(20_000, generator=draw)
    moved, noise = (torch.randn(20_000, generator=draw) * size for size in (0.01, 0.03))
    whole, error = adapter_share(base, base + moved, base + moved + noise)
    half, _ = adapter_share(base, base + moved, base + moved / 2 + noise)
    assert whole == pytest.approx(1, abs=4 * error) and half == pytest.approx(0.5, abs=4 * error) and error < 0.03


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["to=adapter"], "run= is missing"),
        (["run={tmp}/none", "to=adapter"], "there is no run"),
        (["run={run}"], "to= is missing"),
        (["run={run}", "to=onnx"], "to=onnx is unknown; there are: adapter, merged, gguf, ollama, hub"),
        (["run={run}", "to=gguf", "quant=q8_0", "dtype=float32"], "dtype= is not for to=gguf but for to=merged"),
        (["run={run}", "to=merged", "quant=q8_0"], "quant= is not for to=merged but for to=gguf|ollama"),
        (["run={run}", "to=gguf", "quant=q4"], "quant=q4 is unknown"),
        (["run={run}", "to=adapter", "out={run}"], "exists and isn't empty"),
        (["run={whole}", "to=adapter", "out={tmp}/new"], "to=merged writes it"),
        (["run={run}", "to=merged", "base=original"], "for runs on an NF4 base"),
        (["run={run}", "to=merged", "checkpoint=bset"], "checkpoint=bset: this run has none: did you mean 'best'"),
        (["run={run}", "to=merged", "checkpoint=base"], "name one checkpoint that was trained"),
        (["run={run}", "to=adapter", "dtype=float32"], "dtype= is not for to=adapter but for to=merged"),
        (["run={run}", "to=merged", "problems=none"], "give how many"),
        (["run={untrained}", "to=merged"], "nothing was trained yet"),
    ],
)
def test_what_is_asked_wrong_is_one_line(
    arguments: list[str],
    said: str,
    adapted_run: Path,
    trained_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    (tmp_path / "untrained").mkdir()
    shutil.copy(adapted_run / "config.yaml", tmp_path / "untrained")
    names = {"run": adapted_run, "whole": trained_run, "tmp": tmp_path, "untrained": tmp_path / "untrained"}
    assert main(["export", *(text.format(**names) for text in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error
    assert not (adapted_run / "exports").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(
    command: str, adapted_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    shutil.copytree(adapted_run, tmp_path / "outputs/tiny/DATE_TIME")
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 5 and main([*shlex.split(command), "problems=10"]) == 0
    verified = told(next(tmp_path.glob("outputs/tiny/DATE_TIME/exports/*")))["verified"]
    assert verified == ("verify=false" not in command)
    assert ("not verified" in capsys.readouterr().out) != verified
