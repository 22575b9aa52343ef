"""`python -m reasoner data`: what it tells, which tokens are trained, and that no model is loaded for it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasoner.config import Config, Model
from reasoner.data.shown import MASKED, TRAINED, Piece, plain, shown, tokens
from reasoner.data.task import load_task
from reasoner.errors import ModelError
from reasoner.models.loading import load_tokenizer
from reasoner.models.sources import check_model

Conf = Callable[..., Config]
ROOT = Path(__file__).parents[2]
ROWS = [{"question": f"What is {i}+1?", "answer": str(i + 1)} for i in range(5)]


def lines_of(config: Config, tokenizer: Any, rows: Any = ROWS) -> list[list[Piece]]:
    return list(shown(load_task(config, tokenizer, rows), config))


def test_three_rows_with_their_trained_tokens(conf: Conf, tokenizer: Any) -> None:
    lines = lines_of(conf({"heldout": 0, "template": "chatml"}, ("sft", "grpo")), tokenizer)
    rows = [line for line in lines if any(piece.kind for piece in line)]
    assert len(rows) == 3  # GRPO's are the same
    assert plain(rows[0]) == "<|im_start|>user\nWhat is 0+1?<|im_end|>\n<|im_start|>assistant\n[[1<|im_end|>]]"
    task = load_task(conf({"heldout": 0, "template": "chatml"}, ("sft",)), tokenizer, ROWS)
    example = task.examples[0]
    assert [piece.kind for piece in rows[0]].count(TRAINED) == len(example.completion_ids) == 2
    assert [piece.kind for piece in rows[0]].count(MASKED) == len(example.prompt.token_ids)


def test_grpo_rows_are_shown_where_they_are_others(conf: Conf, tokenizer: Any) -> None:
    grpo = {"data": {"prompt": "Q: {question}"}}
    lines = [plain(line) for line in lines_of(conf({"heldout": 0}, ("sft", "grpo"), grpo=grpo), tokenizer)]
    assert "grpo, row 1 of 3: grpo:1, 15 masked, its answers are sampled, and trained" in lines
    assert lines[-2:] == ["Q: What is 2+1?", "answer: '3'"]


def test_counts_lengths_and_facts(conf: Conf, making: Any) -> None:
    rows = [*ROWS, ROWS[0], {"question": "", "answer": "1"}, {"question": "x" * 90, "answer": "1"}]
    config = conf({"heldout": 1, "template": "chatml", "max_prompt_tokens": 80, "system": "Add."}, ("sft", "evaluate"))
    lines = [plain(line) for line in lines_of(config, making(add_bos=True), rows)]
    assert lines[0].startswith("sft: ") and "prompts too long" in lines[0] + lines[1] and "1 empty" in lines[0]
    told = "\n".join(lines)
    assert "template: chat template chatml.jinja" in told
    assert "a prompt has 1 of <s> and ends in " in told
    assert "an answer ends in '<|im_end|>' (id 3)" in told
    assert "system: 'Add.'" in told
    assert "sft: tokens a worked answer: median 2, 99% 2, longest 2 of at most 512" in told


def test_a_set_is_shown_where_nothing_trains(conf: Conf, tokenizer: Any) -> None:
    lines = [plain(line) for line in lines_of(conf({"heldout": 2}, ("evaluate",)), tokenizer)]
    assert sum(line.startswith("heldout, row") for line in lines) == 2


def test_characters_of_several_tokens_are_one_piece(conf: Conf, tokenizer: Any) -> None:
    template = load_task(conf({"heldout": 0}, ("grpo",)), tokenizer, ROWS).template
    pieces = list(tokens(template, template.codec.encode("a🙂b"), MASKED))
    assert [piece.text for piece in pieces] == ["a", "🙂", "b"]
    assert plain(list(tokens(template, template.codec.encode("é")[:1], MASKED))) == "\ufffd"


def test_the_command_loads_a_tokenizer_and_no_model(tmp_path: Path) -> None:
    """Asked of broken rows and then of sound ones, by one process: its imports take 10 s."""
    rows = [
        {"question": f"{i}+1=", "answer": str(i + 1), "metadata": {"source_index": i, "expression": f"{i}+1"}}
        for i in range(40)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    paths = [tmp_path / "broken.jsonl", tmp_path / "rows.jsonl"]
    for path, text in zip(paths, (lines + "{", lines), strict=True):
        path.write_text(text)
    code = (
        "import sys\nfrom reasoner.__main__ import main\n"
        "for path in sys.argv[1:]:\n"
        "    code = main(['data', 'conf=tiny', f'data.path={path}', 'data.name=null', 'data.heldout=4'])\n"
        "    loaded = [name for name in ('reasoner.pipeline', 'reasoner.assembly') if name in sys.modules]\n"
        "    print(code, loaded, end='|')"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True)
    broken, sound = done.stdout.removesuffix("|").split("|", 1)
    assert broken == "2 []" and f"{paths[0]}:41: broken JSON" in done.stderr
    assert sound.endswith("0 []") and "template: plain text, no chat template" in sound
    assert "[[" in sound and "\x1b" not in sound


def test_a_folder_with_a_tokenizer_alone_is_enough(shared: Path, tmp_path: Path) -> None:
    folder = shared / "tokenizers/qwen2.5-instruct"
    assert not list(folder.glob("*.safetensors"))
    tokenizer = load_tokenizer(Model(name=str(folder)))
    assert tokenizer.eos_token_id is not None
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_tokenizer(Model(name=str(tmp_path)))
    with pytest.raises(ModelError, match=r"has no config\.json"):  # a run needs the weights, and says so first
        check_model(Model(name=str(folder)))
