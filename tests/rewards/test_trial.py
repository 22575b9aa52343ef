"""The verb `reward`: what it tries, what it says and what breaks its rule."""

import pytest

from reasoner.__main__ import main
from reasoner.config import RewardPart
from reasoner.errors import RewardError
from reasoner.rewards.trial import KINDS, breaks, completions_to_try, notes, shown, table, try_out

FEW = ["conf=tiny", "data.size=400", "data.heldout=40"]


@pytest.fixture
def golds(make_prompt):
    return [(make_prompt(str(i), row=f"train:{i}"), f"So it is {i}.\n#### {i}") for i in (17, 18, 19)]


def test_what_is_tried(golds, make_prompt):
    tried = completions_to_try(golds, seed=0)
    assert [kind for kind, _, _ in tried] == [kind for kind in KINDS for _ in range(3)]
    assert tried == completions_to_try(golds, seed=0)
    of_18 = {kind: text for kind, prompt, text in tried if prompt.answer == "18"}
    assert (of_18["gold"], of_18["empty"], of_18["wrong"]) == (golds[1][1], "", golds[2][1])
    assert "18" not in of_18["random"]
    assert sorted(of_18["shuffled"].split()) == sorted(of_18["gold"].split())
    alone = completions_to_try([(make_prompt("4"), "4")], seed=0)
    assert [kind for kind, _, _ in alone] == ["gold", "empty"]  # one word has no other order, and is no wrong answer
    assert completions_to_try([], seed=0) == []


def test_a_sound_reward_breaks_nothing(load, golds):
    rewards = load({"accuracy": "math", "format": RewardPart(fn="think_format", weight=0.2)})
    tried = try_out(rewards, golds)
    assert breaks(tried, "accuracy") == []
    head, accuracy, form, total, count = table(tried, rewards)
    assert head.split() == ["part", "weight", *KINDS, "failed", "ms", "most", "ms"]
    assert accuracy.split()[:4] == ["accuracy", "1", "1.000", "0.000"]
    assert form.split()[:4] == ["format", "0.2", "0.000", "0.000"]
    assert total.split()[:3] == ["total", "1.000", "0.000"]
    assert count.split() == ["completions", "3", "3", "3", "3", "3"]


def test_what_breaks_the_rule_is_named(load, golds):
    def found(function, accuracy="p"):
        return breaks(try_out(load({"p": "f"}, workers=1, f=function), golds), accuracy)

    everything = found(lambda completion: 1.0)
    assert len(everything) == 9
    assert everything[0] == "row train:17, empty '' for the answer '17': 'p' gives 1, as to a right one"
    assert found(lambda completion, answer: 0.5 * (answer in completion))[0].endswith("'p' gives 0.5, not 1")
    longer = found(lambda completion: len(completion) / 1000, accuracy=None)
    assert longer and all("no less than its gold" in line for line in longer)
    failing = found(lambda completion: 1 / len(completion))
    assert any("empty '' for the answer '17': 'p' failed: ZeroDivisionError" in line for line in failing)
    assert len(shown(everything)) == 9
    assert shown([*everything, *everything])[-1] == "  and 8 more"


def test_shuffled_words_that_earn_as_much_are_noted(load, golds):
    tried = try_out(load({"p": "f"}, workers=1, f=lambda completion, answer: float(answer in completion)), golds)
    assert breaks(tried, "p") == []
    assert notes(tried)[0].startswith("note: 3 of 3 shuffled completions earn as much as their gold, first '")
    assert notes([case for case in tried if case.kind != "shuffled"]) == []


def test_the_verb_passes_tiny(capsys):
    assert main(["reward", *FEW]) == 0
    said = capsys.readouterr().out
    assert "tried on 8 rows; no model was loaded" in said
    assert said.endswith("every gold completion earns full marks, and every other one less\n")


def test_a_part_that_fails_on_everything_is_one_line(load, golds):
    rewards = load({"accuracy": "math", "part": "f"}, workers=1, f=lambda completion: 1 // 0)
    with pytest.raises(RewardError, match=r"^the reward part 'part' failed on all \d+ completions tried: ZeroDivision"):
        try_out(rewards, golds)


def test_the_verb_refuses_a_reward_that_pays_for_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def score(completion, answer):\n    return 1.0\n")
    assert main(["reward", *FEW, "reward=mine.py:score"]) == 2
    said = capsys.readouterr()
    assert "no less than its gold (1)" in said.out
    assert "completions break the rule" in said.err
    assert main(["rewad", "conf=tiny"]) == 2
    assert "did you mean 'reward'?" in capsys.readouterr().err
