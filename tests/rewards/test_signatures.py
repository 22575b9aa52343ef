"""Reward functions of every kind, told apart by their parameters (written by hand; test_strangers.py has the libraries'
own)."""

import importlib.metadata
from dataclasses import replace

import pytest

from reasoner.config import RewardPart
from reasoner.errors import RewardError
from reasoner.rewards.signatures import signature_of
from reasoner.rewards.worker import describe

CHAT = ({"role": "user", "content": "2+2?"},)


@pytest.fixture
def told():
    """The kind that a function's parameters say, with these columns."""

    def family(function, columns: set[str] = frozenset(), **options) -> str:  # type: ignore[assignment]
        return signature_of("reward.parts.p.fn=f", describe(function), options, columns).family

    return family


@pytest.fixture
def one(load, make_prompt, make_completion):
    """The score of one completion by one function: a row of columns, a chat where asked."""

    def run(function, text="yes", *, answer="18", chat=False, prefill="", options=None, **row):
        rewards = load({"p": RewardPart(fn="f", options=options or {})}, workers=1, columns=set(row), f=function)
        prompt = make_prompt(answer, prefill=prefill, **row)
        if chat:
            prompt = replace(prompt, messages=CHAT)
        return rewards.score([prompt], [make_completion(text, num_tokens=3)])[0]

    return run


FAMILIES = [
    (lambda completion: 1, set(), "ours"),
    (lambda completion, answer, **columns: 1, set(), "ours"),
    (lambda answer, level: 1, {"level"}, "ours"),
    (lambda completion, answer, task, metadata: 1, {"task", "metadata"}, "ours"),
    (lambda completion, ground_truth: 1, {"ground_truth"}, "ours"),
    (lambda completion, entry: 1, {"entry"}, "ours"),
    (lambda completions, answers: [1], set(), "lists"),
    (lambda completions, **kwargs: [1], set(), "lists"),
    (lambda prompts, completions, completion_ids, solution, **kwargs: [1], {"solution"}, "lists"),
    (lambda completion_ids, **kwargs: [1], set(), "lists"),
    (lambda data_source, solution_str, ground_truth, extra_info=None: 1, {"data_source"}, "verl"),
    (lambda solution_str, ground_truth: 1, set(), "verl"),
    (lambda data_sources, solution_strs, ground_truths, extra_infos: [1], {"data_source"}, "verl_lists"),
    (lambda prompt, completion, answer, state: 1, set(), "verifiers"),
    (lambda completion, info, **kwargs: 1, set(), "verifiers"),
    (lambda completion, parser=None, **kwargs: 1, set(), "verifiers"),
    (lambda answer, entry: 1, {"metadata"}, "gym"),
]


@pytest.mark.parametrize(("function", "columns", "family"), FAMILIES)
def test_the_parameters_tell_whose_it_is(told, function, columns, family):
    assert told(function, columns) == family


def test_an_annotation_tells_text_from_messages(told):
    def text(completion: str, answer: str, state: str):
        return 1

    def messages(completion: list[dict[str, str]], answer: str):
        return 1

    assert told(text, {"state"}) == "ours"
    assert told(text) == "verifiers"
    assert told(messages) == "verifiers"


AMBIGUOUS = [
    (lambda completion, completions: 1, set(), "'completion' (one completion) and 'completions' (lists, as TRL's)"),
    (lambda solution_str, completion: 1, set(), "'solution_str' (verl) and 'completion' (one completion)"),
    (lambda solution_str, completions: 1, set(), "'solution_str' (verl) and 'completions'"),
    (lambda answer, entry, completion: 1, set(), "'completion' (one completion) and 'entry' (reasoning-gym)"),
    (lambda completion, state: 1, {"state"}, "'state' among its parameters (completion, state) is a column"),
    (lambda **kwargs: 1, set(), "takes only **kwargs"),
    (lambda completions, answers, states: [1], set(), "'states' of a whole group"),
    (lambda completions, trainer_state: [1], set(), "which only TRL's trainer has: give it a default"),
    (lambda completion, parser: 1, set(), "which only a rubric of verifiers has"),
    (lambda data_source, solution_str: 1, set(), "(data_source: openai/gsm8k)"),
    (lambda answer, entry: 1, set(), "needs the column 'metadata'"),
    (lambda completions, soluton: [1], {"solution"}, "did you mean 'solution'?"),
]


