"""Secrets that the environment knows never reach a byte of ours (G8)."""

import json

import pytest
import yaml

from reasoner.redact import REDACTED, Redactor

SECRET = "hf_QxY'é\"z\\12345"


def test_g8_values_of_secret_names_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("db_password", "swordfish-9")
    monkeypatch.setenv("HARMLESS", "plain-value-1")
    monkeypatch.setenv("SHORT_KEY", "1234567")
    redactor = Redactor.from_environment()
    text = "hf_abcdefgh swordfish-9 plain-value-1 1234567"
    assert redactor.text(text) == f"{REDACTED} {REDACTED} plain-value-1 1234567"


@pytest.mark.parametrize(
    "written",
    [
        SECRET,
        json.dumps({"a": SECRET}),
        json.dumps({"a": SECRET}, ensure_ascii=False),
        yaml.safe_dump({"a": SECRET}, allow_unicode=True),
        yaml.safe_dump({"a": SECRET}, allow_unicode=True, default_style="'"),
    ],
)
def test_g8_secret_with_quotes_in_every_written_form(written: str) -> None:
    redacted = Redactor([SECRET]).text(written)
    assert "QxY" not in redacted
    assert "12345" not in redacted


def test_g8_secret_with_spaces_that_yaml_folds() -> None:
    secret = "correct horse battery staple " * 4 + "end"
    written = yaml.safe_dump({"long": secret})
    assert secret not in written, "the writer folded it, so that a plain search misses it"
    assert "staple" not in Redactor([secret]).text(written)


def test_g8_redacted_config_still_reads_as_a_string() -> None:
    assert yaml.safe_load(Redactor(["hf_abcdefgh"]).text("token: hf_abcdefgh\n")) == {"token": REDACTED}


def test_g8_longer_secret_first() -> None:
    assert Redactor(["abcdefgh", "abcdefgh-and-more"]).text("abcdefgh-and-more") == REDACTED


def test_tree_keeps_numbers_that_look_like_a_secret() -> None:
    redactor = Redactor(["12345678"])
    tree = {"12345678": (12345678, 0.12345678, True, None), "text": "a 12345678 b"}
    assert redactor.tree(tree) == {REDACTED: [12345678, 0.12345678, True, None], "text": f"a {REDACTED} b"}
