"""`--help`: each verb prints its own forms and keys, and those are what the verb takes."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from reasoner import chat, serve, usage
from reasoner.__main__ import OF_RUNS, main
from reasoner.evaluation import request as evaluation
from reasoner.export import request as export
from reasoner.report import command as report

ROOT = Path(__file__).parents[1]
CHOSEN_BY_ITS_FORM = {"conf", "model"}  # keys that stand in the forms themselves


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("verb", usage.VERBS)
def test_a_verb_prints_its_own_help_and_nothing_else(verb: str, flag: str, capsys: pytest.CaptureFixture):
    assert main([verb, "run=nowhere", flag]) == 0, "help comes before anything is looked for"
    said = capsys.readouterr().out
    told = usage.VERBS[verb]
    assert [form for form, _ in told.forms] == re.findall(r"^  (\S.*?)  +\S", said, re.MULTILINE)[: len(told.forms)]
    assert f"more: {told.page}" in said and (ROOT / told.page).is_file()
    others = {form for name, other in usage.VERBS.items() if name != verb for form, _ in other.forms}
    assert not [form for form in others if f"  {form}  " in said]
    assert max(map(len, said.splitlines())) <= 120


@pytest.mark.parametrize(
    ("verb", "keys"),
    [
        ("report", report.KEYS),
        ("eval", evaluation.OWN),
        ("chat", chat.OWN),
        ("serve", serve.OWN),
        ("export", export.OWN),
    ],
)
def test_the_keys_that_are_told_are_those_that_the_verb_takes(verb: str, keys: Sequence[str]):
    told = {key for left, _ in usage.VERBS[verb].keys for key in re.findall(r"(?<![\w-])([a-z_]+)=", left)}
    assert told | (CHOSEN_BY_ITS_FORM & set(keys)) == set(keys)


def test_the_choices_of_export_are_told():
    told = dict(re.findall(r"([a-z]+)=([\w|]+)", "\n".join(left for left, _ in usage.VERBS["export"].keys)))
    for key in ("to", "quant", "dtype", "base", "what"):
        assert tuple(told[key].split("|")) == export.CHOICES[key]


def test_the_general_help_has_every_form(capsys: pytest.CaptureFixture):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {form} " in said for verb in usage.VERBS.values() for form, _ in verb.forms)
    assert "confs:" in said and "  tiny " in said
    assert set(OF_RUNS) <= set(usage.VERBS)


def test_help_beside_a_conf_is_the_verbs_own(capsys: pytest.CaptureFixture):
    assert main(["reward", "conf=tiny", "--help"]) == 0
    assert "--sample" in capsys.readouterr().out
