"""The verb chat on a trained run: it says what the run's evaluation heard, streams what generate gives, and scores."""

import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from reasoner.__main__ import main
from reasoner.chat import Chat, Model, Shown, as_asked, chat, open_model
from reasoner.config import Data
from reasoner.data.templates import make_template
from reasoner.rollout.engine import Sampling
from reasoner.types import Prompt

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(trained_run: Path) -> Model:
    return open_model(trained_run, None, [])


def talk(run: Path, *lines: str, arguments: tuple[str, ...] = ()) -> str:
    out = io.StringIO()
    chat([f"run={run}", *arguments], lines=lines, stream=out)
    return out.getvalue()


def heard(run: Path, row: str, *, right: bool) -> dict:
    """A problem of the run's own evaluation, with the greedy answer that it got there."""
    lines = [json.loads(line) for line in (run / "eval_problems.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["row"] == row and line["right"] == right and not line["cut"])


def test_it_says_what_the_evaluation_heard_and_scores_it(trained_run: Path):
    one, other = heard(trained_run, "export", right=True), heard(trained_run, "export", right=False)
    said = talk(
        trained_run,
        one["prompt"].removesuffix("="),
        f"/reward {one['answer']}",
        other["prompt"].removesuffix("="),
        f"/reward {other['answer']}",
        "/quit",
        "never asked",
    ).splitlines()
    assert said[1:3] == [one["text"], f"({one['tokens']} tokens)"]
    assert said[3].startswith("export: reward 1.00: accuracy 1.00")
    assert said[4] == other["text"] and said[6].startswith("export: reward 0.00: accuracy 0.00")
    assert len(said) == 7


def test_base_and_trained_answer_side_by_side(trained_run: Path):
    one = heard(trained_run, "export", right=True)
    said = talk(trained_run, "/both", one["prompt"].removesuffix("="), f"/reward {one['answer']}", "/both", "1 + 1")
    head = next(line for line in said.splitlines() if "base" in line and "export" in line and "┃" in line)
    assert head.index("base") < head.index("export")
    assert re.search(rf"│ =+ +│ {re.escape(one['text'])} +│", said), "the base repeats its last character"
    assert "base: reward 0.00" in said and "export: reward 1.00" in said
    assert "now export answers alone" in said and said.rstrip().splitlines()[-1].endswith(("token)", "tokens)"))


def test_the_same_question_after_new_and_what_is_no_command(trained_run: Path):
    said = talk(trained_run, "2 + 3", "/new", "2 + 3", "/nwe", "/think", "/reward").splitlines()
    assert said[1:3] == said[4:6] and said[3] == "what was said is forgotten"
    assert "there is no such command; there are" in said and "  /new             forget what was said" in said
    assert said[-2] == "export: no thoughts" and "/reward ANSWER" in said[-1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_tokens_are_those_of_generate(model: Model, temperature: float):
    model.policy.load_state(model.weights["export"])
    model.engine.load_adapter({}, 1)
    for number, text in enumerate(("1 + 2=", "9 - 5=", "7 + 8=")):
        ready = model.template.prompt(text)
        prompt = Prompt(f"chat:{number}", text, "", {}, ready.token_ids)
        sampling = Sampling(temperature, 8, 1, model.stop_ids, 3)
        ((whole,),) = model.engine.generate([prompt], sampling, policy_step=1)
        assert tuple(model.engine.stream(prompt, sampling, policy_step=1)) == whole.token_ids


def shown(pieces: list[str], prefill: str = "") -> str:
    out, text = io.StringIO(), ""
    screen = Shown(out, prefill, live=True)
    for piece in pieces:
        text += piece
        screen.update(text)
    screen.end(text, len(pieces), cut=False)
    return out.getvalue()


def test_half_a_character_waits_for_its_other_bytes():
    out = io.StringIO()
    screen = Shown(out, "", live=True)
    for text in ("caf\ufffd", "caf\u00e9"):
        screen.update(text)
    screen.end("caf\u00e9", 2, cut=True)
    assert out.getvalue() == "caf\u00e9\n(2 tokens, cut at the limit: max_tokens=N sets another)\n"


def test_thoughts_are_folded_and_the_answer_streams():
    pieces = ["<th", "ink>3 and", " 4 are", " 7</thi", "nk>\n", "It is", " 7."]
    assert shown(pieces) == "(thinking ... /think shows it)\nIt is 7.\n(7 tokens)\n"
    assert shown(pieces[:2]) == "(thinking ...)\n(2 tokens)\n"
    assert shown(["3 and 4", "</think>", "7"], prefill="<think>\n") == "(thinking ... /think shows it)\n7\n(3 tokens)\n"
    assert shown(["<"]) == "<\n(1 token)\n" and "\x1b" not in shown(["\x1b[2J"])


def test_a_question_is_put_as_the_run_put_it():
    assert as_asked("{question}\nUse \\boxed{{}}.[[ {hint}]]", "2+2?") == "2+2?\nUse \\boxed{}."
    assert as_asked("{metadata[expression]}=", "1 + 1") == "1 + 1="
    assert as_asked("{left} + {right}=", "1 + 1") == "1 + 1", "two columns can't be typed as one"


def test_turns_go_along_without_thoughts_and_each_speaker_remembers_its_own(model: Model):
    source = (
        "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    model.tokenizer.chat_template = source
    data = Data(prompt="Q {question}", template="model", system="Be short")
    template = make_template(model.tokenizer, data)
    talking = Chat(replace(model, data=data, template=template), Sampling(0.0, 4, 1, model.stop_ids, 0), io.StringIO())
    talking.asked = ["1+1", "2+2"]
    talking.answers = {"base": ["", "five"], "export": ["two", "four"]}
    said = {name: talking._prompt(name, "3+3") for name in ("base", "export")}
    assert [(turn["role"], turn["content"]) for turn in said["export"].messages] == [
        ("system", "Be short"),
        *(("user", "Q 1+1"), ("assistant", "two"), ("user", "Q 2+2"), ("assistant", "four"), ("user", "Q 3+3")),
    ]
    assert [turn["content"] for turn in said["base"].messages] == ["Be short", "Q 2+2", "five", "Q 3+3"]
    assert said["base"].text.endswith("user:Q 3+3</s><s>assistant:")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a run's folder"),
        (["run={tmp}"], "there is no run"),
        (["run={run}", "temperature=hot"], "temperature=hot: give a number"),
        (["run={run}", "max_tokens=0.5"], "max_tokens=0.5: give a whole number from 1 on"),
        (["run={run}", "max_tokens=2.7"], "max_tokens=2.7: give a whole number"),
        (["run={run}", "checkpoint=bset"], "checkpoint=bset: this run has none: did you mean 'best'"),
        (["run={run}", "checkpoint=all"], "checkpoint=all: this run has none"),
        (["run={run}", "model.nmae=x"], "did you mean 'name'"),
    ],
)
def test_what_is_asked_wrong_is_one_line(
    arguments: list[str], said: str, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert main(["chat", *(text.format(run=trained_run, tmp=tmp_path) for text in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


def test_bytes_that_are_no_text_are_asked_as_a_mark(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"h\xff\n1 + 1\n"), encoding="utf-8"))
    assert main(["chat", f"run={trained_run}"]) == 0
    assert "token" in capsys.readouterr().out.splitlines()[-2], "the second question is answered"


def test_a_question_that_is_too_long_says_what_to_type(trained_run: Path):
    said = talk(trained_run, "1 + " * 300 + "1", "1 + 1").splitlines()
    assert said[1].startswith("error: the question") and "/new" in said[1] and "data.max" not in said[1]
    assert "token" in said[-1]


COMMANDS = re.findall(r"^python -m reasoner (chat .*)$", (ROOT / "docs/chat.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(
    command: str, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    place = tmp_path / "outputs/tiny"
    place.mkdir(parents=True)
    (place / "DATE_TIME").symlink_to(trained_run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("3 + 4\n"))
    assert len(COMMANDS) == 2 and main(shlex.split(command)) == 0
    assert "token" in capsys.readouterr().out


def test_rewards_that_need_more_than_was_typed_say_so(trained_run: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text("def score(completion, metadata): return 1.0\n")
    said = talk(trained_run, "1 + 1", "/reward 2", "1 + 2", arguments=(f"reward={tmp_path / 'mine.py'}:score",))
    assert "these rewards can't judge a typed question" in said and len(re.findall(r"\d tokens?\)", said)) == 2