@pytest.mark.parametrize(("function", "columns", "reason"), AMBIGUOUS)
def test_what_is_ambiguous_or_lacks_an_argument_is_refused(told, function, columns, reason):
    with pytest.raises(RewardError) as caught:
        told(function, columns)
    assert reason in str(caught.value)
    assert "reward.parts.p.fn=f (line " in str(caught.value)


def test_an_option_must_not_be_an_argument(told):
    with pytest.raises(RewardError, match="'solution_str' is an argument"):
        told(lambda solution_str, **kwargs: 1, solution_str="x")
    with pytest.raises(RewardError, match="takes no option 'scael': did you mean 'scale'"):
        told(lambda completions, scale=1: [1], scael=2)


def test_batched_functions_get_lists_of_texts(one):
    def score(completions, answers, prompts, level, num_tokens, scale):
        wanted = [["<think>yes"], ["18"], ["Q: "], ["easy"], [3], 2]
        return [float([completions, answers, prompts, level, num_tokens, scale] == wanted)]

    found = one(score, prefill="<think>", chat=True, level="easy", options={"scale": 2})
    assert (found.parts, found.failures) == ({"p": 1.0}, {})


def test_trl_functions_get_texts_or_messages(one):
    def texts(prompts, completions, completion_ids, answer, **kwargs):
        same = (prompts, completions, completion_ids, answer) == (["Q: "], ["yes"], [[0, 0, 0]], ["18"])
        return [float(same and kwargs["level"] == ["easy"] and "completion" not in kwargs)]

    def messages(prompts, completions, **kwargs):
        asked, said = [[{"role": "user", "content": "2+2?"}]], [[{"role": "assistant", "content": "yes"}]]
        return [float((prompts, completions) == (asked, said))]

    def annotated(completions: list[list[dict[str, str]]], prompts):
        return [float(completions[0][0]["content"] == "yes" and prompts == [[{"role": "user", "content": "Q: "}]])]

    def plain(completions: list[str], **kwargs):
        return [float(completions == ["yes"])]

    assert one(texts, level="easy").parts == {"p": 1.0}
    assert one(messages, chat=True).parts == {"p": 1.0}
    assert one(annotated).parts == {"p": 1.0}
    assert one(plain, chat=True).parts == {"p": 1.0}


async def later(completions, **kwargs):
    import asyncio

    await asyncio.sleep(0)
    return [0.5]


LISTS = [
    (later, 0.5, None),
    (lambda completions: [None], None, None),
    (lambda completions: (1,), 1.0, None),
    (lambda completions: 1.0, None, "returned float: a function of lists returns a list"),
    (lambda completions: [1.0, 2.0], None, "returned list of 2 for one completion"),
    (lambda completions: [], None, "returned list of 0 for one completion"),
    (lambda completions: ["1"], None, "returned str"),
    (lambda completions: [float("nan")], None, "returned nan"),
]


@pytest.mark.parametrize(("function", "value", "reason"), LISTS)
def test_functions_of_lists_return_a_list_of_one(one, function, value, reason):
    found = one(function)
    assert found.parts.get("p") == value
    assert (reason or "") in found.failures.get("p", "")
    assert found.failed == bool(reason)


def test_verl_functions(one):
    def score(data_source, solution_str, ground_truth, extra_info=None):
        right = (data_source, solution_str, ground_truth) == ("openai/gsm8k", "yes", "18")
        return {"score": float(right), "acc": right, "pred": solution_str, "level": extra_info["level"]}

    row = {"data_source": "openai/gsm8k", "level": 2}
    assert one(score, **row).parts == {"p": 1.0, "p.acc": 1.0, "p.level": 2.0}
    assert one(score, extra_info={"level": 3}, **row).parts["p.level"] == 3.0
    assert one(score, options={"data_source": "openai/gsm8k"}, level=1).parts["p"] == 1.0
    missing = one(lambda solution_str: {"acc": 1.0})
    assert missing.failures == {"p": "returned a dict without 'score': it has acc"}
    everything = one(
        lambda solution_str, **kwargs: sorted(kwargs) == ["extra_info", "ground_truth", "scale"],
        options={"scale": 1},
        level=1,
    )
    assert everything.parts == {"p": 1.0}

    def batched(data_sources, solution_strs, ground_truths, extra_infos):
        wanted = [["openai/gsm8k"], ["yes"], ["18"], [row]]
        return [{"score": float([data_sources, solution_strs, ground_truths, extra_infos] == wanted)}]

    assert one(batched, **row).parts == {"p": 1.0}


def test_verifiers_functions(one):
    async def score(prompt, completion, answer, state, info, task):
        said = [{"role": "assistant", "content": "yes"}]
        same = (completion, answer, info, task) == (said, "18", {"level": 1}, "default")
        return float(same and state["completion"] == said and state["level"] == 1 and prompt == [dict(CHAT[0])])

    assert one(score, chat=True, level=1).parts == {"p": 1.0}

    def text(completion: str, prompt: str, info: dict):
        return float((completion, prompt, info) == ("yes", "Q: ", {"x": 1}))

    assert one(text, info={"x": 1}).failed is False
    everything = one(lambda state, completion, **rest: sorted(rest) == ["answer", "info", "prompt", "task"], level=1)
    assert everything.parts == {"p": 1.0}


def test_reasoning_gyms_score_answer(one):
    def score_answer(answer, entry):
        return float(answer == "18" and entry == {"question": "q", "answer": "gold", "metadata": {"a": 1}})

    row = {"question": "q", "metadata": {"a": 1}}
    for text in ("18", "#### 18", "<think>7</think>18", r"<think>7</think>so \boxed{18}"):
        assert one(score_answer, text, answer="gold", **row).parts == {"p": 1.0}, text
    assert one(score_answer, "<think>18", answer="gold", **row).parts == {"p": 0.0}


def test_named_parts_and_extras_stand_beside_the_part(load, make_prompt, make_completion):
    parts = {"both": RewardPart(fn="both", weight=2.0), "extra": RewardPart(fn="extra", weight=0.5)}
    rewards = load(
        parts,
        both=lambda completion: {"accuracy": 1.0, "format": 0.5},
        extra=lambda completion: (1.0, {"length": 3, "said": "a text"}),
    )
    (score,) = rewards.score([make_prompt("")], [make_completion("")])
    assert score.parts == {"both": 1.5, "both.accuracy": 1.0, "both.format": 0.5, "extra": 1.0, "extra.length": 3.0}
    assert score.total == 2.0 * 1.5 + 0.5 * 1.0


def test_an_async_failure_is_a_failure(one):
    async def score(completion):
        raise ValueError("no")

    assert one(score).failures["p"].startswith("ValueError: no (test_signatures.py:")


def test_an_entry_point_is_found_by_name(load, make_prompt, make_completion, tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def score(completion): return 4\ndef other(completion): return 5\n")
    offered = [importlib.metadata.EntryPoint("shout", "rewards_of_mine:score", "reasoner.rewards")]

    def entry_points(*, group, name):
        return [point for point in offered if (point.group, point.name) == (group, name)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert load({"p": "shout"}).score([make_prompt("")], [make_completion("")])[0].total == 4
    offered.append(importlib.metadata.EntryPoint("shout", "rewards_of_mine:other", "reasoner.rewards"))
    with pytest.raises(RewardError, match=r"name one of rewards_of_mine:other, rewards_of_mine:score"):
        load({"p": "shout"})
